"""From a step back to its text: which documents were in the batch, how each fared, and the tokens that surprised most.

Nothing is replayed: the batch is a pure function of (seed, step), and each document's loss was recorded with the step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pellucid.config import Config, UserError, load_config
from pellucid.data.dataset import Dataset, Split
from pellucid.data.place import folder_of_run
from pellucid.observe.reader import Reader

CONTEXT = 12  # tokens shown before a surprising one
EXCERPT = 160  # characters


@dataclass
class Document:
    """One document piece of the batch. loss: mean nats per token, of NaN too; None where it was not recorded."""

    source: str
    byte_start: int
    byte_end: int
    exact: bool  # the bytes are the piece's own, else its whole document's
    document: int
    row: int
    segment: int
    tokens: int
    loss: float | None
    worst_token: float | None
    excerpt: str
    label: str | None = None  # of a labelled document: what was to be predicted at its end


@dataclass
class SurprisingToken:
    """A token the model did not expect, with what stood before it."""

    loss: float
    row: int
    position: int
    before: str
    token: str
    source: str


@dataclass
class Trace:
    """The batch of one step; documents by falling loss."""

    step: int
    loss: float
    documents: list[Document] = field(default_factory=list)
    tokens: list[SurprisingToken] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_run(run_dir: str | Path) -> tuple[Config, Dataset]:
    """A run's configuration and data. Raises UserError where one is missing."""
    folder = Path(run_dir)
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a run directory (manifest.json cannot be read: {error})") from None
    config = load_config(folder / "config.toml")
    return config, Dataset(folder_of_run(folder, manifest["data"]), verify=False, run=config.data)


def trace(run_dir: str | Path, step: int) -> Trace:
    """The documents of one step's batch with their losses. Raises UserError when the step was not recorded."""
    with Reader(run_dir) as reader:
        steps, losses = reader.series("run", "loss", stream="run")
        at = np.flatnonzero(steps == step)
        if not len(at):
            known = f"steps {steps[0]} to {steps[-1]} are" if len(steps) else "no step is"
            raise UserError(f"{run_dir}: step {step} is not recorded; {known}")
        recorded = {(d["row"], d["segment"]): (d["loss"], d["worst"]) for d in reader.document_losses(step)}
        worst = reader.worst_tokens(step)
    config, dataset, split = training_split(run_dir)
    result = Trace(step, float(losses[at[0]]))
    pieces = split.trace(step, config.training.batch_size)
    batch = split.batch(step, config.training.batch_size)
    decode = dataset.tokenizer.decode
    for piece in pieces:
        start = piece["position_start"]
        tokens = batch.targets_BT[piece["row"], start : start + piece["length"]].tolist()
        loss, worst_token = recorded.get((piece["row"], piece["segment"]), (None, None))
        result.documents.append(Document(
            piece["source"], piece["byte_start"], piece["byte_end"], bool(piece.get("exact", True)), piece["document"],
            piece["row"], piece["segment"], piece["length"], loss, worst_token,
            decode([t for t in tokens if t >= 0])[:EXCERPT], piece["label"]))  # fmt: skip
    result.documents.sort(key=lambda document: height(document.loss), reverse=True)
    for token in worst:
        row, position = token["row"], token["position"]
        piece = _piece_at(pieces, row, position)
        begin = max(position + 1 - CONTEXT, piece["position_start"] if piece else 0)
        before = batch.tokens_BT[row, begin : position + 1].tolist()
        came = piece["label"] if piece and piece["label"] is not None else decode([token["target"]])
        result.tokens.append(SurprisingToken(token["loss"], row, position, decode(before), came,
                                             piece["source"] if piece else ""))  # fmt: skip
    return result


def height(loss: float | None) -> float:
    """Not finite is worse than any number; not recorded were those with the lowest losses of a large batch."""
    if loss is None:
        return -np.inf
    return loss if np.isfinite(loss) else np.inf


def _piece_at(pieces: list[dict], row: int, position: int) -> dict | None:
    inside = lambda p: p["row"] == row and p["position_start"] <= position < p["position_start"] + p["length"]
    return next((p for p in pieces if inside(p)), None)


def render(result: Trace, documents: int = 20) -> Group:
    """For the terminal."""
    table = Table(title=f"step {result.step}: loss {result.loss:.4f}, {len(result.documents)} document pieces", expand=True)
    for name, options in {"loss": {"justify": "right"}, "worst": {"justify": "right"}, "tokens": {"justify": "right"},
                          "where": {"overflow": "fold"}, "text": {"ratio": 1}}.items():  # fmt: skip
        table.add_column(name, **options)
    number = lambda value: "not recorded" if value is None else f"{value:.3f}"
    for d in result.documents[:documents]:
        where = f"{d.source} bytes {d.byte_start}-{d.byte_end}{'' if d.exact else ' (whole document)'}"
        text = ("" if d.label is None else f"[{d.label}] ") + " ".join(d.excerpt.split())
        table.add_row(number(d.loss), number(d.worst_token), str(d.tokens), Text(where), Text(text))
    words = Table(title="most surprising tokens", expand=True)
    words.add_column("loss", justify="right")
    words.add_column("... text before -> token", ratio=1)
    for token in result.tokens:
        line = Text(repr(token.before)[1:-1], style="dim")
        line.append(f" -> {token.token!r}", style="bold")
        words.add_row(f"{token.loss:.2f}", line)
    return Group(table, words)


def training_split(run_dir: str | Path) -> tuple[Config, Dataset, Split]:
    """Configuration, data and training split of a run, in the run's order."""
    config, dataset = open_run(run_dir)
    return config, dataset, dataset.split("train", config.training.seed)
