"""What a run says to the person before it starts, and when it is done: sizes, a sample of its work, a baseline to beat."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from pellucid.measure.bigram import bigram_loss
from pellucid.measure.documents import answer, in_digits, told
from pellucid.model.size import parameter_counts
from pellucid.observe.reader import Reader
from pellucid.observe.store import FILE_NAME
from pellucid.observe.writing import continued, prompt_of
from pellucid.run_files import Run
from pellucid.training.loop import Loop
from pellucid.training.progress import Quiet, after

BIGRAM_TOKENS = 20_000_000  # beyond this the baseline would cost more than a glance
SAMPLE_TOKENS = 100
SAMPLE_DOCUMENTS, EXCERPT = 3, 60


def describe(loop: Loop, folder: Path) -> str:
    """What is about to happen, in a few lines."""
    config, counts, train = loop.config, parameter_counts(loop.config.model), loop.train_split
    held_out = len(loop.dataset.validation) if loop.dataset.validation else 0
    precision = "bf16, fp32 master weights" if loop.model.compute_dtype == torch.bfloat16 else "fp32"
    tokens = loop.max_steps * config.training.batch_size * config.data.sequence_length
    return (
        f"data       {train.tokens_per_epoch:,} tokens an epoch in rows of {train.sequence_length}, {held_out} rows held out"
        f" ({'reused ' if loop.dataset.reused else ''}{loop.dataset.directory})\n"
        f"{_smaller_tokenizer(loop)}"
        f"{_labels(loop)}"
        f"model      {counts['total']:,} parameters, {counts['active']:,} active for each token\n"
        f"training   {loop.max_steps:,} steps of {config.training.batch_size} x {config.data.sequence_length} tokens "
        f"({tokens:,}) with {config.optimizer.name}, {precision}, on {loop.device}\n"
        f"{_short_of_warm_up(loop)}"
        f"run        {folder}"
    )


def _smaller_tokenizer(loop: Loop) -> str:
    wanted, found = loop.config.data.tokenizer, loop.dataset.tokenizer.vocab_size
    if wanted.kind not in ("bpe", "sentencepiece", "unigram") or loop.config.data.prepared or found >= wanted.vocab_size:
        return ""
    return f"           its text gives a tokenizer of {found:,} tokens, not {wanted.vocab_size:,} (data.tokenizer.vocab_size)\n"


def _short_of_warm_up(loop: Loop) -> str:
    warm_up = loop.config.schedule.warmup_steps
    if loop.max_steps >= warm_up:
        return ""
    reached = f"{loop.max_steps / warm_up:.0%} of its learning rate"
    return f"           its warm-up takes {warm_up} steps (schedule.warmup_steps), so it ends at {reached}\n"


def _labels(loop: Loop) -> str:
    labels = loop.dataset.labels
    if labels is None:
        return ""
    documents, cut = len(loop.train_split.labels), loop.train_split.plan.truncated
    if "counts" in labels:
        what = f"{len(labels['names'])} classes"
    else:
        what = ", ".join(f"{name} ({mean:.4g} ± {std:.4g})"
                         for name, mean, std in zip(labels["names"], labels["mean"], labels["std"], strict=True))  # fmt: skip
    side = {"right": "start", "left": "end"}[loop.config.data.truncation_side]
    shortened = f"; of {cut:,} longer than a row only the {side} is read" if cut else ""
    return f"labels     {what} of {documents:,} documents{shortened}\n"


def show_sample(progress: Quiet, when: str, loop: Loop) -> None:
    """Some of the model's own work on held-out text, so that learning can be read."""
    prompt, text = _labelled(loop) if loop.dataset.labels else _continued(loop)
    progress.say(f"\n--- {when} ---\n{prompt}|{text}\n---\n" if not loop.dataset.labels else f"\n--- {when} ---\n{text}\n---\n")
    loop.observer.text_sample(loop.counters.step, prompt, text)


