"""RMSNorm, with the sum of the residual stream where one is given, forward and backward in Triton: one pass each.

Saved: the input and one scale per row. The definition is `rms_norm_plain` of kernels/norm.py. Letters: N rows, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pellucid.model.kernels.gpu.launch import INTERPRETED, tile

BLOCKS = 8 if INTERPRETED else 1024  # programs of the backward pass; each sums the weight's gradient over its rows, in order


@triton.jit
def _forward(x, weight, residual, y, scale, D, eps, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr):
    n, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    inside = columns < D
    wide = tl.load(x + n * D + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps)
    tl.store(scale + n, factor)
    out = (wide * factor * tl.load(weight + columns, mask=inside, other=0.0)).to(y.dtype.element_ty)
    if RESIDUAL:
        out = (out.to(tl.float32) + tl.load(residual + n * D + columns, mask=inside, other=0.0).to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + n * D + columns, out, mask=inside)


@triton.jit
def _backward(grad, x, weight, scale, grad_x, sums, N, D, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    w = tl.load(weight + columns, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(n, tl.int64) * D
        factor = tl.load(scale + n)
        normed = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32) * factor
        slope = tl.load(grad + row + columns, mask=inside, other=0.0).to(tl.float32)
        total += slope * normed
        inner = slope * w
        out = factor * (inner - normed * (tl.sum(inner * normed, 0) / D))
        tl.store(grad_x + row + columns, out.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * D + columns, total, mask=inside)


@torch.library.custom_op("pellucid::rms_norm", mutates_args=())
def _norm(x: Tensor, weight_D: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    x, D = x.contiguous(), x.shape[-1]
    y, scale_N = torch.empty_like(x), x.new_empty(x.numel() // D, dtype=torch.float32)
    given = residual if residual is None else residual.contiguous()
    _forward[(len(scale_N),)](x, weight_D, given if given is not None else x, y, scale_N, D, eps, given is not None, tile(D))
    return y, scale_N


@_norm.register_fake
def _(x, weight_D, residual, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("pellucid::rms_norm_backward", mutates_args=())
def _norm_backward(grad: Tensor, x: Tensor, weight_D: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    grad, x, (N, D) = grad.contiguous(), x.contiguous(), (len(scale_N), x.shape[-1])
    grad_x, sums = torch.empty_like(x), x.new_empty(min(BLOCKS, N), D, dtype=torch.float32)
    _backward[(len(sums),)](grad, x, weight_D, scale_N, grad_x, sums, N, D, tile(D))
    return grad_x, sums.sum(0)


@_norm_backward.register_fake
def _(grad, x, weight_D, scale_N):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight_D)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.with_residual = inputs[2] is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _scale):
    return *_norm_backward(grad, *ctx.saved_tensors), grad if ctx.with_residual else None, None


_norm.register_autograd(_gradients, setup_context=_save)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """residual + x * rsqrt(mean(x^2) + eps) * weight over the last dimension, in fp32; the normed x is rounded before the sum."""
    return _norm(x, weight_D, residual, eps)[0]
