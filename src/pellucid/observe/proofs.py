"""Is the gradient right? Two independent answers for one element: the chain rule by hand, and a finite difference.

By hand: what went into a layer and what came back to it are caught, and multiplied in float64 as the formulas say:
linear maps (Rumelhart et al. 1986), RMSNorm's scale, the gated experts of Grok-1, and the embedding, used at both ends.
Letters: N tokens, D hidden, F intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.config import TrainingConfig
from pellucid.model.grok import Grok1
from pellucid.model.layers import RMSNorm
from pellucid.model.moe import MoE, Routing
from pellucid.observe.observer import SilentObserver
from pellucid.training.losses import IGNORE
from pellucid.training.step import StepResult, count_predictions, forward

FLOAT32_NOISE = 2.5e-7  # of one token's loss, relative: some units in the last place
MOST_SIZES, SURE = 5, 1e-4  # of finite differences


def chain_rule(model: Grok1, name: str, settings: TrainingConfig, batches: list[Any], tokens: int) -> ChainRule | TiedRule:
    """The rule for one parameter, on its watch from now until `close`; tokens: how many the loss is a mean over."""
    return TiedRule(model, settings, batches, tokens) if name == "embedding.weight" else ChainRule(model, name)


class ChainRule:
    """Catches the inputs and the returning gradients of the module that owns a parameter; `elements` multiplies them."""

    def __init__(self, model: Grok1, name: str):
        owner, _, self.leaf = name.rpartition(".")
        self.module = model.get_submodule(owner)
        self.caught: list[dict[str, Any]] = []  # one per forward pass
        self.hook = self.module.register_forward_hook(self._catch)

    def _catch(self, module, inputs, output) -> None:
        record: dict[str, Any] = {"x": inputs[0].detach()}
        tensor = output
        if isinstance(output, tuple):
            tensor, record["routing"] = output
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: record.update(slope=gradient.detach()))
            self.caught.append(record)

    def close(self) -> None:
        self.hook.remove()

    def elements(self, indices: list[tuple[int, ...]]) -> list[float]:
        """d loss / d weight[index] of each index, in float64, summed over the forward passes."""
        totals = dict.fromkeys(indices, 0.0)
        for record in self.caught:
            for index, value in self._of(record, totals):
                totals[index] += value
        return [totals[index] for index in indices]

    def _of(self, record: dict[str, Any], indices: Iterable[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], float]]:
        x = record["x"].double().reshape(-1, record["x"].shape[-1])
        slope = record["slope"].double().reshape(len(x), -1)
        if isinstance(self.module, MoE):
            for e, own in groupby(sorted(indices), key=lambda index: index[0]):
                yield from self._expert(x, slope, record["routing"], e, own)
        elif isinstance(self.module, RMSNorm):
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.module.eps)
            yield from ((index, (slope[:, index[0]] @ x[:, index[0]]).item()) for index in indices)
        else:
            yield from ((index, (slope[:, index[0]] @ x[:, index[1]]).item()) for index in indices)

    def _expert(self, x: Tensor, slope: Tensor, routing: Any, e: int, indices: Iterable[tuple[int, ...]]):
        token, choice = (routing.expert_index_Nk == e).nonzero(as_tuple=True)
        x, weight = x[token], routing.gate_Nk.detach()[token, choice].double()
        gate_up, down = self.module.gate_up_proj[e].detach().double(), self.module.down_proj[e].detach().double()
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        returning = slope[token] * weight[:, None]  # to this expert's output
        size, inner = down.shape[1], returning @ down
        for index in indices:
            _, i, j = index
            if self.leaf == "down_proj":
                into, other = returning[:, i], F.gelu(gate[:, j], approximate="tanh") * up[:, j]
            elif i >= size:
                into, other = inner[:, i - size] * F.gelu(gate[:, i - size], approximate="tanh"), x[:, j]
            else:
                into, other = inner[:, i] * up[:, i] * _gelu_slope(gate[:, i]), x[:, j]
            yield index, (into @ other).item()


class TiedRule:
    """The chain rule for the embedding table, used at both ends: rows in, scores out (unless the model has a head of its own)."""

    def __init__(self, model: Grok1, settings: TrainingConfig, batches: list[Any], tokens: int):
        self.model, self.settings, self.batches, self.tokens = model, settings, batches, tokens
        self.caught: list[dict[str, Tensor]] = []
        self.hooks = [model.embedding.register_forward_hook(self._input),
                      model.final_norm.register_forward_hook(lambda m, i, out: self.caught[-1].update(h=out.detach()))]  # fmt: skip

    def _input(self, module, inputs, output) -> None:
        record = {"tokens": inputs[0]}
        self.caught.append(record)
        if output.requires_grad:
            output.register_hook(lambda gradient: record.update(slope=gradient.detach()))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def elements(self, indices: list[tuple[int, ...]]) -> list[float]:
        """d loss / d weight[index] of each index, in float64, summed over the forward passes."""
        return [self._element(*index) for index in indices]

    def _element(self, v: int, d: int) -> float:
        total = 0.0
        for record, batch in zip(self.caught, self.batches, strict=True):
            total += record["slope"][record["tokens"] == v][:, d].double().sum().item()
            if self.model.config.head is None:
                total += self._of_scores(record, batch.targets_BT, v, d)
        return total

    def _of_scores(self, record: dict[str, Tensor], targets: Tensor, v: int, d: int) -> float:
        if "normalizer" not in record:
            record["normalizer"] = self.model.logits(record["h"]).logsumexp(-1).double()
        scale, normalizer = self.model.config.output_multiplier_scale, record["normalizer"]
        score = (record["h"].double() @ self.model.embedding.weight[v].double()) * scale
        slope = (1 + 2 * self.settings.z_loss * normalizer) * (score - normalizer).exp() - (targets == v).double()
        slope = torch.where(targets != IGNORE, slope, 0.0) * scale / self.tokens
        return (slope * record["h"][..., d].double()).sum().item()


def _gelu_slope(z: Tensor) -> Tensor:
    """Derivative of 0.5 z (1 + tanh(a (z + b z^3))), a = sqrt(2/pi), b = 0.044715 (Hendrycks & Gimpel 2016)."""
    a, b = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(a * (z + b * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * a * (1 + 3 * b * z * z)


def gradients_of(model: Grok1, batches: list[Any], settings: TrainingConfig) -> None:
    """Leaves the step's whole gradient, before clipping, in the parameters."""
    model.zero_grad(set_to_none=True)
    result = StepResult(predictions=count_predictions(batches, settings))
    for batch in batches:
        forward(model, batch, settings, result, _NoClock(), SilentObserver()).backward()


