"""One training step as a play in seven phases: input, forward, predict, loss, backward, update, after. With real numbers.

The step is replayed (replay.py); one token of its batch (of labelled documents: the last of one) is followed through the
network (passage.py), and every weight that is shown carries its whole update (theatre_recorder.py): gradient, clipping, moments,
terms, weight before and after, and three proofs.
Written to capsules/step-N.theatre.json. `python -m pellucid.observe.theatre RUN STEP` makes one beside a training.
Letters: B rows, T positions, W window of a row, V vocabulary, L layers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.config import UserError
from pellucid.observe.passage import Passage
from pellucid.observe.proofs_of_step import prove_edges
from pellucid.observe.reader import Reader
from pellucid.observe.replay import Replay, capsule_path, state_before
from pellucid.observe.theatre_recorder import Recorder, say_choices, token_text
from pellucid.training import checkpoint
from pellucid.training.evaluate import split_batches
from pellucid.training.losses import cross_entropy
from pellucid.training.step import StepResult
from pellucid.training.tasks import TASKS, as_told, label_loss

VERSION = 1
WINDOW = 12  # tokens shown
HELD_OUT_ROWS = 16
MOST_SCORES = 2**24  # held at once
SECONDS = 20.0
Progress = Callable[[str, int, int], None]


def theatre_path(run_dir: str | Path, step: int) -> Path:
    return capsule_path(run_dir, step).with_suffix(".theatre.json")


def make_theatre(run_dir: str | Path, step: int, on_progress: Progress | None = None) -> Path:
    """Replay step `step` of a run and write its play. Raises UserError that names the steps which can be replayed."""
    tell = on_progress or (lambda *_: None)
    replay = state_before(run_dir, step, lambda done, total: tell("replaying", done, total))
    return save_theatre(run_dir, stage(replay, tell, run_dir))


def save_theatre(run_dir: str | Path, play: dict[str, Any]) -> Path:
    """Complete or absent: written beside its place and renamed."""
    path = theatre_path(run_dir, play["step"])
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".saving")
    unfinished.write_text(json.dumps(_short(play), separators=(",", ":"), ensure_ascii=False), encoding="utf-8")
    unfinished.replace(path)
    return path


def staged_steps(run_dir: str | Path) -> list[int]:
    """Steps whose play is there."""
    files = (Path(run_dir) / "capsules").glob("step-*.theatre.json")
    return sorted(int(file.name.removeprefix("step-").split(".")[0]) for file in files)


def stage_last(run_dir: str | Path, most: int, seconds: float = 1.0) -> list[int]:
    """After a training: plays of steps that begin at a kept checkpoint, so that nothing is replayed. Returns the steps.

    Of the newest `most` checkpoints before the end, or of step 0. seconds: for finite differences, of each.
    """
    saved = checkpoint.saved_steps(Path(run_dir) / "checkpoints")
    steps = (sorted({0, *saved} - {max(saved, default=0)}) or [0])[-most:] if most else []
    for step in steps:
        save_theatre(run_dir, stage(state_before(run_dir, step), run_dir=run_dir, seconds=seconds))
    return steps


def stage(
    replay: Replay, tell: Progress = lambda *_: None, run_dir: str | Path | None = None, seconds: float = SECONDS,
) -> dict[str, Any]:  # fmt: skip
    """The play of the step that `replay` stands before; afterwards it stands there again.

    seconds: spent on finite differences at most; each weight's costs five forward passes or more.
    """
    batches, model, step = replay.micro_batches(), replay.model, replay.step
    size = len(batches[0].tokens_BT)
    tell("forward", 0, 1)
    losses_BT = _token_losses(replay, batches)
    predicted_BT = torch.cat([_predicted(replay, batch) for batch in batches]).cpu()
    row, focus = choose_token(batches, losses_BT, predicted_BT, replay.dataset.tokenizer)
    micro, batch = row // size, batches[row // size]
    window, own = slice(first_of_window(batch, row % size, focus), focus + 1), slice(row % size, row % size + 1)
    held_out = _held_out(replay)
    with kept(replay) as start:
        passage = Passage(model, row % size)
        recorder = Recorder(replay, passage, micro, window, batches)
        try:
            result = replay.advance(recorder, batches)
        finally:
            passage.close()
        if not result.applied:
            raise UserError(f"step {step} changed nothing: its loss or gradient was not finite, so there is no play of it")
        after_BT, after_WV = _token_losses(replay, batches), _scores(replay, batch[own])[0, window]
        held_out["after"] = _held_out(replay)["before"]
        proofs = _whole_proofs(replay, result, run_dir)
        replay.model.load_state_dict(start)
        prove_edges(replay, batches, recorder.edges, tell, seconds)
    play = {
        "version": VERSION, "step": step, "row": row, "position": focus, "window": [window.start, window.stop],
        "document": _document(replay, row, focus), "tokens": _tokens(replay, batch, row % size, window),
        "shape": replay.config.model.model_dump(mode="json", exclude={"preset"}),
        "precision": replay.config.training.precision, "batch": [len(losses_BT), losses_BT.shape[1]],
        "training": {key: getattr(replay.config.training, key) for key in ("task", "label_smoothing", "class_weights", "huber_delta")},
        "optimizer": recorder.settings, "layers": recorder.layers, "outputs": recorder.outputs,
        "edges": [edge.as_dict() for edge in recorder.edges], "proofs": proofs,
        "step_result": {"loss": result.loss, "tokens": result.predictions, "gradient_norm": result.grad_norm,
                        "clip_factor": result.clip_factor, "gradient_clip": replay.config.training.gradient_clip,
                        "learning_rate": result.learning_rate, "balance_loss": result.balance_loss},
        "losses": {"batch": _means(losses_BT, after_BT, predicted_BT),
                   "row": _means(losses_BT[row], after_BT[row], predicted_BT[row]),
                   "held_out": [held_out["before"], held_out["after"]], "held_out_rows": held_out["rows"],
                   "tokens": [losses_BT[row, window].tolist(), after_BT[row, window].tolist()]},
    }  # fmt: skip
    _after(play, after_WV, model.config.head)
    return play


# ------------------------------------------------------------------------------------------------- choosing


def choose_token(batches: list[Any], losses_BT: Tensor, real: Tensor, tokenizer: Any) -> tuple[int, int]:
    """(row, position) of the token that is followed: the one nearest to the step's mean loss, so that it is typical.

    All that it can see should fit in the window, with some context, and what is predicted should have letters or digits;
    each wish is dropped if no token of the step fulfils it. real: bool [B, T], where something is predicted.
    """
    targets_BT = torch.cat([batch.targets_BT for batch in batches]).cpu()
    positions_BT = torch.cat([batch.positions_BT for batch in batches]).cpu()
    if not real.any():
        raise UserError("this step's batch predicts no token")
    wordlike = torch.tensor([any(c.isalnum() for c in tokenizer.decode([n])) for n in range(tokenizer.vocab_size)])
    distance = (losses_BT - losses_BT[real].mean()).abs().masked_fill(~real, torch.inf)
    near, word = (positions_BT >= WINDOW * 2 // 3) & (positions_BT < WINDOW), wordlike[targets_BT.clamp(min=0)]
    for wanted in (near & word, near, positions_BT >= WINDOW // 2, real):
        if (wanted & real).any():
            flat = int(distance.masked_fill(~wanted, torch.inf).flatten().argmin())
            return divmod(flat, losses_BT.shape[1])
    raise AssertionError("unreachable")


def first_of_window(batch: Any, row: int, focus: int) -> int:
    """Up to WINDOW positions of one document, ending in `focus`."""
    segments = batch.segment_ids_BT[row]
    first = focus
    while first > max(0, focus - WINDOW + 1) and segments[first - 1] == segments[focus]:
        first -= 1
    return first


# ------------------------------------------------------------------------------------------------- measuring


def _predicted(replay: Replay, batch: Any) -> Tensor:
    """bool [B, T]."""
    return TASKS[replay.config.training.task].predicts(batch).view(batch.tokens_BT.shape)


@torch.no_grad()
def _token_losses(replay: Replay, batches: list[Any]) -> Tensor:
    """[B, T] in nats (of numbers: squared deviations), 0 where nothing is predicted."""
    head, settings = replay.model.config.head, replay.config.training
    if head is not None:
        found = []
        for batch in batches:
            at_BT = _predicted(replay, batch)
            loss_M = label_loss(head, _scores(replay, batch)[at_BT], batch.labels_BTK[at_BT], settings)
            found.append(loss_M.new_zeros(at_BT.shape).masked_scatter(at_BT, loss_M))
        return torch.cat(found).cpu()
    losses, vocabulary = [], replay.config.model.vocab_size
    for batch in batches:
        B, T = batch.tokens_BT.shape
        most = max(1, MOST_SCORES // (T * vocabulary))
        for rows in (slice(start, start + most) for start in range(0, B, most)):
            scores, targets = _scores(replay, batch[rows]).flatten(0, 1), batch.targets_BT[rows].flatten()
            losses.append(cross_entropy(scores, targets).per_token_N.view(-1, T))
    return torch.cat(losses).cpu()


@torch.no_grad()
def _scores(replay: Replay, batch: Any) -> Tensor:
    """[B, T, V] in fp32; of a head [B, T, K]."""
    return replay.model(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT).float()


def _held_out(replay: Replay) -> dict[str, Any]:
    split = replay.dataset.validation
    if split is None:
        return {"before": None, "rows": 0}
    settings = replay.config.training
    batches = split_batches(split, settings.micro_batch_size, HELD_OUT_ROWS)
    loss = TASKS[settings.task].evaluate(replay.model, batches, settings, replay.dataset.tokenizer.byte_lengths).loss
    return {"before": loss, "rows": min(HELD_OUT_ROWS, len(split))}


def _means(losses_BT: Tensor, after_BT: Tensor, predicted_BT: Tensor) -> list[float]:
    """Before and after the step, over the tokens that are predicted (a loss of exactly 0 is certainty)."""
    return [losses[predicted_BT].double().mean().item() for losses in (losses_BT, after_BT)]


def _after(play: dict[str, Any], after_WV: Tensor, head: Any) -> None:
    for at, output in enumerate(play["outputs"]):
        say_choices(output["choices"], head, after_WV[at], "_after")
        if output["target"] >= 0:
            if "p" in output:
                output["p_after"] = next(choice["p_after"] for choice in output["choices"] if choice["id"] == output["target"])
            output["loss_after"] = play["losses"]["tokens"][1][at]


def _whole_proofs(replay: Replay, result: StepResult, run_dir: str | Path | None) -> list[dict[str, Any]]:
    """Is this the step that was trained? Against the recorded loss, and against the stored weights where there are any."""
    if run_dir is None:
        return []
    step, proofs = replay.step - 1, []
    with Reader(run_dir) as reader:
        steps, losses = reader.series("run", "loss", stream="run")
    found = np.flatnonzero(steps == step)
    if len(found):
        same = np.float32(result.loss) == losses[found[0]]
        proofs.append({"claim": "the replayed loss is the recorded one", "holds": bool(same),
                       "detail": f"{np.float32(result.loss):.9g} and {losses[found[0]]:.9g}"})  # fmt: skip
    saved = checkpoint.saved_steps(Path(run_dir) / "checkpoints")
    if step + 1 in saved:
        stored = checkpoint.load(saved[step + 1]).tensors["model"]
        different = sum(int((value != stored[name].to(value.device)).sum()) for name, value in replay.model.state_dict().items())
        proofs.append({"claim": f"all weights after the step are those of checkpoint {step + 1}", "holds": different == 0,
                       "detail": "bit for bit" if not different else f"{different:,} weights differ"})  # fmt: skip
    return proofs


# ---------------------------------------------------------------------------------------------------- telling


def _tokens(replay: Replay, batch: Any, row: int, window: slice) -> list[dict[str, Any]]:
    tokens, targets = batch.tokens_BT[row, window].tolist(), batch.targets_BT[row, window].tolist()
    positions, head = batch.positions_BT[row, window].tolist(), replay.model.config.head
    found = [{"id": token, "text": token_text(replay, token), "target": target, "position": position,
              "target_text": token_text(replay, target) if target >= 0 and head is None else None}
             for token, target, position in zip(tokens, targets, positions, strict=True)]  # fmt: skip
    if head is not None:  # the label, at the end of a document
        for here, labels_K in zip(found, batch.labels_BTK[row, window], strict=True):
            here["target"] = -1
            if not labels_K[0].isnan():
                told, numbers = as_told(head, labels_K[None].cpu().numpy())[0], head.problem_type == "regression"
                here["target_text"] = ", ".join(f"{v:.4g}" for v in told) if numbers else head.labels[int(told[0])]
    return found


def _document(replay: Replay, row: int, focus: int) -> dict[str, Any]:
    pieces = replay.split.trace(replay.step, replay.config.training.batch_size)
    inside = lambda p: p["row"] == row and p["position_start"] <= focus < p["position_start"] + p["length"]
    found = next((piece for piece in pieces if inside(piece)), {})
    return {key: found.get(key) for key in ("document", "source", "byte_start", "byte_end")}


@contextmanager
def kept(replay: Replay) -> Iterator[dict[str, Tensor]]:
    """Weights, optimizer state and step number as they were, again at the end; yields the weights."""
    model, optimizer, step = replay.model, replay.optimizer, replay.step
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    copy = lambda state: {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    states = {weight: copy(state) for weight, state in optimizer.state.items()}
    try:
        yield start
    finally:
        model.load_state_dict(start)
        model.zero_grad(set_to_none=True)
        optimizer.state.clear()
        optimizer.state.update(states)
        replay.step = step


def _short(value: Any) -> Any:
    """Nine digits name a float32 exactly; sums in float64 lose nothing that matters here, and the file stays small."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if np.isfinite(value) else str(value)
    return value


def main(run_dir: str, step: str) -> None:
    """One JSON line per change of progress, and a last one with the path or the problem."""
    say = lambda **words: print(json.dumps(words), flush=True)
    os.nice(10)  # a training on this machine comes first
    try:
        path = make_theatre(run_dir, int(step), lambda phase, done, total: say(phase=phase, done=done, total=total))
        say(ready=str(path))
    except UserError as error:
        say(problem=str(error))


if __name__ == "__main__":
    main(*sys.argv[1:3])
