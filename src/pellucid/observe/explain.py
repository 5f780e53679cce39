"""One update of one weight, number by number: gradient -> clip -> moments -> bias correction -> decay -> step -> new weight.

The step is replayed, explained by the optimizer's plain rule, and proven: the terms add up exactly, the gradient agrees
with the chain rule by hand and with a finite difference, and what was recorded while training is what came out again.
With a text instead of a step: what one real step on that sentence would do, and what the model predicts before and after.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.config import UserError, nearest
from pellucid.data.dataset import Batch
from pellucid.data.labels import encode
from pellucid.observe.columns import INDEX
from pellucid.observe.observer import SilentObserver
from pellucid.observe.proofs import ChainRule, finite_difference, fixed_choices
from pellucid.observe.reader import Reader
from pellucid.observe.replay import Replay, save_capsule, state_before
from pellucid.observe.statistics import ParameterProbe
from pellucid.training.optimizers import Update, explain_update, optimizer_parameters, update_settings
from pellucid.training.step import StepResult, count_predictions, forward, idle_experts
from pellucid.training.tasks import as_told

AGREES = 1e-3  # relative difference below which two gradients are called equal
RECORDED = ("weight_norm", "gradient_norm", "update_norm")
WORDS = {
    "slope": "gradient, with L2 decay where the rule has it", "m": "first moment m", "v": "second moment v",
    "m_hat": "m / (1 - beta1^t)", "v_hat": "v / (1 - beta2^t)", "denominator": "sqrt(v_hat) + eps",
    "direction": "normalised step u", "buffer": "momentum", "blend": "what the step follows",
    "decay": "decay: -lr * weight_decay * w", "momentum": "from earlier gradients", "gradient": "from this gradient",
    "descent": "from the gradients", "rounding": "what the weight's dtype could not hold",
}  # fmt: skip


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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Catcher(SilentObserver):
    """Keeps one parameter's tensors as the step passes by, and measures the whole step as the observer did."""

    def __init__(self, replay: Replay, name: str | None):
        self.replay, self.name = replay, name
        self.probe = ParameterProbe(replay.model, replay.optimizer)
        self.frame: np.ndarray | None = None

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
) -> Explanation:  # fmt: skip
    """Step number `step` (from 0) of a run. parameter: None takes the tensor with the largest gradient; index: None takes
    its element that changed most. Writes the step's capsule, and its play. Raises UserError for what cannot be explained."""
    replay = state_before(run_dir, step, on_progress)
    _check_name(replay, parameter)
    _play(run_dir, replay)
    batches = replay.micro_batches()
    result, catcher, explanation = _explain(replay, batches, parameter, index)
    explanation.proofs.insert(0, _as_recorded(run_dir, step, catcher, result))
    update = catcher.update
    save_capsule(run_dir, step, {
        "before." + catcher.name: update.weight, "after." + catcher.name: catcher.fast,
        "gradient." + catcher.name: catcher.clipped, **{f"{k}.{catcher.name}": v for k, v in catcher.state.items()},
        **{f"term.{k}.{catcher.name}": v for k, v in update.terms.items()},
        "tokens": torch.cat([b.tokens_BT for b in batches]), "targets": torch.cat([b.targets_BT for b in batches]),
    }, {"step": step, "parameter": catcher.name, "clip_factor": result.clip_factor, "settings": explanation.settings})  # fmt: skip
    return explanation


def _play(run_dir: str | Path, replay: Replay) -> None:
    """The same step for the dashboard's Network view, unless it is there, or predicts no tokens."""
    from pellucid.observe import theatre  # which stands on this module

    if replay.config.training.task == "language_modeling" and not theatre.theatre_path(run_dir, replay.step).is_file():
        theatre.save_theatre(run_dir, theatre.stage(replay, run_dir=run_dir))


def explain_text(
    run_dir: str | Path, text: str, parameter: str | None = None, index: tuple[int, ...] | None = None,
    label: str | None = None,
) -> Explanation:  # fmt: skip
    """One step on a sentence, from the run's newest checkpoint; the run itself is not changed.

    label: of a run on labelled documents, what the text is: a class, or numbers with commas between them.
    """
    replay = state_before(run_dir, None)
    _check_name(replay, parameter)
    batch = _text_batch(replay, text)
    batch.labels_BTK = _text_label(replay, label, batch)
    before = _scores(replay, batch)
    _, _, explanation = _explain(replay, [batch], parameter, index)
    after = _scores(replay, batch)
    if batch.labels_BTK is not None:
        _add_answers(explanation, replay.model.config.head, label, text, before[-1], after[-1])
        return explanation
    targets = batch.targets_BT[0]
    explanation.loss_after = torch.nn.functional.cross_entropy(after, targets).item()
    explanation.predictions = _predictions(replay, batch, before.softmax(-1), after.softmax(-1))
    return explanation


