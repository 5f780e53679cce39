"""Muon: the momentum of each matrix, made orthogonal, is the step; AdamW serves what is not a hidden matrix.

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon): five Newton-Schulz steps, Nesterov momentum, steps
scaled by sqrt(max(1, out / in)), which suits its learning rate of 0.02; decay as in Liu et al. 2025 (arXiv 2502.16982).
Stacked experts [E, out, in] are E matrices; the fused gate_up_proj [E, 2F, D] holds 2E matrices of [F, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.training.optimizers.update import Update, account

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # chosen by Jordan for the steepest start, not for an exact limit
NEWTON_SCHULZ_STEPS = 5


def muon(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    *,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    parts: int = 1,
    dtype: torch.dtype | None = None,
) -> Update:
    """One Muon step: weight -= learning_rate * (weight_decay * weight + scale * orthogonal(blend)).

    buffer = momentum * buffer + (1 - momentum) * gradient; blend = the same mix of buffer and gradient (Nesterov), or
    the buffer. weight: [..., parts * out, in]. dtype: of the Newton-Schulz products; None: the weight's.
    state: {} or {"momentum_buffer"}. Terms: decay, descent.
    """
    buffer = state.get("momentum_buffer", torch.zeros_like(weight)).lerp(gradient, 1 - momentum)
    blend = gradient.lerp(buffer, momentum) if nesterov else buffer
    orthogonal = orthogonalize(blend, parts, dtype).to(weight.dtype)
    scale = shape_scale(weight, parts)
    decayed = weight * (1 - learning_rate * weight_decay) if weight_decay else weight
    terms = {
        "decay": -learning_rate * weight_decay * weight.double(),
        "descent": -learning_rate * scale * orthogonal.double(),
    }
    weight_after = decayed - (learning_rate * scale) * orthogonal
    state_after = {"momentum_buffer": buffer}
    return account(weight, weight_after, terms, state_after, buffer=buffer, blend=blend, direction=orthogonal * scale)


def orthogonalize(stack: Tensor, parts: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """Each matrix U S V^T of [..., parts * out, in] becomes about U V^T (singular values near 0.7 to 1.2).

    A matrix of zeros stays zero. Result in `dtype` (None: the input's).
    """
    matrices = stack.unflatten(-2, (parts, -1)).flatten(0, -3).to(dtype or stack.dtype)
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(stack.shape)


def shape_scale(weight: Tensor, parts: int = 1) -> float:
    """sqrt(max(1, out / in)): a step of the same effect on outputs, whatever the shape."""
    return max(1.0, weight.shape[-2] / parts / weight.shape[-1]) ** 0.5


class Muon(torch.optim.Optimizer):
    """The fast `muon` for `groups`, and torch's AdamW, already built, for the rest, as one optimizer.

    Groups hold lr, momentum, nesterov, weight_decay, dtype, and `parts`, one number per parameter. Matrices of one
    shape, in all layers, are stacked and go through Newton-Schulz together.
    """

    def __init__(self, groups: list[dict], rest: torch.optim.Optimizer, **defaults):
        super().__init__(groups, defaults)
        self.rest = rest
        # One list of groups and one state: whoever reads or changes them through either optimizer means both.
        self.muon_groups = list(self.param_groups)
        self.param_groups.extend(rest.param_groups)
        self.state = rest.state

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.muon_groups:
            for (_, parts), weights in _by_shape(group).items():
                self._step_stack(weights, parts, group)
        self.rest.step()

    def _step_stack(self, weights: list[Tensor], parts: int, group: dict) -> None:
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        muon_(weights, [weight.grad for weight in weights], buffers, parts, group)


def muon_(weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], parts: int, group: dict) -> None:
    """`muon` on several tensors of one shape at once, in place."""
    momentum, lr = group["momentum"], group["lr"]
    torch._foreach_lerp_(buffers, gradients, 1 - momentum)
    blends = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
    directions = orthogonalize(torch.stack(blends), parts, group["dtype"]).to(weights[0].dtype).unbind(0)
    if group["weight_decay"]:
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
    torch._foreach_add_(weights, list(directions), alpha=-lr * shape_scale(weights[0], parts))


def _by_shape(group: dict) -> dict[tuple[torch.Size, int], list[Tensor]]:
    stacks: dict[tuple[torch.Size, int], list[Tensor]] = {}
    for weight, parts in zip(group["params"], group["parts"], strict=True):
        if weight.grad is not None:
            stacks.setdefault((weight.shape, parts), []).append(weight)
    return stacks
