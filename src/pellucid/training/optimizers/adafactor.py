"""Adafactor, as torch.optim.Adafactor defines it: second moments kept as one row and one column per matrix.

Source: Shazeer & Stern 2018 (arXiv 1804.04235, algorithms 4 and 5), without first moment. The step is relative to the
size of the weights, so its learning rate wants to be larger than Adam's (torch's default is 1e-2). A stack of experts
[E, out, in] has its own factors per expert; the root mean squares (of weights, of the update) are taken over the stack.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.training.optimizers.update import Update, account

BETA2_DECAY = -0.8  # beta2 of step t is 1 - t^-0.8
SMALLEST_SCALE = 1e-3  # a tensor of zeros still learns
LARGEST_RMS = 1.0  # the update is scaled down to this root mean square


def adafactor(
    weight: Tensor, gradient: Tensor, state: dict[str, Tensor], *, learning_rate: float, weight_decay: float
) -> Update:
    """One Adafactor step: weight -= learning_rate * weight_decay * weight + rate * clipped(gradient / sqrt(v)).

    rate = max(1e-3, rms(weight)) * min(learning_rate, step^-0.5). state: {} or {"step", "row_var" [..., out, 1],
    "col_var" [..., 1, in]} for matrices, {"step", "variance"} for vectors. Terms: decay, descent.
    """
    step = int(state.get("step", 0)) + 1
    fresh = step**BETA2_DECAY  # 1 - beta2: share of this step's squares
    smallest = torch.finfo(weight.dtype).eps
    rate = max(SMALLEST_SCALE, _rms(weight)) * min(learning_rate, step**-0.5)
    squares = gradient * gradient
    if gradient.ndim > 1:
        row = _moving(state.get("row_var"), squares.mean(dim=-1, keepdim=True), fresh)
        column = _moving(state.get("col_var"), squares.mean(dim=-2, keepdim=True), fresh)
        v = (row @ column) / row.mean(dim=-2, keepdim=True).clamp(min=smallest)
        moments = {"row_var": row, "col_var": column}
    else:
        v = _moving(state.get("variance"), squares, fresh)
        moments = {"variance": v}
    scaled = v.clamp(min=smallest**2).rsqrt() * gradient
    direction = scaled / max(1.0, _rms(scaled) / LARGEST_RMS)
    decayed = weight * (1 - learning_rate * weight_decay) if weight_decay else weight

    terms = {
        "decay": -learning_rate * weight_decay * weight.double(),
        "descent": -rate * direction.double(),
    }
    state_after = {"step": torch.tensor(float(step)), **moments}
    return account(weight, decayed - rate * direction, terms, state_after, v=v, direction=direction)


def _rms(tensor: Tensor) -> float:
    return tensor.norm(2).item() / tensor.numel() ** 0.5


def _moving(before: Tensor | None, now: Tensor, share: float) -> Tensor:
    return (torch.zeros_like(now) if before is None else before).lerp(now, share)
