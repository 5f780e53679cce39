"""Rotary positions, with the change from token order to head order that attention wants made on the way.

Letters: B batch, T sequence, K key/value heads, G query heads for each of them (1 for keys), d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.model.kernels import gpu, native


def rotate_plain(x_BTKGd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+d/2}) by its position's phase, in fp32; cast back; result [B, K, T, G, d]."""
    wide = x_BTKGd.float()
    first, second = wide.chunk(2, dim=-1)
    turned = wide * cos_BTd[:, :, None, None] + torch.cat((-second, first), dim=-1) * sin_BTd[:, :, None, None]
    return turned.to(x_BTKGd.dtype).transpose(1, 2)


def rotate(x_BTKGd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """As `rotate_plain`, by the fastest way that this device has."""
    if gpu.fits("rotary", x_BTKGd, cos_BTd, sin_BTd):
        from pellucid.model.kernels.gpu.rotary import rotate as kernel

        return kernel(x_BTKGd, cos_BTd, sin_BTd)
    if native.fits(x_BTKGd, cos_BTd, sin_BTd):
        return (_Rotate.apply if torch.is_grad_enabled() else _fused)(x_BTKGd, cos_BTd.contiguous(), sin_BTd.contiguous())
    return rotate_plain(x_BTKGd, cos_BTd, sin_BTd)


def _fused(x_BTKGd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    B, T, K, G, d = x_BTKGd.shape
    y_BKTGd = x_BTKGd.new_empty(B, K, T, G, d)
    native.call("rotate", x_BTKGd.dtype, x_BTKGd.contiguous(), cos_BTd, sin_BTd, y_BKTGd, B, T, K, G, d, 1)
    return y_BKTGd


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTKGd, cos_BTd, sin_BTd):
        ctx.phases = cos_BTd, sin_BTd
        return _fused(x_BTKGd, cos_BTd, sin_BTd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BKTGd):
        B, K, T, G, d = grad_BKTGd.shape
        grad_BTKGd = grad_BKTGd.new_empty(B, T, K, G, d)
        native.call("rotate", grad_BKTGd.dtype, grad_BKTGd.contiguous(), *ctx.phases, grad_BTKGd, B, T, K, G, d, 0)
        return grad_BTKGd, None, None
