"""Mixture of experts: a router picks k of E experts for each token; their outputs are summed with the router's weights.

Source: xai-org/grok-1 model.py (`Router`, `MoELayer`). Softmax over all experts, then top-k, not renormalised; ties go
to the lower index; no noise, no capacity: no token is dropped. Tokens are sorted by expert, so that each expert
computes once, on its own tokens only. Letters: N = B*T tokens, D hidden, E experts, k per token, F intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.config import ModelConfig
from pellucid.model.kernels import experts, gpu
from pellucid.model.kernels.grouped import grouped_linear
from pellucid.model.kernels.products import linear


@dataclass
class Routing:
    """What one layer's router decided; all tokens, pads included (mask them before counting)."""

    logits_NE: Tensor  # fp32
    probs_NE: Tensor  # fp32, softmax over all experts
    expert_index_Nk: Tensor  # int64, best first
    gate_Nk: Tensor  # fp32, probability of each chosen expert: not renormalised


class Router(nn.Module):
    """fp32 scores of every expert for every token; weight [E, D]."""

    def __init__(self, config: ModelConfig, device=None):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(config.num_experts, config.hidden_size, device=device, dtype=torch.float32)
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        weight = self.weight.float()  # already, unless the whole model was moved to another dtype
        if gpu.fits("scores", x_ND, weight):
            from pellucid.model.kernels.gpu.router import router_scores

            return router_scores(x_ND, weight)
        return F.linear(x_ND.float(), weight)


class MoE(nn.Module):
    """Router and stacked experts: down(gelu_tanh(gate(x)) * up(x)), GeGLU of Shazeer 2020 with tanh GELU.

    gate_up_proj [E, 2F, D] holds gate in rows 0..F and up in rows F..2F; down_proj [E, D, F].
    `balance_bias` [E] shifts the choice of experts only, never their weights (DeepSeek-V3, 2024); zero is exact Grok-1.
    """

    def __init__(self, config: ModelConfig, device=None, dtype=None):
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        E, D, size = config.num_experts, config.hidden_size, config.intermediate_size
        self.router = Router(config, device)
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * size, D, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(E, D, size, device=device, dtype=dtype))
        self.register_buffer("balance_bias", torch.zeros(E, device=device, dtype=torch.float32))

    def route(self, x_ND: Tensor) -> Routing:
        logits = self.router(x_ND)
        if gpu.fits("routing", logits):
            from pellucid.model.kernels.gpu.routing import route

            return Routing(logits, *route(logits, self.balance_bias, self.experts_per_token))
        probs = torch.softmax(logits, dim=-1)
        # A stable sort, because topk promises no order among equals and the official rule is: lower index first.
        ranking = torch.sort(probs + self.balance_bias, dim=-1, descending=True, stable=True).indices
        chosen = ranking[:, : self.experts_per_token]
        return Routing(logits, probs, chosen, probs.gather(-1, chosen))

    def forward(self, x_BTD: Tensor, parity: bool = False) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.route(x_ND)
        fused = None if parity else _fused(x_ND, self.gate_up_proj, self.down_proj)
        if len(x_ND) == 1 and not torch.is_grad_enabled():
            mixed = self.mix_one(x_ND, routing, parity)
        elif fused is not None:
            mixed = fused(x_ND, routing.gate_Nk, routing.expert_index_Nk, self.gate_up_proj, self.down_proj)
        else:
            mixed = self.mix_plain(x_ND, routing, parity)
        return mixed.view_as(x_BTD), routing

    def mix_one(self, x_1D: Tensor, routing: Routing, parity: bool = False) -> Tensor:
        """`mix_plain` of a single token, as in decoding, where sorting would cost more than the products."""
        mixed_1D = x_1D.new_zeros(x_1D.shape, dtype=torch.float32)
        for choice, e in enumerate(routing.expert_index_Nk[0].tolist()):
            gate_up = linear(x_1D, self.gate_up_proj[e])
            gate, up = (gate_up.float() if parity else gate_up).chunk(2, dim=-1)
            output = linear(F.gelu(gate, approximate="tanh") * up, self.down_proj[e])
            mixed_1D.addcmul_(output, routing.gate_Nk[:, choice : choice + 1])
        return mixed_1D.to(x_1D.dtype)

    def mix_plain(self, x_ND: Tensor, routing: Routing, parity: bool = False) -> Tensor:
        """The experts' outputs for each token, weighted by its gates; [N, D]. The definition, and any device's way."""
        k = self.experts_per_token
        order = torch.sort(routing.expert_index_Nk.reshape(-1), stable=True).indices  # (token, choice) pairs by expert
        tokens_E = torch.bincount(routing.expert_index_Nk.reshape(-1), minlength=self.down_proj.shape[0])

        gate_up = grouped_linear(x_ND.index_select(0, order // k), self.gate_up_proj.to(x_ND.dtype), tokens_E)
        if parity:  # the official bf16 run rounds gate and up, then stays in fp32 to the end of the layer
            gate_up = gate_up.float()
        gate, up = gate_up.chunk(2, dim=-1)
        inner = F.gelu(gate, approximate="tanh") * up
        outputs = grouped_linear(inner, self.down_proj.to(inner.dtype), tokens_E)

        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        per_choice = outputs.index_select(0, back).view(-1, k, x_ND.shape[-1])
        return (per_choice.float() * routing.gate_Nk.unsqueeze(-1)).sum(dim=1).to(x_ND.dtype)


def _fused(x_ND: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Callable[..., Tensor] | None:
    """A kernel that does what `MoE.mix_plain` does, if one serves these tensors."""
    if gpu.fits("experts", x_ND, gate_up_proj, down_proj) and gpu.rows_fit(x_ND.dtype, *down_proj.shape[1:]):
        from pellucid.model.kernels.gpu.experts import experts as kernel

        return kernel
    return experts.fused_experts if experts.fits(x_ND, gate_up_proj, down_proj) else None
