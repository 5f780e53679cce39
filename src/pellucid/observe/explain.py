"""One update of one weight, number by number: gradient -> clip -> moments -> bias correction -> decay -> step -> new weight.

The step is replayed, explained by the optimizer's plain rule, and proven: the terms add up exactly, the gradient agrees
with the chain rule by hand and with a finite difference, and what was recorded while training is what came out again.
On a sentence instead of a step: explain_text.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from pellucid.config import UserError
from pellucid.data.dataset import Batch
from pellucid.model.size import flops_per_token
from pellucid.observe import theatre
from pellucid.observe.columns import INDEX
from pellucid.observe.observer import SilentObserver
from pellucid.observe.proofs import chain_rule, finite_difference, fixed_choices, gradients_of, independent_tokens, objective
from pellucid.observe.reader import Reader
from pellucid.observe.replay import Replay, kernels_of_step, save_capsule, state_before
from pellucid.observe.statistics import ParameterProbe
from pellucid.training import checkpoint
from pellucid.training.device import other_kernels
from pellucid.training.optimizers import Update, explain_update, optimizer_parameters, update_settings
from pellucid.training.step import StepResult, count_predictions, idle_experts

AGREES = 1e-3  # relative difference below which two gradients are called equal
SURE_ENOUGH = 0.05  # of the gradient: a difference quotient less sure than that proves nothing
LAST_BITS, STEP_BITS = 8, 1e-5  # rounding: so many last bits of the largest weight, and so much of the largest change
MOST_PLAYED = 50_000_000  # parameters: they and their optimizer state are held twice while a step is explained and then played
PLAYED_FLOPS = {"cpu": 1e11, "cuda": 1e13}  # of a step: its play takes some ten times that, and so is a matter of seconds
PROOF_SECONDS = 2.0  # of a play, for finite differences
RECORDED = ("weight_norm", "gradient_norm", "update_norm")
WORDS = {
    "slope": "gradient, with L2 decay where the rule has it", "m": "first moment m", "v": "second moment v",
    "m_hat": "m / (1 - beta1^t)", "v_hat": "v / (1 - beta2^t)", "denominator": "sqrt(v_hat) + eps",
    "direction": "normalised step u", "buffer": "momentum", "blend": "what the step follows",
    "momentum": "from earlier gradients", "gradient": "from this gradient",
    "descent": "from the gradients", "rounding": "what the weight's dtype could not hold",
}  # fmt: skip


def term_words(term: str, rule: str, settings: dict[str, Any]) -> str:
    """What a term of the change is; decay with its formula, which is not the same for every rule."""
    if term != "decay":
        return WORDS.get(term, term)
    if rule == "adam":
        return "decay, as far as it is part of this gradient"
    ahead = " * (1 + momentum)" if rule == "sgd" and settings["nesterov"] and settings["momentum"] else ""
    return f"decay: -lr{ahead} * weight_decay * w"


@dataclass
class Proof:
    """holds: None where the claim cannot be tested for this parameter."""

    claim: str
    holds: bool | None
    detail: str


@dataclass
class Prediction:
    """One place of the text: the token that came, and the chance the model gave it, before and after the step."""

    context: str
    token: str
    before: float
    after: float
    expected_before: str
    expected_after: str


@dataclass
class Explanation:
    """Everything about one element's update. lines: (what, value) in order; terms: parts of the change."""

    step: int
    parameter: str
    index: list[int]
    rule: str
    settings: dict[str, Any]
    loss: float
    gradient_norm: float
    clip_factor: float
    lines: list[tuple[str, float]] = field(default_factory=list)
    terms: dict[str, float] = field(default_factory=dict)
    weight_before: float = 0.0
    weight_after: float = 0.0
    change: float = 0.0
    proofs: list[Proof] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    loss_after: float | None = None
    note: str | None = None  # what differs from the run's own steps

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Catcher(SilentObserver):
    """Keeps one parameter's tensors as the step passes by, and measures the whole step as the observer did."""

    def __init__(self, replay: Replay, name: str | None):
        self.replay, self.name = replay, name
        self.probe = ParameterProbe(replay.model, replay.optimizer)
        self.frame: np.ndarray | None = None

    def reads_gradients(self) -> bool:
        return True

    def before_update(self, result: StepResult) -> None:
        self.device = self.probe.before(None, False)
        if self.name is None:
            self.name = _largest_gradient(self.replay.model)
        weight = dict(self.replay.model.named_parameters())[self.name]
        self.idle = idle_experts(result.load_LE).get(self.name)
        self.state = {k: v.clone() for k, v in self.replay.optimizer.state.get(weight, {}).items() if v is not None}
        self.clipped = weight.grad.clone()
        self.update: Update = explain_update(self.replay.optimizer, self.name, idle_E=self.idle)

    def after_update(self, result: StepResult) -> None:
        weight = dict(self.replay.model.named_parameters())[self.name]
        self.fast = weight.detach().clone()
        device = self.device | self.probe.after(result.applied, False)
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in device.items()}
        self.frame = self.probe.finish(arrays, self.probe.facts(result.clip_factor, result.applied))


