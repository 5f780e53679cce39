"""Adam and AdamW on a GPU: one pass over each tensor clips, updates and writes what the next step's products read."""

from __future__ import annotations

import torch

from pellucid.model.kernels.gpu.copies import copy_is_written, copy_to_write
from pellucid.model.kernels.gpu.update import adam_


class OnePassAdam(torch.optim.Optimizer):
    """State as torch's have it, `step` on the host. `gradient_factor` is what the next step multiplies gradients by (see step.py)."""

    gradient_factor = 1.0

    def __init__(self, groups: list[dict], *, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        own = [(weight, group) for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        for weight, group in sorted(own, key=lambda pair: -pair[0].numel()):  # while it does the large, the small are launched
            state, (beta1, beta2), decay = self._state_of(weight), group["betas"], group["weight_decay"]
            state["step"] = state["step"].cpu() + 1
            copy, decoupled = copy_to_write(weight), group["rule"] == "adamw"
            adam_(weight, weight.grad, state["exp_avg"], state["exp_avg_sq"], copy, clip=self.gradient_factor,
                  step=int(state["step"]), learning_rate=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                  decay=decay if decoupled else 0.0, l2=0.0 if decoupled else decay)  # fmt: skip
            if copy is not None:
                copy_is_written(weight)
        self.gradient_factor = 1.0

    def _state_of(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state
