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
from pellucid.training.optimizers.stored import Stored, experts_in_use

ELEMENTWISE = ("sgd", "adam", "adamw", "lion")  # rules that treat every element alike: a slice may take its step alone


@contextmanager
def frozen_idle_experts(optimizer: torch.optim.Optimizer, idle: dict[str, Tensor]) -> Iterator[None]:
    """`with frozen_idle_experts(optimizer, idle): optimizer.step()` leaves idle experts bit for bit as they were.

    idle: parameter name -> bool mask [E], True where no token of the whole step chose the expert. Where the rule allows,
    or moments are stored (see stored.py), only the slices in use take the step; elsewhere the idle ones are copied and put
    back. The usual step, with none, costs nothing. Names the optimizer lacks are ignored.
    """
    if isinstance(optimizer, Stored):
        optimizer.idle = {name: mask for name, mask in idle.items() if bool(mask.any())}  # of a dry run, none
        try:
            yield
        finally:
            optimizer.idle = {}
        return
    in_parts, kept = [], []
    for name, weight, group in optimizer_parameters(optimizer):
        mask = idle.get(name)
        if mask is None or weight.grad is None or not bool(mask.any()):
            continue
        if group["rule"] in ELEMENTWISE and not bool(mask.all()):
            in_parts.append((weight, _used_slices(optimizer, weight, mask)))
        else:
            rows = mask.nonzero().squeeze(1).to(weight.device)
            kept.append((weight, rows, weight.detach()[rows], _slices(optimizer, weight, rows)))
    whole = [(group, group["params"]) for group in optimizer.param_groups]
    stand_ins = {id(weight): [part for _, part in parts] for weight, parts in in_parts}
    for group, weights in whole:
        group["params"] = [part for weight in weights for part in stand_ins.get(id(weight), [weight])]
    try:
        yield
    finally:
        for group, weights in whole:
            group["params"] = weights
        for weight, parts in in_parts:
            _join_state(optimizer, weight, parts)
    with torch.no_grad():
        for weight, rows, before, state in kept:
            weight[rows] = before
            for key, after in _stacked(optimizer, weight).items():
                after[rows] = state.get(key, 0)  # state made in this very step begins at zero


def _used_slices(optimizer: torch.optim.Optimizer, weight: Tensor, idle_E: Tensor) -> list[tuple[slice, Tensor]]:
    """Each run of experts in use, as a view of the weight with its gradient, and with its state in the optimizer."""
    parts, stacked = [], _stacked(optimizer, weight)
    state = optimizer.state.get(weight, {})
    for first, end in experts_in_use(idle_E):
        at = slice(first, end)
        part = weight.detach()[at]
        part.grad = weight.grad[at]
        if state:
            optimizer.state[part] = {key: stacked[key][at] if key in stacked else _own(value) for key, value in state.items()}
        parts.append((at, part))
    return parts


def _own(value):
    return value.clone() if isinstance(value, Tensor) else value  # a count of steps goes up once for each part


def _join_state(optimizer: torch.optim.Optimizer, weight: Tensor, parts: list[tuple[slice, Tensor]]) -> None:
    """Counts of steps, and state made in this very step, become the whole tensor's; where experts idle it begins at zero."""
    with torch.no_grad():
        for at, part in parts:
            for key, value in optimizer.state.pop(part, {}).items():
                state = optimizer.state[weight]
                if not (isinstance(value, Tensor) and value.shape == part.shape):
                    state[key] = value
                    continue
                if state.get(key) is None:
                    state[key] = torch.zeros_like(weight, dtype=value.dtype)
                if state[key][at].data_ptr() != value.data_ptr():
                    state[key][at] = value


def _slices(optimizer: torch.optim.Optimizer, weight: Tensor, rows: Tensor) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in _stacked(optimizer, weight).items()}


def _stacked(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """The state tensors that hold one slice per expert."""
    state = optimizer.state.get(weight, {})
    fits = lambda value: isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(weight)
    return {key: value for key, value in state.items() if fits(value)}