def explain(
    run_dir: str | Path, step: int, parameter: str | None = None, index: tuple[int, ...] | None = None, on_progress=None,
    on_explained: Callable[[Explanation], None] = lambda explanation: None,
) -> Explanation:  # fmt: skip
    """Step number `step` (from 0) of a run. parameter: None takes the tensor with the largest gradient; index: None takes
    its element that changed most. Writes the step's capsule; then, where that is a matter of seconds, its play, before
    which `on_explained` is told. Raises UserError for what cannot be explained."""
    replay = state_before(run_dir, step, on_progress)
    check_name(replay, parameter)
    batches, to_play = replay.micro_batches(), _may_be_played(run_dir, replay)
    with theatre.kept(replay) if to_play else nullcontext():
        result, catcher, explanation = explain_step(replay, batches, parameter, index)
    explanation.proofs[:0] = [_as_recorded(run_dir, step, catcher, result), *_as_saved(run_dir, step, catcher)]
    update = catcher.update
    with suppress(OSError, safetensors.SafetensorError):  # the explanation stands without it, where the run cannot be written to
        save_capsule(run_dir, step, {
            "before." + catcher.name: update.weight, "after." + catcher.name: catcher.fast,
            "gradient." + catcher.name: catcher.clipped, **{f"{k}.{catcher.name}": v for k, v in catcher.state.items()},
            **{f"term.{k}.{catcher.name}": v for k, v in update.terms.items()},
            "tokens": torch.cat([b.tokens_BT for b in batches]), "targets": torch.cat([b.targets_BT for b in batches]),
        }, {"step": step, "parameter": catcher.name, "clip_factor": result.clip_factor, "settings": explanation.settings})  # fmt: skip
    on_explained(explanation)
    if to_play:
        with suppress(UserError, OSError):  # here too; and `watch` says why a step cannot be played
            theatre.save_theatre(run_dir, theatre.stage(replay, run_dir=run_dir, seconds=PROOF_SECONDS))
    return explanation


def _may_be_played(run_dir: str | Path, replay: Replay) -> bool:
    """For the dashboard's Network view: unless it is there, or is too large or slow."""
    config = replay.config
    if theatre.theatre_path(run_dir, replay.step).is_file():
        return False
    tokens = config.training.batch_size * config.data.sequence_length
    flops = tokens * flops_per_token(config.model, config.data.sequence_length)
    most = PLAYED_FLOPS.get(replay.model.embedding.weight.device.type, PLAYED_FLOPS["cpu"])
    return flops <= most and sum(p.numel() for p in replay.model.parameters()) <= MOST_PLAYED


def explain_step(replay: Replay, batches: list[Batch], parameter: str | None, index) -> tuple[StepResult, _Catcher, Explanation]:
    """Does the step that `replay` stands before, on these micro-batches, and explains it. Raises UserError if it was skipped."""
    step = replay.step
    start = {name: p.detach().clone() for name, p in replay.model.state_dict().items()}
    catcher = _Catcher(replay, parameter)
    result = replay.advance(catcher, batches)
    if not result.applied:
        raise UserError(f"step {step} changed nothing: its loss or gradient was not finite (see the non_finite event)")
    update = catcher.update.settle(catcher.fast)
    place = _place(update, catcher.name, index)
    group = next(group for name, _, group in optimizer_parameters(replay.optimizer) if name == catcher.name)
    settings = {k: v for k, v in update_settings(group, catcher.name).items() if k != "dtype"}
    explanation = Explanation(step, catcher.name, list(place), group["rule"], settings, result.loss, result.grad_norm,
                              result.clip_factor)  # fmt: skip
    _numbers(explanation, update, catcher, place)
    explanation.proofs = _arithmetic_proofs(update, catcher)
    in_fp32, proofs = _gradient_proofs(replay, start, batches, catcher, place, result.clip_factor)
    explanation.proofs += proofs
    if replay.model.compute_dtype != torch.float32:
        explanation.lines.insert(1, ("the same made in fp32", in_fp32))
    return result, catcher, explanation


