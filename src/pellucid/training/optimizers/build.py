"""From a model and its OptimizerConfig to the fast optimizer, and from that optimizer back to the plain rules.

Every parameter group holds, beside torch's own keys: `names` (aligned with `params`), `rule` (a key of RULES) and
`base_learning_rate` (the peak, which the schedule scales). Decay applies to the matrices of attention and experts,
not to norms, embedding, head and routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from pellucid.config import OptimizerConfig, UserError
from pellucid.model.kernels import gpu
from pellucid.training.optimizers.adafactor import BETA2_DECAY, LARGEST_RMS, SMALLEST_SCALE, adafactor
from pellucid.training.optimizers.adam import adam, adamw
from pellucid.training.optimizers.lion import Lion, lion
from pellucid.training.optimizers.muon import Muon, muon
from pellucid.training.optimizers.sgd import sgd
from pellucid.training.optimizers.stored import Stored
from pellucid.training.optimizers.update import Update

RULES: dict[str, Callable[..., Update]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def build_optimizer(model: nn.Module, config: OptimizerConfig, seed: int = 0) -> torch.optim.Optimizer:
    """The fast optimizer over all parameters of the model that require a gradient. seed: of rounded moments (see stored.py)."""
    if config.state_dtype == "fp32" and not config.offload:
        return _ordinary(model, config)
    dtype = torch.bfloat16 if config.state_dtype == "bf16" else None
    groups = _ordinary(model, config, in_one_pass=False).param_groups
    return Stored(groups, dtype=dtype, offload=config.offload, seed=seed)


def _ordinary(model: nn.Module, config: OptimizerConfig, in_one_pass: bool = True) -> torch.optim.Optimizer:
    """in_one_pass: whether a kernel of our own may do Adam's update."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [(name, weight) for name, weight in named if is_hidden_matrix(name, weight)]
    others = [(name, weight) for name, weight in named if not is_hidden_matrix(name, weight)]
    if config.name == "muon":
        rest = _adam_family("adamw", [_group("adamw", others, config.learning_rate, 0.0)], config, others)
        group = _group("muon", matrices, config.muon_learning_rate, config.weight_decay)
        group["parts"] = [2 if name.endswith("gate_up_proj") else 1 for name, _ in matrices]
        # bf16 products are what Jordan uses on GPUs; on a CPU they would be slower, and less exact.
        group["dtype"] = torch.bfloat16 if matrices and matrices[0][1].device.type == "cuda" else None
        return Muon([group], rest, lr=config.muon_learning_rate, momentum=config.momentum, nesterov=config.nesterov)
    groups = [
        _group(config.name, matrices, config.learning_rate, config.weight_decay),
        _group(config.name, others, config.learning_rate, 0.0),
    ]
    groups = [group for group in groups if group["params"]]
    if config.name in ("adam", "adamw"):
        if in_one_pass and named and gpu.fits("update", *(weight for _, weight in named)):
            from pellucid.training.optimizers.one_pass import OnePassAdam  # triton is not everywhere

            return OnePassAdam(groups, betas=(config.beta1, config.beta2), eps=config.eps)
        return _adam_family(config.name, groups, config, named)
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, fused=_fused(named))
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, beta2_decay=BETA2_DECAY, eps=(None, SMALLEST_SCALE), d=LARGEST_RMS)
    return Lion(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.0)


def is_hidden_matrix(name: str, weight: Tensor) -> bool:
    """Matrices of attention and experts: what decays, and what Muon makes orthogonal."""
    return weight.ndim >= 2 and name not in ("embedding.weight", "score.weight") and not name.endswith("router.weight")


def _group(rule: str, named: list[tuple[str, Tensor]], learning_rate: float, weight_decay: float) -> dict:
    return {
        "params": [weight for _, weight in named],
        "names": [name for name, _ in named],
        "rule": rule,
        "lr": learning_rate,
        "base_learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }


def _adam_family(name, groups, config: OptimizerConfig, named) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=_fused(named))


def _fused(named: list[tuple[str, Tensor]]) -> bool | None:
    """One kernel per step where torch has it; None lets torch choose."""
    return True if all(weight.device.type in FUSED_DEVICES for _, weight in named) else None


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate becomes its peak times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_learning_rate"] * factor


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, dict]]:
    """(name, parameter, its group) of everything the optimizer updates."""
    for group in optimizer.param_groups:
        for name, weight in zip(group["names"], group["params"], strict=True):
            yield name, weight, group


def update_settings(group: dict, name: str) -> dict:
    """The keyword arguments of the plain rule for one parameter of a group. All but Muon's dtype are JSON values."""
    settings = {"learning_rate": group["lr"], "weight_decay": group["weight_decay"]}
    rule = group["rule"]
    if rule in ("adam", "adamw", "lion"):
        settings["beta1"], settings["beta2"] = group["betas"]
    if rule in ("adam", "adamw"):
        settings["eps"] = group["eps"]
    if rule in ("sgd", "muon"):
        settings |= {"momentum": group["momentum"], "nesterov": group["nesterov"]}
    if rule == "muon":
        settings |= {"parts": group["parts"][group["names"].index(name)], "dtype": group["dtype"]}
    return settings


@torch.no_grad()
def explain_update(
    optimizer: torch.optim.Optimizer, name: str, gradient: Tensor | None = None, idle_E: Tensor | None = None
) -> Update:
    """What the next `optimizer.step()` will do to one parameter, by its plain rule; nothing is changed.

    gradient: None takes the parameter's own (already clipped). idle_E: bool mask of experts without a token.
    Raises UserError for an unknown name, or when there is no gradient.
    """
    found = [(weight, group) for known, weight, group in optimizer_parameters(optimizer) if known == name]
    if not found:
        raise UserError(f"the optimizer updates no parameter called '{name}'")
    weight, group = found[0]
    gradient = weight.grad if gradient is None else gradient
    if gradient is None:
        raise UserError(f"'{name}' has no gradient: run a backward pass before explaining its update")
    # A count of steps stays as it is; moments come from wherever, and as whatever, they are stored.
    full = lambda value: value.to(weight.device, weight.dtype, copy=True) if value.ndim else value.clone()
    held = {key: value for key, value in optimizer.state.get(weight, {}).items() if value is not None}
    state = {key: full(value) for key, value in held.items()}
    update = RULES[group["rule"]](weight.detach().clone(), gradient, state, **update_settings(group, name))
    if isinstance(optimizer, Stored):
        update = replace(update, state=optimizer.as_stored(name, update.state, int(state.get("step", 0)) + 1))
        state = {key: value.to(update.state[key].dtype) for key, value in state.items()}
    return update if idle_E is None else update.freeze(idle_E, state)
