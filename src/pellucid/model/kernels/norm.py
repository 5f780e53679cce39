"""RMSNorm, forward and backward, each in one pass; the plain definition beside it.

Saved for the backward pass: the input and one scale per row. Letters: N rows, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.model.kernels import gpu, native

BLOCKS = 64  # of rows, whose sums for the weight's gradient are added in order, whatever the number of threads


def rms_norm_plain(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, cast back to x's dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight_D).to(x.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `rms_norm_plain`, by the fastest way that this device has."""
    if fits_gpu(x, weight_D):
        return on_gpu(x, weight_D, eps)
    if weight_D.dtype == torch.float32 and native.fits(x, weight_D):
        # A function of autograd costs more than the norm of one token, so without gradients there is none.
        return _RMSNorm.apply(x, weight_D, eps) if torch.is_grad_enabled() else _fused(x, weight_D, eps)[1]
    return rms_norm_plain(x, weight_D, eps)


def fits_gpu(x: Tensor, weight_D: Tensor) -> bool:
    return weight_D.dtype == torch.float32 and gpu.fits("norm", x, weight_D)


def on_gpu(x: Tensor, weight_D: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """residual + rms_norm(x) in one GPU kernel."""
    from pellucid.model.kernels.gpu.norm import rms_norm as kernel

    return kernel(x, weight_D, eps, residual)


def _fused(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x as it was read, y, the scale of each row)."""
    x, D = x.contiguous(), x.shape[-1]
    y, scale_N = torch.empty_like(x), x.new_empty(x.numel() // D, dtype=torch.float32)
    native.call("rms_norm", x.dtype, x, weight_D.contiguous(), y, scale_N, len(scale_N), D, float(eps))
    return x, y, scale_N


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        x, y, scale_N = _fused(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight_D, scale_N = ctx.saved_tensors
        N, D = len(scale_N), x.shape[-1]
        blocks = min(BLOCKS, max(1, N))
        grad_x, sums = torch.empty_like(x), x.new_empty(blocks, D, dtype=torch.float32)
        native.call("rms_norm_backward", x.dtype, grad_y.contiguous(), x, weight_D, scale_N, grad_x, sums, N, D, blocks)
        return grad_x, sums.sum(0), None