def _numbers(explanation: Explanation, update: Update, catcher: _Catcher, place: tuple[int, ...]) -> None:
    at = lambda tensor: tensor.double()[place].item()
    clipped = at(catcher.clipped)
    explanation.lines = [("gradient, before clipping", clipped / explanation.clip_factor), ("after clipping", clipped)]
    for key, value in catcher.state.items():
        shown = WORDS.get({"exp_avg": "m", "exp_avg_sq": "v", "momentum_buffer": "buffer"}.get(key, key), key)
        same_shape = value.shape == update.weight.shape
        if same_shape or value.ndim == 0:
            explanation.lines.append((f"{shown}, before the step", at(value) if same_shape else value.item()))
    for key, value in update.quantities.items():
        if isinstance(value, Tensor) and value.shape == update.weight.shape:
            explanation.lines.append((WORDS.get(key, key), at(value)))
    explanation.terms = {name: at(term) for name, term in [*update.terms.items(), ("rounding", update.rounding)]}
    explanation.weight_before, explanation.weight_after = at(update.weight), at(update.weight_after)
    explanation.change = at(update.change())


def _arithmetic_proofs(update: Update, catcher: _Catcher) -> list[Proof]:
    plain = catcher.update.weight_after
    different = int((plain != update.weight_after).sum())
    worst = (plain.double() - update.weight_after.double()).abs().max().item()
    change = update.change()
    rounding, largest = update.rounding.abs().max().item(), change.abs().max().item()
    most = LAST_BITS * _ulp(update.weight_after) + STEP_BITS * largest
    closes = bool(torch.equal(update.explained(), change))
    return [
        Proof("terms + rounding = weight after - weight before", closes and rounding <= most,
              f"for each of {change.numel():,} elements, in float64; the largest change is {largest:.1e}, the largest rounding "
              f"{rounding:.1e}" + ("" if rounding <= most else f", more than a rounding may be: {most:.1e}")),
        Proof("the plain rule gives the weight that training wrote", worst <= 4 * _ulp(plain),
              "bit for bit" if not different else f"{different:,} of {plain.numel():,} elements differ in the last bits, "
              f"by at most {worst:.1e}"),
    ]  # fmt: skip


def _ulp(weight: Tensor) -> float:
    return torch.finfo(weight.dtype).eps * max(weight.abs().max().item(), 1e-30)


def _gradient_proofs(
    replay, start: dict, batches, catcher: _Catcher, place, clip_factor: float,
) -> tuple[float, list[Proof]]:  # fmt: skip
    """(the element's gradient, its proofs), from the state before the step, in fp32 whatever the run's precision."""
    model, settings = replay.model, replay.config.training
    after = {name: p.detach().clone() for name, p in model.state_dict().items()}
    dtype, parity = model.compute_dtype, model.parity
    model.load_state_dict(start)
    model.compute_dtype, model.parity = torch.float32, False
    weight = dict(model.named_parameters())[catcher.name]
    tokens = count_predictions(batches, settings)
    rule = chain_rule(model, catcher.name, settings, batches, tokens)
    independent = independent_tokens(batches, tokens)
    try:
        with fixed_choices(model) as rewind:
            gradients_of(model, batches, settings)
            gradient = weight.grad.detach().clone()
            model.zero_grad(set_to_none=True)
            (by_hand,) = rule.elements([place])
            rule.close()

            def again() -> float:
                rewind()
                return objective(model, batches, settings)

            scale = weight.detach().double().square().mean().sqrt().item()
            one = torch.zeros_like(weight)
            one[place] = 1.0
            single, doubt = finite_difference(again, weight, one, 0.2 * scale, independent)
            norm = gradient.double().norm().item()
            size = 0.01 * weight.double().norm().item()
            along, doubt_along = finite_difference(again, weight, gradient / norm, size, independent)
    finally:
        rule.close()
        model.load_state_dict(after)
        model.compute_dtype, model.parity = dtype, parity
    exact, where = gradient[place].item(), "" if dtype == torch.float32 else "in fp32: "
    return exact, [
        _same_gradient(catcher.clipped / clip_factor, gradient, place, dtype),
        _agreement(f"{where}the chain rule by hand = autograd", by_hand, exact, 0.0),
        _agreement(f"{where}finite difference of this element = autograd", single, exact, doubt),
        _agreement(f"{where}finite difference of the whole tensor, along its gradient = its norm", along, norm, doubt_along),
    ]


