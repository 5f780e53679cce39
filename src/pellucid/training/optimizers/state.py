"""Optimizer state as named tensors, for checkpoints: `exp_avg.layers.0.moe.down_proj` and the like.

Settings (learning rates, betas) are not state: they come from the configuration when a run is resumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.config import UserError
from pellucid.training.optimizers.build import optimizer_parameters


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
    for label, value in tensors.items():
        key, _, name = label.partition(".")
        if name not in parameters:
            raise UserError(f"optimizer state: '{label}' belongs to no parameter of this model")
        weight = parameters[name][0]
        # step counts stay where torch keeps them: on the CPU, unless a fused kernel on another device reads them
        fused = next(group for _, w, group in optimizer_parameters(optimizer) if w is weight).get("fused")
        device = weight.device if value.ndim or fused else value.device
        loaded.setdefault(weight, {})[key] = value.to(device).clone()
    optimizer.state.clear()
    optimizer.state.update(loaded)
