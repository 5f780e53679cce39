"""One training run as a job of a plan: settings in, losses out. The loop and the step are those of every run.

Held-out losses come per document, so that runs can be compared document by document. Letters: G documents.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pellucid.config import Config, UserError, make_config
from pellucid.data.dataset import IGNORE, Dataset, Split
from pellucid.measure.enough_memory import memory_limit
from pellucid.measure.outcome import replace
from pellucid.measure.random_tokens import RandomTokens
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.model.size import parameter_counts, training_bytes
from pellucid.observe.observer import SilentObserver
from pellucid.training.device import choose_device, choose_precision
from pellucid.training.evaluate import evaluate_batches, split_batches
from pellucid.training.loop import Loop, budget_in_steps
from pellucid.training.losses import linear_cross_entropy
from pellucid.training.optimizers import build_optimizer
from pellucid.training.progress import Quiet
from pellucid.training.step import training_step

TRAINING = "pellucid.measure.training:train_once"
TRIAL_STEPS, TRIAL_SECONDS = 3, 10.0  # by which the speed of a shape is estimated, at most


def train_once(settings: dict[str, Any], scratch: Path, tell: Callable[[float], None]) -> dict[str, Any]:
    """settings: `config` (tables); `data`: a folder of prepared data, or the arguments of RandomTokens; `points`: how often
    the losses are taken, at equal distances and at the end; `rows`: of training and held-out text, for these.

    Returns losses in nats per token: `curve` (step, train, held_out), both at the end on all held-out text, and `documents`:
    nats and tokens of each held-out document.
    """
    dataset = open_data(settings["data"], settings["config"])
    config = fitted(settings["config"], dataset)
    model, optimizer = build(config)
    curve = _Curve(model, dataset, config, settings["rows"], scratch / "curve.json")
    loop = Loop(config, model, optimizer, _Unheld(dataset), scratch, curve, _Told(tell))
    points = settings["points"]
    curve.wanted = {round(loop.max_steps * n / points) for n in range(1, points)}
    loop.resume()
    curve.resume(loop.counters.step)
    if loop.run() is not None:
        raise KeyboardInterrupt  # a signal: what was done is in scratch
    result = {"steps": loop.max_steps, "tokens": loop.counters.tokens, "parameters": parameter_counts(config.model),
              "train": curve.loss("train", settings["rows"])}
    if isinstance(dataset, Dataset):
        nats, tokens = document_losses(model, dataset.validation)
        result["documents"] = {"nats": nats.tolist(), "tokens": tokens.tolist()}
        result["held_out"] = float(nats.sum() / tokens.sum())
    else:
        result["held_out"] = curve.loss("validation", None)
    last = {"step": loop.max_steps, "train": result["train"], "held_out": result["held_out"]}
    return {**result, "curve": [*curve.points, last]}


def open_data(data: str | dict[str, int], tables: dict[str, Any]) -> Any:
    """A folder of prepared data, read as the configuration's [data] says, or random tokens."""
    if isinstance(data, dict):
        _refuse_beyond_memory(8 * data["count"] * data["length"], f"{data['count']:,} random sequences")
        return RandomTokens(**data)
    return Dataset(data, verify=False, run=make_config(tables).data)


def _refuse_beyond_memory(needed: int, what: str, device: torch.device | None = None) -> None:
    """device: where it is to lie; None: in the machine's own memory."""
    on_gpu = device is not None and device.type == "cuda"
    own = memory_limit() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    there, where = (torch.cuda.get_device_properties(device).total_memory, "its GPU") if on_gpu else (own, "this machine")
    if needed > there:
        raise UserError(f"{what} need {needed / 1e9:,.0f} GB, and {where} has {there / 1e9:,.0f} GB: ask for less")


def fitted(tables: dict[str, Any], dataset: Any) -> Config:
    """The configuration with the vocabulary and special tokens of the data."""
    tokenizer = dataset.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return make_config({**tables, "model": {**tables["model"], "vocab_size": tokenizer.vocab_size, **ids}})


def build(config: Config) -> tuple[Grok1, torch.optim.Optimizer]:
    device = choose_device(config.training.device)
    model = initialize(Grok1(config.model, device=device), config.training.seed)
    model.compute_dtype, model.parity = choose_precision(config.training.precision, device)
    return model, build_optimizer(model, config.optimizer, config.training.seed)


