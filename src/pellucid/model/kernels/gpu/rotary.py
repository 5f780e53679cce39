"""Rotary positions and the change from token order to head order, in one pass each way, in Triton.

The definition is `rotate_plain` of kernels/rotary.py.
Letters: B batch, T sequence, K key/value heads, G query heads for each of them, d head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 16  # of a program


@triton.jit
def _turn(x, cos, sin, y, T, K, G: tl.constexpr, d: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """y [B, K, T, G, d] from x [B, T, K, G, d]; BACK: the other way, by the opposite angle."""
    token = tl.program_id(0).to(tl.int64)
    batch, t = token // T, token % T
    heads, pairs = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, PAIRS)
    inside = (heads[:, None] < K * G) & (pairs[None, :] < d // 2)
    by_token = (token * K * G + heads)[:, None] * d + pairs[None, :]
    by_head = (((batch * K + heads // G) * T + t) * G + heads % G)[:, None] * d + pairs[None, :]
    source, target = (by_head, by_token) if BACK else (by_token, by_head)
    first = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + source + d // 2, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * d + pairs, mask=pairs < d // 2, other=0.0)[None, :]
    s = tl.load(sin + token * d + pairs, mask=pairs < d // 2, other=0.0)[None, :]
    s = -s if BACK else s
    tl.store(y + target, (first * c - second * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + target + d // 2, (second * c + first * s).to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("pellucid::rotate", mutates_args=())
def _rotate(x: Tensor, cos_BTd: Tensor, sin_BTd: Tensor, back: bool) -> Tensor:
    """x [B, T, K, G, d] -> [B, K, T, G, d]; back: the other way, which is also its gradient."""
    y = x.new_empty(x.shape[0], x.shape[2], x.shape[1], *x.shape[3:])
    B, T, K, G, d = y.shape if back else x.shape
    heads, pairs = min(HEADS, triton.next_power_of_2(K * G)), triton.next_power_of_2(d // 2)
    x, cos_BTd, sin_BTd = x.contiguous(), cos_BTd.contiguous(), sin_BTd.contiguous()
    _turn[(B * T, triton.cdiv(K * G, heads))](x, cos_BTd, sin_BTd, y, T, K, G, d, back, heads, pairs)
    return y


@_rotate.register_fake
def _(x, cos_BTd, sin_BTd, back):
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], *x.shape[3:])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])
    ctx.back = inputs[3]


def _gradients(ctx, grad):
    return _rotate(grad, *ctx.saved_tensors, not ctx.back), None, None, None


_rotate.register_autograd(_gradients, setup_context=_save)


def rotate(x_BTKGd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+d/2}) by its position's phase, in fp32; [B, K, T, G, d]. The phases have no gradient."""
    return _rotate(x_BTKGd, cos_BTd, sin_BTd, False)