def _explain(replay: Replay, batches: list[Batch], parameter: str | None, index) -> tuple[StepResult, _Catcher, Explanation]:
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
    explanation.proofs += _gradient_proofs(replay, start, batches, catcher, place, result.clip_factor)
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
    largest_rounding = update.rounding.abs().max().item() / max(change.abs().max().item(), 1e-300)
    return [
        Proof("terms + rounding = weight after - weight before", bool(torch.equal(update.explained(), change)),
              f"for each of {change.numel():,} elements, in float64; rounding is at most {largest_rounding:.1e} of the "
              "largest change"),
        Proof("the plain rule gives the weight that training wrote", worst <= 4 * _ulp(plain),
              "bit for bit" if not different else f"{different:,} of {plain.numel():,} elements differ in the last bits, "
              f"by at most {worst:.1e}"),
    ]  # fmt: skip


def _ulp(weight: Tensor) -> float:
    return torch.finfo(weight.dtype).eps * max(weight.abs().max().item(), 1e-30)


def _gradient_proofs(replay, start: dict, batches, catcher: _Catcher, place, clip_factor: float) -> list[Proof]:
    """From the state before the step, in fp32, whatever the run's precision."""
    model, settings = replay.model, replay.config.training
    after = {name: p.detach().clone() for name, p in model.state_dict().items()}
    dtype, parity = model.compute_dtype, model.parity
    model.load_state_dict(start)
    model.compute_dtype, model.parity = torch.float32, False
    weight = dict(model.named_parameters())[catcher.name]
    rule = ChainRule(model, catcher.name)
    try:
        with fixed_choices(model) as rewind:
            gradient = _autograd(model, batches, settings, weight)
            by_hand = rule.element(place)
            rule.close()

            def objective() -> float:
                rewind()
                return _objective(model, batches, settings)

            scale = weight.detach().double().square().mean().sqrt().item()
            one = torch.zeros_like(weight)
            one[place] = 1.0
            single, doubt = finite_difference(objective, weight, one, 0.2 * scale, count_predictions(batches, settings))
            norm = gradient.double().norm().item()
            size = 0.01 * weight.double().norm().item()
            along, doubt_along = finite_difference(objective, weight, gradient / norm, size, count_predictions(batches, settings))
    finally:
        rule.close()
        model.load_state_dict(after)
        model.compute_dtype, model.parity = dtype, parity
    exact = gradient[place].item()
    proofs = [_agreement("the chain rule by hand = autograd", by_hand, exact, 0.0)]
    proofs.append(_agreement("finite difference of this element = autograd", single, exact, doubt))
    proofs.append(_agreement("finite difference of the whole tensor, along its gradient = its norm", along, norm, doubt_along))
    return proofs


def _agreement(claim: str, found: float | None, expected: float, doubt: float) -> Proof:
    if found is None:
        return Proof(claim, None, "no formula here for a tensor used at both ends of the model")
    difference = abs(found - expected)
    relative = difference / max(abs(expected), 1e-300)
    detail = f"{found:.7g} and {expected:.7g}, apart by {relative:.1e}"
    if doubt:
        detail += f"; the difference quotient is sure to {doubt:.1e}"
    return Proof(claim, difference <= AGREES * abs(expected) + doubt, detail)


