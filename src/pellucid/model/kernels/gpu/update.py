"""Adam and AdamW in one pass over a tensor, in Triton: clipping, moments, decay, the weight, and the weight as the products read it;
and the rounding of moments that are kept in bf16.

The definitions are `adam` and `adamw` of training/optimizers/adam.py, and rounding.py beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from pellucid.model.kernels import native
from pellucid.model.kernels.gpu.launch import INTERPRETED

BLOCK = 256 if INTERPRETED else 2048


@triton.jit
def _adam(weight, grad, exp_avg, exp_avg_sq, copy, numel, clip, keep, l2, beta1, new1, beta2, new2, rate, root, eps,
          COPY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """keep: what decay leaves of the weight; new: 1 - beta; rate: the learning rate, m's bias corrected; root: of v's correction."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    w = tl.load(weight + at, mask=inside).to(tl.float32)
    g = tl.load(grad + at, mask=inside).to(tl.float32) * clip
    g = tl.where(l2 == 0, g, g + l2 * w)  # a weight that is not finite makes no slope where it is no part of it
    m = tl.load(exp_avg + at, mask=inside).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=inside).to(tl.float32)
    m = beta1 * m + new1 * g
    v = beta2 * v + new2 * g * g
    w = keep * w - rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), tl.full((BLOCK,), root, tl.float32)) + eps)
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
    if COPY:
        tl.store(copy + at, w.to(copy.dtype.element_ty), mask=inside)


def adam_(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None, *, clip: float, step: int,
          learning_rate: float, beta1: float, beta2: float, eps: float, decay: float, l2: float) -> None:  # fmt: skip
    """Step number `step` (from 1) of a contiguous weight, in place, for the gradient times `clip`; `copy`, where given, becomes the
    new weight in its own dtype. decay: AdamW's; l2: Adam's."""
    if not weight.is_contiguous():
        raise ValueError(f"a weight of strides {weight.stride()}: the update takes contiguous ones only")
    if native.dry() is None:
        rate, root = learning_rate / (1 - beta1**step), (1 - beta2**step) ** 0.5
        _adam[(triton.cdiv(weight.numel(), BLOCK),)](
            weight, grad.contiguous(), exp_avg, exp_avg_sq, weight if copy is None else copy, weight.numel(), clip,
            1 - learning_rate * decay, l2, beta1, 1 - beta1, beta2, 1 - beta2, rate, root, eps, copy is not None, BLOCK, num_warps=8,
            enable_fp_fusion=False)  # fmt: skip
    increment_version((weight, exp_avg, exp_avg_sq))


@triton.jit
def _round(x, rounded, numel, key, first, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < numel)
    bits = value.to(tl.uint32, bitcast=True) + _random_16(at + first, key)
    bits = tl.where(value == value, bits, 0x7FC00000)
    tl.store(rounded + at, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=at < numel)


@triton.jit
def _random_16(index, key):
    """The upper 16 bits of squares32(index, key)."""
    y = index.to(tl.uint64) * key.to(tl.uint64)
    z = y + key.to(tl.uint64)
    x = y * y + y
    x = (x >> 32) | (x << 32)
    x = x * x + z
    x = (x >> 32) | (x << 32)
    x = x * x + y
    x = (x >> 32) | (x << 32)
    return ((x * x + z) >> 48).to(tl.uint32)


def round_up_or_down(x: Tensor, key: int, first: int) -> Tensor:
    """`round_plain` of contiguous fp32 x."""
    rounded = torch.empty_like(x, dtype=torch.bfloat16)
    if native.dry() is None:
        _round[(triton.cdiv(x.numel(), BLOCK),)](x, rounded, x.numel(), key, first, BLOCK, num_warps=8)
    return rounded