def estimate(tables: dict[str, Any], data: Any, known: dict[str, float]) -> float:
    """Seconds of one run, from the time of a few steps of its very shape now; `known` remembers shapes already timed.

    Raises UserError for a model or random text that this machine's memory cannot hold.
    """
    dataset = open_data(data, tables)
    config = fitted(tables, dataset)
    key = repr((config.model, config.training.batch_size, config.data.sequence_length, config.training.precision,
                config.optimizer.name))  # fmt: skip
    if key not in known:
        _refuse_beyond_memory(training_bytes(config.model), f"the {parameter_counts(config.model)['total']:,} parameters of a model, "
                              "with gradient and optimizer,", choose_device(config.training.device))  # fmt: skip
        model, optimizer = build(config)
        batch = dataset.split("train", 0).batch(0, config.training.batch_size).to(model.embedding.weight.device)
        times = []
        for _ in range(TRIAL_STEPS):
            began = time.perf_counter()
            training_step(model, optimizer, [batch], config.training, 1e-3, SilentObserver())
            times.append(time.perf_counter() - began)
            if sum(times) > TRIAL_SECONDS:
                break
        known[key] = min(times)
    steps = budget_in_steps(config, dataset.split("train", config.training.seed))
    return known[key] * (steps + len(dataset.validation) / config.training.batch_size)


@torch.no_grad()
def document_losses(model: Grok1, split: Split, rows_at_once: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """(nats, predicted tokens) of each document of a split, float64 [G]."""
    plan, G = split.plan, len(split.reader.starts)
    nats, tokens = np.zeros(G), np.zeros(G)
    for start in range(0, len(split), rows_at_once):
        batch = split.rows(start, start + rows_at_once).to(model.embedding.weight.device)
        hidden, _ = model.hidden_states(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)
        targets = batch.targets_BT.flatten()
        losses = linear_cross_entropy(hidden.flatten(0, 1), model.embedding.weight, targets,
                                      multiplier=model.config.output_multiplier_scale).per_token_N
        losses = losses[targets != IGNORE].double().cpu().numpy()
        pieces = np.concatenate([np.arange(plan.row_first[r], plan.row_first[r + 1]) for r in batch.sample_ids_B.tolist()])
        owner = np.repeat(plan.document[pieces], plan.length[pieces])  # pieces fill a row from its start, in order
        nats += np.bincount(owner, weights=losses, minlength=G)
        tokens += np.bincount(owner, minlength=G)
    return nats, tokens


class _Curve(SilentObserver):
    """Takes held-out and training loss after the wanted steps, and keeps them in a file, that a stop may not lose them."""

    def __init__(self, model: Grok1, dataset: Any, config: Config, rows: int, file: Path):
        self.file = file
        self.model, self.dataset, self.rows, self.size = model, dataset, rows, config.training.micro_batch_size
        self.wanted: set[int] = set()
        self.points: list[dict[str, float | None]] = []

    def end_step(self, step: int, result: Any) -> None:
        if step + 1 in self.wanted:
            losses = {name: self.loss(split, self.rows) for name, split in (("train", "train"), ("held_out", "validation"))}
            self.points.append({"step": step + 1, **losses})
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace(self.file, json.dumps(self.points))

    def resume(self, step: int) -> None:
        """The points of so many steps; those of later ones, which are done again, are taken again."""
        try:
            kept = json.loads(self.file.read_bytes())
        except (OSError, ValueError):  # none was taken, or a power cut took them
            kept = []
        self.points = [point for point in kept if point["step"] <= step]

    def loss(self, name: str, rows: int | None) -> float | None:
        """On the first rows of a split in its fixed order; None: all of them."""
        split = getattr(self.dataset, name)
        if split is None or rows == 0:
            return None
        return evaluate_batches(self.model, split_batches(split, max(32, self.size), rows), self.dataset.tokenizer.byte_lengths).loss


class _Unheld:
    """The dataset without its held-out text: the loop is to train only, losses are taken here."""

    def __init__(self, dataset: Any):
        self.validation, self.split = None, dataset.split
        self.tokenizer, self.fingerprint = dataset.tokenizer, dataset.fingerprint


class _Told(Quiet):
    """Passes the share of steps done."""

    def __init__(self, tell: Callable[[float], None]):
        self.tell = tell

    def start(self, step: int, max_steps: int, epochs: float) -> None:
        self.max_steps = max_steps

    def step(self, step: int, result: Any, seconds: float, epoch: float) -> None:
        self.tell((step + 1) / self.max_steps)
