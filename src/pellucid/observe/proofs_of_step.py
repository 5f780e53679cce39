"""Every weight that a play shows, with its update and three proofs: chain rule, finite difference, the rule's own result.

The proofs of proofs.py, for many weights of one step at once: one forward and backward pass in fp32 serves them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pellucid.observe.proofs import chain_rule, finite_difference, fixed_choices, gradients_of, independent_tokens, objective
from pellucid.observe.replay import Replay
from pellucid.training.optimizers import Update
from pellucid.training.step import count_predictions


@dataclass
class Edge:
    """One weight: its place, what the step did to it, and what proves it. gradient: of the whole step, before clipping."""

    tensor: str
    index: tuple[int, ...]
    rank: int = 99  # place in the followed token's sum; 99: in none
    gradient: float = 0.0
    clipped: float = 0.0
    before: float = 0.0
    after: float = 0.0
    rule_after: float = 0.0  # what the plain rule gives
    state: dict[str, float] = field(default_factory=dict)
    quantities: dict[str, float] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)  # rounding is the last
    autograd: float | None = None  # in fp32
    by_hand: float | None = None  # the chain rule over all tokens, in float64
    difference: float | None = None  # finite difference, and how sure it is
    doubt: float | None = None

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        return self.tensor, self.index

    def take(self, update: Update, settled: Update, n: int) -> None:
        """update, settled: of this tensor's edges alone, of which this is number n."""
        at = lambda tensor: (tensor if tensor.ndim == 0 else tensor[n]).item()
        self.before, self.after, self.rule_after = at(update.weight), at(settled.weight_after), at(update.weight_after)
        self.state = {name: at(value) for name, value in update.state.items()}
        self.quantities = {name: at(value) for name, value in update.quantities.items()}
        self.terms = {name: at(term) for name, term in settled.terms.items()} | {"rounding": at(settled.rounding)}

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "index": list(self.index), "exact": self.after == self.rule_after}


def prove_edges(
    replay: Replay, batches: list[Any], edges: list[Edge], tell: Callable[[str, int, int], None], seconds: float,
) -> None:  # fmt: skip
    """From the state before the step, in fp32 whatever the run's precision: fills autograd, by_hand, difference, doubt.

    Finite differences are taken for the followed token's weights only, largest terms first, as many as `seconds` allow.
    """
    model, settings = replay.model, replay.config.training
    dtype, parity = model.compute_dtype, model.parity
    model.compute_dtype, model.parity = torch.float32, False
    names = dict.fromkeys(edge.tensor for edge in edges)
    tokens = count_predictions(batches, settings)
    rules = {name: chain_rule(model, name, settings, batches, tokens) for name in names}
    parameters = dict(model.named_parameters())
    try:
        with fixed_choices(model) as rewind:
            gradients_of(model, batches, settings)
            for rule in rules.values():
                rule.close()
            for name, rule in rules.items():
                mine = [edge for edge in edges if edge.tensor == name]
                for edge, by_hand in zip(mine, rule.elements([edge.index for edge in mine]), strict=True):
                    edge.autograd, edge.by_hand = parameters[name].grad[edge.index].item(), by_hand
            model.zero_grad(set_to_none=True)

            def again() -> float:
                rewind()
                return objective(model, batches, settings)

            _differences(edges, parameters, again, independent_tokens(batches, tokens), tell, seconds)
    finally:
        model.compute_dtype, model.parity = dtype, parity


def _differences(
    edges: list[Edge], parameters: dict[str, Tensor], objective: Callable[[], float], tokens: float, tell, seconds: float,
) -> None:  # fmt: skip
    wanted = sorted((edge for edge in edges if edge.rank < 99), key=lambda edge: edge.rank)
    began = time.perf_counter()
    for done, edge in enumerate(wanted):
        if time.perf_counter() - began > seconds:
            break
        weight = parameters[edge.tensor]
        own = weight.detach()[edge.index[0]] if len(edge.index) == 3 else weight.detach()
        size = 0.2 * own.double().square().mean().sqrt().item()
        one = torch.zeros_like(weight)
        one[edge.index] = 1.0
        edge.difference, edge.doubt = finite_difference(objective, weight, one, size, tokens)
        tell("proving", done + 1, len(wanted))
