"""Losses and rules that keep all experts in use. Each loss takes one layer's Routing, or the list of all layers'.

mask_N (bool) marks real tokens: pads count in nothing. Losses are unweighted: the caller scales them.
Letters: N tokens, E experts, k experts per token; f_E share of choices, P_E mean router probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pellucid.model.moe import Routing
from pellucid.training.device import widest

Routings = Routing | Sequence[Routing]


def switch_loss(routings: Routings, mask_N: Tensor) -> Tensor:
    """E * Σ_e f_e P_e, mean over layers: 1 when balanced, E when one expert takes all.

    Fedus et al. 2022 (arXiv 2101.03961, equations 4 to 6), where f_e is the share of tokens sent to expert e; for
    top-k it is the share of the k * N choices, so that balance is 1 for any k. Gradients flow through P alone.
    """
    layers = _layers(routings)
    terms = [_share_E(layer, mask_N) @ _mean_probability_E(layer, mask_N) for layer in layers]
    return layers[0].probs_NE.shape[-1] * torch.stack(terms).mean()


def mixtral_loss(routings: Routings, mask_N: Tensor) -> Tensor:
    """E * Σ_e (choices of e per token) P_e, f and P first averaged over layers: k when balanced.

    The loss of Hugging Face's Mixtral (`load_balancing_loss_func`), after GShard (Lepikhin et al. 2020, arXiv
    2006.16668, algorithm 1). For one layer it is k times the Switch loss.
    """
    layers = _layers(routings)
    k, E = layers[0].expert_index_Nk.shape[-1], layers[0].probs_NE.shape[-1]
    f_E = torch.stack([_share_E(layer, mask_N) for layer in layers]).mean(dim=0) * k
    p_E = torch.stack([_mean_probability_E(layer, mask_N) for layer in layers]).mean(dim=0)
    return E * (f_E @ p_E)


def router_z_loss(routings: Routings, mask_N: Tensor) -> Tensor:
    """Mean over tokens and layers of logsumexp(router logits)²: keeps the router's logits small.

    ST-MoE (Zoph et al. 2022, arXiv 2202.08906, equation 5).
    """
    squares = [torch.where(mask_N, layer.logits_NE.logsumexp(dim=-1), 0.0).square() for layer in _layers(routings)]
    return torch.stack([square.sum() for square in squares]).mean() / mask_N.sum().clamp(min=1)


BALANCE_LOSSES: dict[str, Callable[[Routings, Tensor], Tensor]] = {"switch": switch_loss, "mixtral": mixtral_loss}


def expert_load(routing: Routing, mask_N: Tensor) -> Tensor:
    """load_E (int64): how many real tokens chose each expert; sums to k times the real tokens."""
    experts_E = torch.arange(routing.probs_NE.shape[-1], device=mask_N.device)
    chosen_NkE = routing.expert_index_Nk.unsqueeze(-1) == experts_E
    return (chosen_NkE & mask_N[:, None, None]).sum(dim=(0, 1))


@torch.no_grad()
def update_balance_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """bias += rate * sign(mean load - load), in place: overloaded experts are chosen less. Returns bias.

    Auxiliary-loss-free balancing: Wang et al. 2024 (arXiv 2408.15664, algorithm 1), DeepSeek-V3 (2412.19437, 2.1.2).
    load_E: of the whole step, over all micro-batches and devices.
    """
    load_E = load_E.to(widest(load_E.device))
    return bias_E.add_(rate * torch.sign(load_E.mean() - load_E).to(bias_E))


def _layers(routings: Routings) -> Sequence[Routing]:
    return [routings] if isinstance(routings, Routing) else routings


def _share_E(routing: Routing, mask_N: Tensor) -> Tensor:
    """f_E: sums to 1 (to 0 when every token is a pad)."""
    choices = (mask_N.sum() * routing.expert_index_Nk.shape[-1]).clamp(min=1)
    return expert_load(routing, mask_N).to(routing.probs_NE.dtype) / choices


def _mean_probability_E(routing: Routing, mask_N: Tensor) -> Tensor:
    real = torch.where(mask_N.unsqueeze(-1), routing.probs_NE, 0.0)
    return real.sum(dim=0) / mask_N.sum().clamp(min=1)
