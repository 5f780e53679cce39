"""One training step, the heart of picture 1: forward pass -> loss -> backward pass -> clipping -> parameter update.

A batch may come in micro-batches: each is weighted by its share of the step's predictions (tokens, or labelled
documents), so that their gradients add up to those of one big batch. (The balance losses, weighted alike, are not linear
in the tokens: they balance each micro-batch.)
What is predicted, and its loss, is the task's (see tasks.py); all else is the same for every task.
A step whose loss or gradient is not finite changes nothing. Letters: N tokens, L layers, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pellucid.config import TrainingConfig
from pellucid.model.grok import Grok1
from pellucid.training.balance import BALANCE_LOSSES, expert_load, router_z_loss, update_balance_bias
from pellucid.training.device import widest
from pellucid.training.losses import IGNORE
from pellucid.training.optimizers import frozen_idle_experts, set_learning_rate
from pellucid.training.tasks import TASKS


@dataclass
class StepResult:
    """What one step did. The loss is the mean over its predictions: tokens in nats, or documents (see tasks.py)."""

    loss: float = math.nan  # the task's alone; not known before `settle`
    balance_loss: float = 0.0  # unweighted
    router_z_loss: float = 0.0  # unweighted
    z_loss: float = 0.0  # weighted
    grad_norm: float = 0.0  # global, before clipping
    clip_factor: float = 1.0
    learning_rate: float = 0.0  # of the first parameter group
    tokens: int = 0  # real ones, read
    predictions: int = 0  # of language modelling: tokens
    applied: bool = True  # False: loss or gradient was not finite, nothing changed
    load_LE: Tensor | None = None  # tokens per layer and expert, pads left out
    data_seconds: float | None = None  # until the batch was on the device: the loop's to say
    clock: Stopwatch | None = None
    waiting: list[dict[str, Tensor]] = field(default_factory=list, repr=False)  # losses of micro-batches, still on the device

    def settle(self) -> None:
        """Sum what is waiting into the fields it belongs to. On a GPU this waits for it, so it is best done late."""
        for name in self.waiting[0]:
            setattr(self, name, sum(found[name].item() for found in self.waiting))
        self.waiting.clear()


def training_step(
    model: Grok1,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Any],
    settings: TrainingConfig,
    learning_rate_factor: float,
    observer: Any,
) -> StepResult:
    """Train on the micro-batches of one step (see data.dataset.Batch; tensors on the model's device)."""
    clock = Stopwatch(model.embedding.weight.device)
    result = StepResult(clock=clock)
    result.tokens = sum(int((batch.targets_BT != IGNORE).sum()) for batch in micro_batches)
    result.predictions = count_predictions(micro_batches, settings)
    set_learning_rate(optimizer, learning_rate_factor)
    result.learning_rate = optimizer.param_groups[0]["lr"]
    optimizer.zero_grad(set_to_none=True)

    for batch in micro_batches:
        total = forward(model, batch, settings, result, clock, observer)  # forward pass, loss
        total.backward()  # backward pass
        clock.lap("backward")
        observer.after_backward(batch)
        clock.lap("observe")
    result.settle()  # not before: the GPU would idle until the backward pass is launched
    gradient_norm = clip_gradients(model, optimizer, settings.gradient_clip, result, in_place=observer.reads_gradients())
    clock.lap("clip")

    result.applied = math.isfinite(result.loss) and bool(torch.isfinite(gradient_norm))
    observer.before_update(result)
    clock.lap("observe")
    if result.applied:
        with frozen_idle_experts(optimizer, idle_experts(result.load_LE.cpu())):
            optimizer.step()  # parameter update
        if settings.balance_bias_rate:
            for layer, load_E in zip(model.layers, result.load_LE, strict=True):
                update_balance_bias(layer.moe.balance_bias, load_E, settings.balance_bias_rate)
    clock.lap("update")
    observer.after_update(result)
    clock.lap("observe")
    return result


def forward(model: Grok1, batch: Any, settings: TrainingConfig, result: StepResult, clock, observer) -> Tensor:
    """Predict what the task asks of a micro-batch; returns what to minimise, its share of the step's mean.

    Its losses wait in the result for `settle`.
    """
    hidden_BTD, routings = model.hidden_states(
        batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT
    )
    clock.lap("forward")
    loss = TASKS[settings.task].loss(model, hidden_BTD, batch, settings)
    real_N = batch.targets_BT.reshape(-1) != IGNORE
    share = loss.count / max(1, result.predictions)
    total = loss.total / max(1, result.predictions)
    sums = {"loss": loss.per_token_N.sum(dtype=widest(total.device)), "z_loss": loss.z_loss}
    found = {name: value.to(widest(total.device)) / max(1, result.predictions) for name, value in sums.items()}
    if settings.balance_loss != "none" and settings.balance_loss_weight:
        balance = BALANCE_LOSSES[settings.balance_loss](routings, real_N) * share
        found["balance_loss"] = balance.detach()
        total = total + settings.balance_loss_weight * balance
    if settings.router_z_loss:
        router_z = router_z_loss(routings, real_N) * share
        found["router_z_loss"] = router_z.detach()
        total = total + settings.router_z_loss * router_z
    result.waiting.append(found)
    load_LE = torch.stack([expert_load(routing, real_N) for routing in routings])
    result.load_LE = load_LE if result.load_LE is None else result.load_LE + load_LE
    clock.lap("loss")
    observer.micro_batch(batch, routings, loss.per_token_N, TASKS[settings.task].predicts(batch))
    clock.lap("observe")
    return total


def count_predictions(micro_batches: Sequence[Any], settings: TrainingConfig) -> int:
    return sum(int(TASKS[settings.task].predicts(batch).sum()) for batch in micro_batches)


def clip_gradients(model: Grok1, optimizer: torch.optim.Optimizer, largest_norm: float, result: StepResult, in_place: bool) -> Tensor:
    """Scale all gradients by min(1, largest_norm / norm), the norm over all of them (Pascanu et al. 2013); 0: leave them.

    A norm that is not finite leaves them too: their step is skipped, and what is recorded of them is theirs.
    Unless `in_place`, an optimizer that can scales them as it reads them, to the same bits: a pass less over all of them.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    result.grad_norm = norm.item()
    if 0 < largest_norm < result.grad_norm < math.inf:
        result.clip_factor = largest_norm / result.grad_norm
    scales = hasattr(optimizer, "gradient_factor")
    if scales:
        optimizer.gradient_factor = 1.0 if in_place else result.clip_factor
    if result.clip_factor < 1 and (in_place or not scales):
        torch._foreach_mul_(gradients, result.clip_factor)
    return norm


def idle_experts(load_LE: Tensor) -> dict[str, Tensor]:
    """Per stacked expert tensor, which experts served no real token in this step."""
    return {
        f"layers.{layer}.moe.{name}": load_E == 0
        for layer, load_E in enumerate(load_LE)
        for name in ("gate_up_proj", "down_proj")
    }


class Stopwatch:
    """Seconds by phase; what passes between two laps belongs to the phase that the second one names. On a GPU its own clock runs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.marks = [("", self._now())]

    def lap(self, phase: str) -> None:
        self.marks.append((phase, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self) -> dict[str, float]:
        """Of each phase. Waits for the GPU, where there is one."""
        found: dict[str, float] = {}
        if self.on_gpu:
            self.marks[-1][1].synchronize()
        for (_, begin), (phase, end) in pairwise(self.marks):
            found[phase] = found.get(phase, 0.0) + (begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin)
        return found
