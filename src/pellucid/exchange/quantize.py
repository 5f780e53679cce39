"""int8 weights of the official checkpoint: W = int8 * scale, rounded to bfloat16, and the way back.

A scale serves one output column over one contiguous group of in/G inputs. bfloat16 rounds by less than 2^-8, so W / scale
is off by less than 127 / 256 < 1/2 (and not at all for -128): rounding it gives the int8 back exactly. So a converted
model carries only its scales (small), and a weight that training has not touched writes back the same.
Source of the rule: xai-org/grok-1 model.py, `Linear`. Letters: G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.config import UserError

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**120  # outside, products are subnormal or overflow


@dataclass(frozen=True)
class Scales:
    """What a leaf carries of its official file: scales [.., G, out] bf16, and the int8 where scales do not suffice."""

    scales: Tensor
    weight: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.scales.shape[-2]


def recoverable(scales: Tensor) -> bool:
    """Whether int8 follows from weight and scale alone (false for zero, subnormal, huge or non-finite scales)."""
    size = scales.float().abs()
    return bool(((size >= SMALLEST_SCALE) & (size <= LARGEST_SCALE)).all())


def dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    """int8 [in, out] and bf16 [G, out] to bf16 [in, out]: one rounding of the exact product, as in the release."""
    grouped = weight.unflatten(0, (scales.shape[0], -1)).float()
    return grouped.mul_(scales.float()[:, None]).to(torch.bfloat16).flatten(0, 1)


def quantize(weight: Tensor, groups: int, carried: Tensor | None = None, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Weight [in, out] to int8 [in, out] and bf16 scales [G, out].

    Each group of a column gets scale = max|W| / 127 (symmetric; 1 where all are zero), so each weight moves by less
    than one scale. A group that is still exactly a multiple of its `carried` scale keeps it, and its int8, unchanged.
    Raises UserError for a non-finite weight.
    """
    grouped = weight.unflatten(0, (groups, -1)).float()
    if not bool(torch.isfinite(grouped).all()):
        raise UserError(f"{name} holds NaN or infinity, which int8 cannot say: export to 'hf', or mend the model")
    scales = (grouped.abs().amax(1) / 127).to(torch.bfloat16)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    int8 = (grouped / scales.float()[:, None]).round_().clamp_(-127, 127)
    if carried is not None:
        old = carried.float()[:, None]
        kept = (grouped / old).round_().nan_to_num_().clamp_(-128, 127)
        same = ((kept * old).to(torch.bfloat16).float() == grouped).all(1)
        int8 = torch.where(same[:, None], kept, int8)
        scales = torch.where(same, carried, scales)
    return int8.to(torch.int8).flatten(0, 1), scales