def _continued(loop: Loop) -> tuple[str, str]:
    prompt = prompt_of(loop.dataset)
    return prompt, continued(loop.model, loop.dataset.tokenizer, prompt, SAMPLE_TOKENS)


def _labelled(loop: Loop) -> tuple[str, str]:
    split = loop.dataset.validation or loop.dataset.train
    documents = [split.document(n) for n in range(min(SAMPLE_DOCUMENTS, len(split.labels)))]
    outputs_MK, _ = answer(loop.model, loop.dataset.tokenizer, [document["text"] for document in documents])
    lines = []
    for document, outputs_K in zip(documents, outputs_MK, strict=True):
        excerpt = " ".join(document["text"].split())[:EXCERPT]
        label = document["label"]
        if loop.model.config.head.problem_type == "regression":
            label = in_digits(loop.model.config.head, np.atleast_1d(json.loads(str(label))))
        lines.append(f"{excerpt!r}: {label}, predicted {told(loop.model.config.head, outputs_K)}")
    return "", "\n".join(lines)


def show_result(progress: Quiet, loop: Loop) -> None:
    if loop.final is None:
        return
    progress.say(_labels_result(loop) if loop.dataset.labels else _text_result(loop))
    counters = loop.counters
    if counters.best_step is not None and counters.best_loss < loop.measure(loop.config.training.evaluate_rows).loss:
        kept = loop.checkpoints / f"step-{counters.best_step}"
        where = f": {kept}" if kept.exists() else ""
        progress.say(f"its lowest held-out loss was {counters.best_loss:.4f}, {after(counters.best_step)}{where}")


def what_next(run: Run) -> str:
    folder, text = shlex.quote(str(run.directory)), run.config.training.task == "language_modeling"
    use = f"pellucid generate {folder}{_prompt(run)}" if text else f"pellucid predict {folder} --data FILE"
    alarms = _alarms(run)
    watch = f"  pellucid watch {folder}" + (f"    # {alarms}" if alarms else "")
    return f"the run is in {run.directory}. Next:\n  {use}\n  pellucid evaluate {folder} --data FILE\n{watch}"


def _prompt(run: Run) -> str:
    """An option with some words of the run's own kind of text."""
    lines = prompt_of(run.dataset()).strip().splitlines()
    words = "".join(filter(str.isprintable, lines[0] if lines else ""))[:24].strip()
    return f" --prompt {shlex.quote(words)}" if words else ""


def _alarms(run: Run) -> str:
    """What the rules raised, by name, most frequent first; empty where nothing was, or nothing was recorded."""
    if not (run.directory / FILE_NAME).exists():
        return ""
    with Reader(run.directory) as reader:
        raised = Counter(event["rule"] for event in reader.events() if event["severity"] == "alarm")
    return "alarms: " + ", ".join(f"{count} {rule}" for rule, count in raised.most_common()) if raised else ""


def _text_result(loop: Loop) -> str:
    dataset = loop.dataset
    if dataset.train.tokens_per_epoch > BIGRAM_TOKENS:
        return loop.final.in_words()
    baseline = bigram_loss(dataset.train, dataset.validation)
    return f"held-out loss {loop.final.loss:.4f}; a bigram model of the same training text: {baseline:.4f}"


def _labels_result(loop: Loop) -> str:
    """Against an answer that does not look at the text: the most frequent class, or the mean."""
    labels = loop.dataset.labels
    if "counts" in labels:
        common = int(np.argmax(labels["counts"]))
        share = float((loop.dataset.validation.labels[:, 0] == common).mean())
        return f"{loop.final.in_words()}; always saying '{labels['names'][common]}' has accuracy {share:.3f}"
    spread = np.square(loop.dataset.validation.labels).mean(0) ** 0.5 * labels["std"]
    said = ", ".join(f"{each:.4g}" for each in spread)
    return f"{loop.final.in_words()}; always saying the mean has RMSE {said}"