def _same_gradient(made: Tensor, proven: Tensor, place: tuple[int, ...], dtype: torch.dtype) -> Proof:
    """Of what was made in bf16 it can only be said how far it is: rounding moves it, and sends tokens to other experts."""
    own, exact = made[place].item(), proven[place].item()
    apart = (made.double() - proven.double()).norm().item() / max(proven.double().norm().item(), 1e-300)
    detail = f"{own:.7g} and {exact:.7g}; the whole tensor is apart by {apart:.1e}"
    if dtype == torch.float32:
        return Proof("the step's gradient is the one proven here", apart <= AGREES, detail)
    return Proof("the step's gradient is the one proven here", None, f"it was made in bf16: {detail}")


def _agreement(claim: str, found: float, expected: float, doubt: float) -> Proof:
    difference = abs(found - expected)
    relative = difference / max(abs(expected), 1e-300)
    detail = f"{found:.7g} and {expected:.7g}, apart by {relative:.1e}"
    if doubt:
        detail += f"; the difference quotient is sure to {doubt:.1e}"
    if doubt > SURE_ENOUGH * abs(expected):
        return Proof(claim, None, f"{detail}, too unsure to tell")
    return Proof(claim, difference <= AGREES * abs(expected) + doubt, detail)


def _as_saved(run_dir: str | Path, step: int, catcher: _Catcher) -> list[Proof]:
    """Where a checkpoint was written after this very step: whether it holds this weight."""
    folder = checkpoint.saved_steps(Path(run_dir) / "checkpoints").get(step + 1)
    if folder is None:
        return []
    claim = f"the weight after is the one in the checkpoint of step {step + 1}"
    try:
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            saved = file.get_tensor(catcher.name)
    except (OSError, safetensors.SafetensorError) as error:  # damaged, or just removed for a newer one
        return [Proof(claim, None, f"it cannot be read: {error}")]
    different = int((saved != catcher.fast.cpu()).sum())
    return [Proof(claim, not different, f"{different:,} of {saved.numel():,} elements differ" if different else
                  f"bit for bit, all {saved.numel():,} elements")]  # fmt: skip


def _as_recorded(run_dir: str | Path, step: int, catcher: _Catcher, result: StepResult) -> Proof:
    """The replayed step against what was written while training."""
    claim = "the replay is the step that was recorded"
    with Reader(run_dir) as reader:
        steps, losses = reader.series("run", "loss", stream="run")
        norms = reader.series("run", "gradient_norm", stream="run")[1]
        steps_param, frames = reader.frames("param", since=step - 1, until=step)
        at = next(i for i, row in enumerate(reader.rows("param")) if row["name"] == catcher.name)
    found = np.flatnonzero(steps == step)
    if not len(found):
        return Proof(claim, None, "this step is not in run.sqlite")
    same = [("loss", np.float32(result.loss), losses[found[0]]),
            ("gradient norm of all", np.float32(result.grad_norm), norms[found[0]])]  # fmt: skip
    if len(steps_param):
        recorded, column = frames[0, at], INDEX["param"]
        skip = {"update_norm"} if recorded[column["exact"]] != catcher.frame[at, column["exact"]] else set()
        same += [(n, catcher.frame[at, column[n]], recorded[column[n]]) for n in RECORDED if n not in skip]
    holds = all(a == b for _, a, b in same)
    words = [f"{name} {float(a):.9g}" + ("" if a == b else f" (recorded {float(b):.9g})") for name, a, b in same]
    cause = None
    if not holds and catcher.fast.device.type == "cpu":
        cause = other_kernels(kernels_of_step(Path(run_dir), step))
    return Proof(claim, holds, ("bit for bit: " if holds else "") + ", ".join(words) + (f"; {cause}" if cause else ""))


# ------------------------------------------------------------------------------------------------ choosing


def check_name(replay: Replay, parameter: str | None) -> None:
    names = [name for name, _ in replay.model.named_parameters()]
    if parameter is not None and parameter not in names:
        close = difflib.get_close_matches(parameter, names, n=1, cutoff=0.3)
        raise UserError(f"--parameter: the model has no '{parameter}'; did you mean '{close[0] if close else names[0]}'?")


def _largest_gradient(model) -> str:
    return max(((p.grad.norm().item(), name) for name, p in model.named_parameters() if p.grad is not None))[1]


def _place(update: Update, name: str, index: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = update.weight.shape
    if index is None:
        flat = update.change().abs().flatten().argmax().item()
        return tuple(int(i) for i in np.unravel_index(flat, tuple(shape)))
    if len(index) != len(shape) or not all(0 <= i < size for i, size in zip(index, shape, strict=True)):
        wanted = ",".join(f"0..{size - 1}" for size in shape)
        raise UserError(f"--index {','.join(map(str, index))}: '{name}' has the shape {list(shape)}, give {wanted}")
    return tuple(index)
