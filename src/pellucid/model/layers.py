"""The small parts every layer is made of: linear map, RMSNorm, the phases of rotary positions.

Source: xai-org/grok-1 model.py (`Linear`, `RMSNorm`, `RotaryEmbedding`). There are no biases anywhere in Grok-1.
Letters: B batch, T sequence, D hidden_size, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pellucid.model.kernels.norm import fits_gpu, on_gpu, rms_norm
from pellucid.model.kernels.products import linear


class Linear(nn.Module):
    """y = x @ weight.T with weight [out, in]. The weight may be an fp32 master: it is cast to the dtype of x."""

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight, computed in fp32 and cast back (Zhang & Sennrich 2019).

    `weight` is the scale itself, not 1 + scale; there is no offset. It stays fp32 in every precision.
    """

    def __init__(self, size: int, eps: float, device=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + norm(x): one kernel where there is one for both."""
        if fits_gpu(x, self.weight):
            return on_gpu(x, self.weight, self.eps, residual)
        return residual + self(x)


def rotary_phases(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, d] in fp32 for integer `positions` [..., T] (Su et al. 2021; half-split layout)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / (theta ** (exponents / head_dim))
    phases = positions.float().unsqueeze(-1) * frequencies
    phases = torch.cat((phases, phases), dim=-1)
    return phases.cos(), phases.sin()
