"""How well a model predicts whole files, or what its run held out: every token of every document once.

Of files, a document is eos + text, and text + eos is predicted (as in training), in windows of its context. Windows do not overlap: the
first tokens of a window see little before them, so a longer `context` gives a lower loss. Letters: B windows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pellucid.config import NormalizeConfig, SourceConfig, UserError, load_config
from pellucid.data.dataset import IGNORE, Batch, Dataset
from pellucid.data.document import Unreadable
from pellucid.data.sources import list_files, read_documents
from pellucid.data.stages.normalize import normalize
from pellucid.exchange.load import run_of
from pellucid.model.grok import Grok1
from pellucid.training.evaluate import Evaluation, evaluate_batches, split_batches
from pellucid.training.tasks import TASKS, LabelEvaluation

WINDOWS = 16  # predicted at once
DEFAULT_CONTEXT = 1024  # where neither the caller nor the model's training says


def evaluate_files(
    model: Grok1, tokenizer: Any, path: str, text_field: str = "text", context: int | None = None,
    progress: Callable[[str, int, int | None], None] | None = None, normalization: NormalizeConfig | None = None,
) -> Evaluation:  # fmt: skip
    """Loss over all documents of `path` (anything data.sources accepts), normalised as the model's training text was.

    normalization: None takes the defaults. Raises UserError when nothing is there.
    """
    context = context or min(DEFAULT_CONTEXT, model.config.max_position_embeddings)
    files = list_files([SourceConfig(path=path, text_field=text_field)], "--data")
    total, done = sum(file.size for file in files), 0
    result = Evaluation()
    for file in files:
        for text in _texts(file, normalization or NormalizeConfig()):
            stream = torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id])
            text_bytes = len(text.encode())
            bytes_per_token = text_bytes / (len(stream) - 1)

            def tell(tokens: int, share: float = bytes_per_token) -> None:
                nonlocal done
                done += tokens * share
                if progress is not None:
                    progress("evaluating", min(round(done), total), total)

            found = evaluate_batches(model, _windows(tokenizer, stream, context), tokenizer.byte_lengths, tell)
            result += replace(found, text_bytes=text_bytes)  # also of what the tokenizer does not keep
    if not result.tokens:
        raise UserError(f"{path}: holds no text to evaluate")
    return result


def evaluate_held_out(
    model: Grok1, place: str | Path, dataset: Dataset, progress: Callable[[str, int, int | None], None] | None = None
) -> tuple[Evaluation | LabelEvaluation, int]:
    """(what the run of `place` measures at its end, of this model; how many labelled documents were cut to length).

    dataset: its data (`held_out_by`); all that is held out counts, in the rows of its training and by its task.
    """
    split, settings = dataset.validation, load_config(run_of(Path(place)) / "config.toml").training

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(split_batches(split, settings.micro_batch_size)):
            yield batch
            if progress is not None:
                progress("evaluating", min((number + 1) * settings.micro_batch_size, len(split)), len(split))

    return TASKS[settings.task].evaluate(model, batches(), settings, dataset.tokenizer.byte_lengths), split.plan.truncated


def _texts(file: Any, normalization: NormalizeConfig) -> Iterator[str]:
    for document in read_documents(file):
        if isinstance(document, Unreadable):
            raise UserError(document.message_for_options)
        if (text := normalize(document.text, normalization)).strip():  # training drops blank ones too
            yield text


def _windows(tokenizer: Any, stream: torch.Tensor, T: int) -> Iterator[Batch]:
    """Batches of up to WINDOWS rows; the last row of a document is padded."""
    T = min(T, len(stream) - 1)
    rows = -(-(len(stream) - 1) // T)
    tokens = torch.full((rows * T,), tokenizer.pad_token_id)
    targets = torch.full((rows * T,), IGNORE)
    tokens[: len(stream) - 1], targets[: len(stream) - 1] = stream[:-1], stream[1:]
    tokens, targets = tokens.view(rows, T), targets.view(rows, T)
    segments = (targets != IGNORE).to(torch.int32)
    positions = torch.arange(T, dtype=torch.int32).expand(rows, T)
    ids = torch.arange(rows)
    for start in range(0, rows, WINDOWS):
        part = slice(start, start + WINDOWS)
        yield Batch(*(t[part] for t in (tokens, targets, segments, positions, ids, torch.zeros_like(ids))))
