"""Texts to measure on: documents of files, of prepared data, of a run; and what a model expects of their tokens.

Letters: B rows, T positions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.config import DataConfig, NormalizeConfig, SourceConfig, UserError, is_of_a_run, load_config
from pellucid.data.dataset import MANIFEST, Dataset
from pellucid.data.document import Unreadable
from pellucid.data.place import folder_of_run
from pellucid.data.sources import list_files, read_documents
from pellucid.data.stages.normalize import normalize
from pellucid.data.stages.textview import hash_text, mix
from pellucid.exchange.folder import read_json
from pellucid.exchange.load import run_of
from pellucid.model.grok import Grok1
from pellucid.training.losses import linear_cross_entropy

Progress = Callable[..., None]
FORWARD_TOKENS = 8192  # predicted at once: bounds memory


@dataclass
class Texts:
    """Some documents and, aligned with them, which source each is from."""

    texts: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    whole: bool = True  # False: a sample of a larger whole


def trained_with(place: str | Path) -> DataConfig | None:
    """The data settings of a run, its model/ or a checkpoint of it; other formats do not say them."""
    path = run_of(Path(os.path.abspath(place)))
    run = path.parent if path.name == "model" and is_of_a_run(path.parent / "config.toml") else path
    file = run / "config.toml"
    return load_config(file).data if file.is_file() else None


def open_dataset(place: str | Path) -> Dataset | None:
    """The prepared data behind a run or a folder of prepared data; None where `place` is neither. Raises UserError."""
    path = run_of(Path(place))
    if not (path / MANIFEST).is_file():
        return None
    manifest = read_json(path / MANIFEST)
    data = manifest.get("data")
    if (path / "config.toml").is_file() and isinstance(data, dict) and isinstance(data.get("directory"), str):
        return Dataset(folder_of_run(path, data))
    return Dataset(path) if "splits" in manifest else None


def held_out_by(place: str | Path) -> Dataset:
    """The prepared data of a run that held some out (`validation` is there). Raises UserError."""
    dataset = open_dataset(place)
    if dataset is None:
        raise UserError(f"{place}: not a run, so it has no held-out text of its own; give some with --data FILE")
    if dataset.validation is None:
        raise UserError(f"{place}: the run held no text out; give some with --data FILE")
    return dataset


def file_texts(
    places: Sequence[str], limit: int, option: str, text_field: str = "text", normalization: NormalizeConfig | None = None
) -> Texts:
    """Documents of files, folders, globs or builtins; of more than `limit` bytes a sample. Raises UserError where none has text.

    normalization: of the training text, so that both are read alike; None takes the defaults.
    """
    files = list_files([SourceConfig(path=place, text_field=text_field) for place in places], option)
    share = min(1.0, limit / max(1, sum(file.size for file in files)))
    found, config = Texts(whole=share == 1.0), normalization or NormalizeConfig()
    for file in files:
        for document in read_documents(file):
            if isinstance(document, Unreadable):
                raise UserError(document.message_for_options)
            chosen = share == 1.0 or hash_text(document.text) < share * 2.0**64  # whatever the order of documents
            if chosen and (text := normalize(document.text, config)).strip():
                found.texts.append(text)
                found.sources.append(places[file.source_index])
    if not found.texts:
        raise UserError(f"{option}: {', '.join(places)} holds no text" if found.whole else
                        f"{option}: the sample of {', '.join(places)} holds no text; raise --megabytes")
    return found


def split_documents(dataset: Dataset, name: str, limit: int) -> list[int]:
    """Numbers of the documents of a split; of more than `limit` bytes of text a sample."""
    record, count = dataset.manifest["splits"][name], dataset.manifest["splits"][name]["documents"]
    share = min(1.0, limit / max(1, record["text_bytes"]))
    drawn = mix(np.arange(count, dtype=np.uint64)) >> np.uint64(11)
    return np.flatnonzero(drawn.astype(np.float64) < share * 2.0**53).tolist()


def split_texts(dataset: Dataset, name: str, limit: int) -> Texts:
    """The texts of a split of prepared data; of more than `limit` bytes a sample."""
    split, numbers, found = dataset.split(name), split_documents(dataset, name, limit), Texts()
    sources = dataset.config.validation if name == "validation" and dataset.config.validation else dataset.config.sources
    found.whole = len(numbers) == len(split.reader.starts)
    for number in numbers:
        first, last = int(split.reader.starts[number]), int(split.reader.ends[number])
        found.texts.append(dataset.tokenizer.decode(split.reader.tokens(np.arange(first, last - 1)).tolist()))
        found.sources.append(sources[int(split.reader.source_index[number])].path)
    return found


def token_streams(model_place: str, data: str | None, tokenizer: Any, limit: int, text_field: str = "text") -> list[np.ndarray]:
    """Documents as streams eos + text + eos of token ids (int64): of `data`, normalized as a run's text was, else those it held out.

    limit: bytes of text, more is sampled. Raises UserError when there is neither.
    """
    eos = tokenizer.eos_token_id
    if data is not None:
        settings = trained_with(model_place)
        texts = file_texts([data], limit, "--data", text_field, settings and settings.normalize).texts
        return [np.array([eos, *tokenizer.encode(text), eos], dtype=np.int64) for text in texts]
    dataset = held_out_by(model_place)
    reader = dataset.validation.reader
    return [np.concatenate([[eos], reader.tokens(np.arange(reader.starts[number], reader.ends[number]))])
            for number in split_documents(dataset, "validation", limit)]


@torch.no_grad()
def token_losses(model: Grok1, inputs_BT: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
    """Cross-entropy in nats, float64 [B, T]; 0 where the target is negative. One document per row, positions from 0."""
    B, T = inputs_BT.shape
    device, found = model.embedding.weight.device, np.zeros((B, T))
    rows = max(1, FORWARD_TOKENS // T)
    for start in range(0, B, rows):
        tokens = torch.from_numpy(inputs_BT[start : start + rows]).to(device)
        targets = torch.from_numpy(np.where(targets_BT < 0, -100, targets_BT)[start : start + rows]).to(device)
        hidden, _ = model.hidden_states(tokens, segment_ids=torch.ones_like(tokens, dtype=torch.int32))
        losses = linear_cross_entropy(hidden.flatten(0, 1), model.embedding.weight, targets.flatten(),
                                      multiplier=model.config.output_multiplier_scale).per_token_N
        found[start : start + rows] = losses.view(tokens.shape).double().cpu().numpy()
    return found


def pooled_states(model: Grok1, tokenizer: Any, texts: Sequence[str], T: int) -> np.ndarray:
    """float64 [documents, D]: the mean final state over the first T tokens of each text, the model's embedding of it."""
    device, pooled = model.embedding.weight.device, []
    for text in texts:
        tokens: Tensor = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)][:T]], device=device)
        with torch.no_grad():
            pooled.append(model.hidden_states(tokens)[0][0].double().mean(0).cpu().numpy())
    return np.stack(pooled)
