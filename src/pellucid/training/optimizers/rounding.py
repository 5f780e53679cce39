"""Stochastic rounding of fp32 to bf16: up or down with the chance that makes the mean exact, from a generator without state.

A moving average in bf16 stalls under rounding to nearest: with beta2 = 0.999 a step moves v by 1/1000 of itself at most, and
bf16 keeps 8 bits (Zamirai et al. 2020, arXiv 2010.06192). Rounded stochastically it moves as much in the mean (Gupta et al.
2015, arXiv 1502.02551). The random bits of an element are a function of (key, index) alone, Widynski's Squares (2020, arXiv
2004.06278, squares32), so a resumed run draws what an unbroken one draws, on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pellucid.model.kernels import gpu, native

LOW_32 = 0xFFFFFFFF


def rounding_key(seed: int, step: int, label: str) -> int:
    """An odd 64-bit key, as a signed integer, for one tensor (`label`) in one step."""
    digest = hashlib.sha256(f"{seed}/{step}/{label}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True) | 1


def random_bits(key: int, index: Tensor) -> Tensor:
    """32 random bits, as int64 in 0..2^32-1, for each int64 index: squares32(index, key)."""
    swap = lambda x: ((x >> 32) & LOW_32) | (x << 32)
    y = index * key  # all arithmetic wraps at 64 bits
    z = y + key
    x = swap(y * y + y)
    x = swap(x * x + z)
    x = swap(x * x + y)
    return ((x * x + z) >> 32) & LOW_32


def round_plain(x: Tensor, key: int, first: int = 0) -> Tensor:
    """bf16 of contiguous fp32 x: one of its two neighbours, the mean exact; NaN stays NaN, what is exact stays as it is.

    first: index of x's first element in the tensor it is a piece of.
    """
    index = torch.arange(first, first + x.numel(), device=x.device).view(x.shape)
    bits = x.view(torch.int32) + (random_bits(key, index) >> 16).int()  # a carry out of the low half is the step up
    return torch.where(x.isnan(), x, (bits & ~0xFFFF).view(torch.float32)).bfloat16()


def round_stochastically(x: Tensor, key: int, first: int = 0) -> Tensor:
    """As `round_plain`, in one pass."""
    if gpu.fits("update", x) and x.dtype == torch.float32:
        from pellucid.model.kernels.gpu.update import round_up_or_down  # triton is not everywhere

        return round_up_or_down(x, key, first)
    if not native.fits(x) or x.dtype != torch.float32:
        return round_plain(x, key, first)
    rounded = torch.empty_like(x, dtype=torch.bfloat16)
    native.call("round_stochastically", x.dtype, x, rounded, x.numel(), key, first)
    return rounded