@torch.no_grad()
def objective(model: Grok1, batches: list[Any], settings: TrainingConfig) -> float:
    """What the step minimises, summed in float64 where the parts allow."""
    result = StepResult(predictions=count_predictions(batches, settings))
    for batch in batches:
        forward(model, batch, settings, result, _NoClock(), SilentObserver())
    result.settle()
    balance = settings.balance_loss_weight * result.balance_loss if settings.balance_loss != "none" else 0.0
    return result.loss + result.z_loss + balance + settings.router_z_loss * result.router_z_loss


def independent_tokens(batches: list[Any], predictions: int) -> float:
    """How many of a step's predictions round independently: where the same token follows the same three they round alike.

    (sum c)^2 / sum c^2 over the counts c of such places (Kish 1965). Labels are one to a document: all of them.
    """
    if batches[0].labels_BTK is not None:
        return predictions
    four = lambda b: torch.stack([b.tokens_BT.roll(2, 1), b.tokens_BT.roll(1, 1), b.tokens_BT, b.targets_BT])
    places = [four(batch)[:, batch.targets_BT != IGNORE] for batch in batches]
    counts = torch.cat(places, dim=1).unique(dim=1, return_counts=True)[1].double()
    return counts.sum().square().item() / max(1.0, counts.square().sum().item())


class _NoClock:
    def lap(self, phase: str) -> None: ...


@contextmanager
def fixed_choices(model: Grok1) -> Iterator[Callable[[], None]]:
    """Within, every token keeps the experts chosen in the first pass; call what is yielded before each later pass.

    The loss jumps where a token changes experts, and the gradient (by design of top-k routing) knows nothing of jumps.
    """
    chosen: list[Tensor] = []
    turn = [0, False]  # place in `chosen`; whether we are replaying

    def rewind() -> None:
        turn[:] = [0, True]

    def wrap(moe: MoE):
        def route(x_ND: Tensor) -> Routing:
            routing = MoE.route(moe, x_ND)
            if not turn[1]:
                chosen.append(routing.expert_index_Nk)
                return routing
            index = chosen[turn[0]]
            turn[0] += 1
            return Routing(routing.logits_NE, routing.probs_NE, index, routing.probs_NE.gather(-1, index))

        return route

    for layer in model.layers:
        layer.moe.route = wrap(layer.moe)
    try:
        yield rewind
    finally:
        for layer in model.layers:
            del layer.moe.route


@torch.no_grad()
def finite_difference(
    objective: Callable[[], float], weight: Tensor, direction: Tensor, size: float, tokens: float,
) -> tuple[float, float]:  # fmt: skip
    """(slope of the objective along `direction`, its uncertainty), by Richardson's rule; the weight is put back as it was.

    direction has the weight's shape; tokens: as `independent_tokens` counts them, their roundings partly cancel. Steps begin at
    `size` and shrink while that makes the answer surer (Ridders 1982): large ones suffer from curvature, small ones from rounding.
    """
    kept = weight.detach().clone()
    noise = FLOAT32_NOISE / math.sqrt(tokens) * max(1.0, abs(objective()))  # a small loss is what is left of scores of size one

    def central(step: float) -> float:
        values = []
        for sign in (1, -1):
            weight.copy_((kept.double() + sign * step * direction.double()).to(kept.dtype))
            values.append((objective(), ((weight.double() - kept.double()) * direction.double()).sum().item()))
        (up, high), (down, low) = values  # where rounding put the weights, not where we aimed
        return (up - down) / ((high - low) / direction.double().square().sum().item())

    found = []
    try:
        while len(found) < MOST_SIZES:
            coarse, fine = central(size), central(size / 2)
            best = (4 * fine - coarse) / 3
            found.append((abs(best - fine) + noise / size, best))
            surest = min(found)
            if surest[0] <= SURE * abs(surest[1]) or surest is not found[-1]:
                break
            size /= 4
    finally:
        weight.copy_(kept)
    doubt, best = min(found)
    return best, doubt
