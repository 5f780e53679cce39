"""Optimizer state as named tensors, for checkpoints: `exp_avg.layers.0.moe.down_proj` and the like.

Settings (learning rates, betas) are not state: they come from the configuration when a run is resumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.config import UserError
from pellucid.training.optimizers.build import optimizer_parameters
from pellucid.training.optimizers.stored import MOMENTS, Stored

WHOLE = {key for keys in MOMENTS.values() for key in keys}  # of one number for each of the parameter


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """(tensors by `key.parameter-name`, JSON-able facts: the rule of every parameter). Tensors are not copies."""
    tensors, rules = {}, {}
    for name, weight, group in optimizer_parameters(optimizer):
        rules[name] = group["rule"]
        for key, value in optimizer.state.get(weight, {}).items():
            if value is not None:
                tensors[f"{key}.{name}"] = value
    return tensors, {"rules": rules}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], facts: dict) -> None:
    """Put back what `optimizer_state` gave. Raises UserError when another optimizer or model wrote it."""
    parameters = {name: (weight, group["rule"]) for name, weight, group in optimizer_parameters(optimizer)}
    rules = {name: rule for name, (_, rule) in parameters.items()}
    for name in sorted(rules.keys() | facts["rules"].keys()):
        ours, theirs = rules.get(name, "absent"), facts["rules"].get(name, "absent")
        if ours != theirs:
            raise UserError(f"optimizer state: '{name}' was {theirs} when saved and is {ours} now; keep optimizer.name")
    loaded: dict[Tensor, dict[str, Tensor]] = {}
    fused = {weight: group.get("fused") for _, weight, group in optimizer_parameters(optimizer)}
    for label, value in tensors.items():
        key, _, name = label.partition(".")
        if name not in parameters:
            raise UserError(f"optimizer state: '{label}' belongs to no parameter of this model")
        weight = parameters[name][0]
        if key in WHOLE and value.shape != weight.shape:  # the kernels that read it would not notice
            raise UserError(f"optimizer state: '{label}' is of shape {list(value.shape)}, and its parameter of {list(weight.shape)}")
        loaded.setdefault(weight, {})[key] = _placed(optimizer, weight, fused[weight], value)
    optimizer.state.clear()
    optimizer.state.update(loaded)


def _placed(optimizer: torch.optim.Optimizer, weight: Tensor, fused: bool | None, value: Tensor) -> Tensor:
    """A copy where the optimizer keeps it."""
    if isinstance(optimizer, Stored):
        dtype = optimizer.dtype or weight.dtype
        if value.ndim and value.dtype != dtype:
            raise UserError(f"optimizer state: it was saved as {value.dtype}, and optimizer.state_dtype asks for {dtype}; "
                            "keep optimizer.state_dtype")  # fmt: skip
        return optimizer.placed(value.clone(), weight.device)
    # step counts stay where torch keeps them: on the CPU, unless a fused kernel on another device reads them
    return value.to(weight.device if value.ndim or fused else value.device).clone()