def _autograd(model, batches, settings, weight: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    result = StepResult(predictions=count_predictions(batches, settings))
    for batch in batches:
        forward(model, batch, settings, result, _NoClock(), SilentObserver()).backward()
    gradient = weight.grad.detach().clone()
    model.zero_grad(set_to_none=True)
    return gradient


def _objective(model, batches, settings) -> float:
    """What the step minimises, summed in float64 where the parts allow."""
    result = StepResult(predictions=count_predictions(batches, settings))
    for batch in batches:
        forward(model, batch, settings, result, _NoClock(), SilentObserver())
    balance = settings.balance_loss_weight * result.balance_loss if settings.balance_loss != "none" else 0.0
    return result.loss + result.z_loss + balance + settings.router_z_loss * result.router_z_loss


class _NoClock:
    def lap(self, phase: str) -> None: ...


def _as_recorded(run_dir: str | Path, step: int, catcher: _Catcher, result: StepResult) -> Proof:
    """The replayed step against what was written while training."""
    claim = "the replay is the step that was recorded"
    with Reader(run_dir) as reader:
        steps, losses = reader.series("run", "loss", stream="run")
        steps_param, frames = reader.frames("param", since=step - 1, until=step)
        at = next(i for i, row in enumerate(reader.rows("param")) if row["name"] == catcher.name)
    found = np.flatnonzero(steps == step)
    if not len(found):
        return Proof(claim, None, "this step is not in run.sqlite")
    same = [("loss", np.float32(result.loss), losses[found[0]])]
    if len(steps_param):
        recorded, column = frames[0, at], INDEX["param"]
        skip = {"update_norm"} if recorded[column["exact"]] != catcher.frame[at, column["exact"]] else set()
        same += [(n, catcher.frame[at, column[n]], recorded[column[n]]) for n in RECORDED if n not in skip]
    holds = all(a == b for _, a, b in same)
    words = [f"{name} {float(a):.9g}" + ("" if a == b else f" (recorded {float(b):.9g})") for name, a, b in same]
    return Proof(claim, holds, ("bit for bit: " if holds else "") + ", ".join(words))


# ------------------------------------------------------------------------------------------------ choosing


def _check_name(replay: Replay, parameter: str | None) -> None:
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


# ---------------------------------------------------------------------------------------------------- text


def _text_batch(replay: Replay, text: str) -> Batch:
    tokenizer = replay.dataset.tokenizer
    tokens = [tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
    most = replay.config.model.max_position_embeddings
    if len(tokens) < 3 or len(tokens) > most:
        raise UserError(f"--text: {len(tokens) - 2} tokens; give between 1 and {most - 2}")
    row = torch.tensor([tokens], device=replay.model.embedding.weight.device)
    ones = torch.ones(1, len(tokens) - 1, dtype=torch.int32, device=row.device)
    positions = torch.arange(len(tokens) - 1, dtype=torch.int32, device=row.device)[None]
    zero = torch.zeros(1, dtype=torch.int64, device=row.device)
    return Batch(row[:, :-1], row[:, 1:], ones, positions, zero, zero)


def _text_label(replay: Replay, label: str | None, batch: Batch) -> Tensor | None:
    """[1, T, K]: the label at the last token; None for language modelling. Raises UserError."""
    head = replay.model.config.head
    if (head is None) != (label is None):
        raise UserError("--label: this run predicts the next token; leave it out" if head is None else
                        "--text: this run labels documents; say what this text is, with --label")  # fmt: skip
    if head is None:
        return None
    kind, known = ("number", label) if head.problem_type == "regression" else ("category", label)
    if kind == "number":
        try:
            known = json.dumps([float(part) for part in label.split(",")])
        except ValueError:
            raise UserError(f"--label {label}: not a number (several: with commas)") from None
    elif label not in head.labels:
        raise UserError(f"--label {label}: the run knows no such class{nearest(label, head.labels)}")
    labels_BTK = torch.full((*batch.tokens_BT.shape, len(head.labels) if kind == "number" else 1), torch.nan)
    labels_BTK[0, -1] = torch.from_numpy(encode([known], kind, head.labels, head.mean, head.std))[0]
    return labels_BTK.to(batch.tokens_BT.device)


def _add_answers(explanation: Explanation, head: Any, label: str, text: str, before: Tensor, after: Tensor) -> None:
    """What the head said of the text, before and after the step."""
    if head.problem_type == "regression":
        told = [as_told(head, outputs.cpu().numpy()[None])[0].tolist() for outputs in (before, after)]
        for k, name in enumerate(head.labels):
            explanation.lines += [(f"{name}, predicted before the step", told[0][k]), (f"{name}, predicted after it", told[1][k])]
        return
    before, after, at = before.softmax(-1), after.softmax(-1), head.labels.index(label)
    explanation.loss_after = -after[at].log().item()
    choices = (head.labels[int(chances.argmax())] for chances in (before, after))
    explanation.predictions = [Prediction(text[-40:], label, before[at].item(), after[at].item(), *choices)]


@torch.no_grad()
def _scores(replay: Replay, batch: Batch) -> Tensor:
    return replay.model(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)[0]


def _predictions(replay: Replay, batch: Batch, before: Tensor, after: Tensor) -> list[Prediction]:
    decode = replay.dataset.tokenizer.decode
    tokens, targets = batch.tokens_BT[0].tolist(), batch.targets_BT[0].tolist()
    eos = replay.dataset.tokenizer.eos_token_id
    show = lambda token: "(end)" if token == eos else decode([token])
    return [
        Prediction(decode([t for t in tokens[max(1, n - 9) : n + 1]]), show(target), before[n, target].item(),
                   after[n, target].item(), show(int(before[n].argmax())), show(int(after[n].argmax())))
        for n, target in enumerate(targets)
    ]  # fmt: skip
