"""Lion: every coordinate moves by exactly the learning rate, in the direction of the sign of a blended momentum.

Source: Chen et al. 2023 (arXiv 2302.06675, algorithm 2). Its authors advise a learning rate 3 to 10 times smaller than
AdamW's, and a decay as much larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.training.optimizers.update import Update, account


def lion(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> Update:
    """One Lion step: weight -= learning_rate * (weight_decay * weight + sign(beta1 * m + (1 - beta1) * gradient)).

    Then m = beta2 * m + (1 - beta2) * gradient. state: {} or {"exp_avg" (m)}. Terms: decay, descent.
    """
    before = state.get("exp_avg", torch.zeros_like(weight))
    blend = before.lerp(gradient, 1 - beta1)
    direction = blend.sign()
    m = before.lerp(gradient, 1 - beta2)
    decayed = weight * (1 - learning_rate * weight_decay) if weight_decay else weight
    terms = {
        "decay": -learning_rate * weight_decay * weight.double(),
        "descent": -learning_rate * direction.double(),
    }
    weight_after = decayed - learning_rate * direction
    return account(weight, weight_after, terms, {"exp_avg": m}, m=m, blend=blend, direction=direction)


class Lion(torch.optim.Optimizer):
    """The fast `lion`: one pass over all tensors of a group. Groups hold lr, betas, weight_decay."""

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if "exp_avg" not in self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
            lion_(weights, [weight.grad for weight in weights], [self.state[weight]["exp_avg"] for weight in weights], group)


def lion_(weights: list[Tensor], gradients: list[Tensor], moments: list[Tensor], group: dict) -> None:
    """`lion` on several tensors at once, in place."""
    if not weights:
        return
    beta1, beta2 = group["betas"]
    blends = torch._foreach_lerp(moments, gradients, 1 - beta1)
    torch._foreach_sign_(blends)
    torch._foreach_lerp_(moments, gradients, 1 - beta2)
    if group["weight_decay"]:
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(weights, blends, alpha=-group["lr"])
