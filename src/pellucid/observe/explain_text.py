"""One real step on a sentence of the user's: what it would do to a weight, and what the model predicts before and after.

The state is the run's newest checkpoint, the learning rate the run's peak: after a training whose schedule ended at 0 the
scheduled rate would change nothing. The run itself is not touched. Letters: B rows, T positions, K numbers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.config import ScheduleConfig, UserError, nearest
from pellucid.data.dataset import Batch
from pellucid.data.labels import encode
from pellucid.observe.explain import Explanation, Prediction, check_name, explain_step
from pellucid.observe.replay import Replay, state_before
from pellucid.training.tasks import as_told


def explain_text(
    run_dir: str | Path, text: str, parameter: str | None = None, index: tuple[int, ...] | None = None,
    label: str | None = None,
) -> Explanation:  # fmt: skip
    """One step on a sentence, at the run's peak learning rate. parameter, index: as for `explain`.

    label: of a run on labelled documents, what the text is: a class, or numbers with commas between them. Raises UserError.
    """
    replay = state_before(run_dir, None)
    check_name(replay, parameter)
    batch = _batch(replay, text)
    batch.labels_BTK = _label(replay, label, batch)
    scheduled, step = replay.factor(), replay.step
    replay = dataclasses.replace(replay, config=_at_peak(replay.config))
    before = _scores(replay, batch)
    _, _, explanation = explain_step(replay, [batch], parameter, index)
    after = _scores(replay, batch)
    peak = explanation.settings["learning_rate"]
    explanation.note = f"learning rate {peak:.6g}: the run's peak (its schedule has {peak * scheduled:.6g} for step {step})"
    if batch.labels_BTK is not None:
        _add_answers(explanation, replay.model.config.head, label, text, before[-1], after[-1])
        return explanation
    explanation.loss_after = F.cross_entropy(after, batch.targets_BT[0]).item()
    explanation.predictions = _predictions(replay, batch, before.softmax(-1), after.softmax(-1))
    return explanation


def _at_peak(config: Any) -> Any:
    return config.model_copy(update={"schedule": ScheduleConfig(name="constant", warmup_steps=0)})


def _batch(replay: Replay, text: str) -> Batch:
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


def _label(replay: Replay, label: str | None, batch: Batch) -> Tensor | None:
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
