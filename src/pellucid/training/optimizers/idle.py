"""Experts that no token chose in a step stay untouched in that step: weights, moments and decay.

Their gradient is zero, not absent, because experts are stacked in one tensor [E, ...]; without care momentum and decay
would go on moving them. Counting is per tensor: the step count in Adam's bias correction counts the tensor's steps, so
the moments of an expert that idled early are corrected by too little for a while (with betas 0.9 and 0.95 its first
direction is 0.45 rather than 1 in size, with 0.9 and 0.999 it is 3.2; both tend to 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pellucid.training.optimizers.build import optimizer_parameters


@contextmanager
def frozen_idle_experts(optimizer: torch.optim.Optimizer, idle: dict[str, Tensor]) -> Iterator[None]:
    """`with frozen_idle_experts(optimizer, idle): optimizer.step()` leaves idle experts bit for bit as they were.

    idle: parameter name -> bool mask [E], True where no token of the whole step chose the expert. Only the slices of
    idle experts are copied, so the usual step, with none, costs nothing. Names the optimizer lacks are ignored.
    """
    kept = []
    for name, weight, _ in optimizer_parameters(optimizer):
        mask = idle.get(name)
        if mask is not None and bool(mask.any()):
            rows = mask.nonzero().squeeze(1).to(weight.device)
            kept.append((weight, rows, weight.detach()[rows], _slices(optimizer, weight, rows)))
    yield
    with torch.no_grad():
        for weight, rows, before, state in kept:
            weight[rows] = before
            for key, after in _stacked(optimizer, weight).items():
                after[rows.to(after.device)] = state.get(key, 0)  # state made in this very step begins at zero


def _slices(optimizer: torch.optim.Optimizer, weight: Tensor, rows: Tensor) -> dict[str, Tensor]:
    return {key: value[rows.to(value.device)] for key, value in _stacked(optimizer, weight).items()}


def _stacked(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """The state tensors that hold one slice per expert."""
    state = optimizer.state.get(weight, {})
    fits = lambda value: isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(weight)
    return {key: value for key, value in state.items() if fits(value)}
