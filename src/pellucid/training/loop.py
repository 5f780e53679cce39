"""The loop of picture 1: step after step over the epochs, with evaluation, checkpoints and a clean stop.

Everything a step depends on is in the checkpoint (weights, optimizer state, counters) or is a pure function of the
step (batch, learning rate), so a resumed run equals an unbroken one bit for bit.
"""

from __future__ import annotations

import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pellucid.config import Config, UserError
from pellucid.data.loader import Loader
from pellucid.model.grok import Grok1
from pellucid.training import checkpoint
from pellucid.training.evaluate import split_batches
from pellucid.training.interrupt import StopRequest
from pellucid.training.optimizers import load_optimizer_state, optimizer_state
from pellucid.training.progress import Quiet, after
from pellucid.training.schedules import budget_in_steps, learning_rate_factor
from pellucid.training.step import StepResult, training_step
from pellucid.training.tasks import TASKS


@dataclass
class Counters:
    """What a run has done; saved with every checkpoint."""

    step: int = 0  # steps done = number of the next one
    tokens: int = 0  # predicted so far
    skipped: int = 0  # steps not applied
    skipped_in_a_row: int = 0
    best_loss: float | None = None  # lowest held-out loss
    best_step: int | None = None  # steps done when it was measured


class Loop:
    """Trains `model` on `dataset` by `config`, writing into `run_dir`. `observer` is told what every step did."""

    def __init__(
        self, config: Config, model: Grok1, optimizer: torch.optim.Optimizer, dataset: Any, run_dir: Path,
        observer: Any, progress: Quiet | None = None,
    ):  # fmt: skip
        self.config, self.model, self.optimizer, self.dataset = config, model, optimizer, dataset
        self.run_dir, self.observer, self.progress = run_dir, observer, progress or Quiet()
        self.train_split = dataset.split("train", config.training.seed)
        self.loader = Loader(self.train_split, config.training.batch_size)  # makes the next batches while a step computes
        self.max_steps = budget_in_steps(config, self.train_split)
        self.counters = Counters()
        self.saved_step: int | None = None  # of the newest checkpoint known to be whole
        self.final: Any = None  # on all held-out rows, at the end of the budget
        self.device = model.embedding.weight.device

    def run(self) -> str | None:
        """Train to the end of the budget. Returns the name of the signal that stopped it early, if one did."""
        settings, counters = self.config.training, self.counters
        epoch_at = lambda step: self.train_split.epoch_of(step, settings.batch_size)
        self.progress.start(counters.step, self.max_steps, epoch_at(self.max_steps))
        with self.loader, StopRequest() as stop:
            if counters.step == 0:
                self.evaluate(rows=settings.evaluate_rows)
            while counters.step < self.max_steps and stop.signal_name is None:
                started = time.perf_counter()
                result = self.step()
                self.progress.step(counters.step - 1, result, time.perf_counter() - started, epoch_at(counters.step))
                if counters.skipped_in_a_row >= settings.max_nonfinite_steps:
                    raise UserError(self._explain_nonfinite())
                self._after_step()
            if stop.signal_name is None:
                self.final = self.evaluate(rows=None)
            if self.saved_step != counters.step:
                self.save()
        self.progress.close()
        return stop.signal_name

    def step(self) -> StepResult:
        """One step on its own batch, which follows from the step's number alone."""
        settings, counters = self.config.training, self.counters
        began = time.perf_counter()
        self.observer.begin_step(counters.step)
        batch = self.loader.batch(counters.step)
        size = settings.micro_batch_size
        micro_batches = [batch[i : i + size].to(self.device) for i in range(0, settings.batch_size, size)]
        data_seconds = time.perf_counter() - began
        factor = learning_rate_factor(self.config.schedule, counters.step, self.max_steps)
        result = training_step(self.model, self.optimizer, micro_batches, settings, factor, self.observer)
        result.data_seconds = data_seconds
        self.observer.end_step(counters.step, result)
        counters.step += 1
        counters.tokens += result.tokens
        counters.skipped += not result.applied
        counters.skipped_in_a_row = 0 if result.applied else counters.skipped_in_a_row + 1
        if not result.applied:
            self.progress.say(f"step {counters.step}: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}: skipped")
        return result

    def evaluate(self, rows: int | None) -> Any:
        """As `measure`, recorded and said; None when nothing is held out."""
        if self.dataset.validation is None:
            return None
        result = self.measure(rows)
        self.observer.evaluation(self.counters.step, result)
        more = rows is None and len(self.dataset.validation) > self.config.training.evaluate_rows  # than the evaluations before
        self.progress.say(f"{after(self.counters.step)}: {result.in_words()}{', over all that is held out' if more else ''}")
        return result

    def measure(self, rows: int | None) -> Any:
        """The task's evaluation on the first `rows` held-out rows (None: all of them)."""
        settings = self.config.training
        batches = split_batches(self.dataset.validation, settings.micro_batch_size, rows)
        return TASKS[settings.task].evaluate(self.model, batches, settings, self.dataset.tokenizer.byte_lengths)

    def save(self, best: bool = False) -> Path:
        """A checkpoint of this moment."""
        began = time.perf_counter()
        tensors, facts = optimizer_state(self.optimizer)
        settings = decisive_settings(self.config, self.dataset)
        state = {"counters": vars(self.counters), "optimizer": facts, "settings": settings, "loader": self.loader.state(),
                 "measured": measured_by(self.config)}  # fmt: skip
        folders = {"model": dict(self.model.state_dict()), "optimizer": tensors}
        folder = checkpoint.save(self.checkpoints, self.counters.step, folders, state, best=best)
        self.saved_step = self.counters.step
        if not self.counters.skipped_in_a_row:  # else these weights may be the fault, and the older ones the way back
            checkpoint.retain(self.checkpoints, self.config.checkpoint.keep_last, self.config.checkpoint.keep_best, self._warn)
        self.observer.saved(time.perf_counter() - began)
        return folder

    def _warn(self, path: Path, reason: str) -> None:
        self.progress.say(f"{path}: damaged ({reason}); not used")

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def resume(self) -> None:
        """Continue from the newest good checkpoint; a run killed before its first one begins again.

        Raises UserError when all are damaged, or when they belong to another run.
        """
        checkpoint.clean(self.checkpoints)
        if not checkpoint.saved_steps(self.checkpoints):
            self.progress.say("nothing was saved yet: starting from step 0")
            return
        saved = checkpoint.newest_good(self.checkpoints, on_bad=self._warn)
        if saved is None:
            raise UserError(f"{self.checkpoints}: no checkpoint is intact; start anew in another --run-dir")
        differences = checkpoint.diff_settings(saved.state["settings"], decisive_settings(self.config, self.dataset))
        if differences:
            raise UserError(f"{saved.folder}: cannot resume, these settings have changed: {'; '.join(differences)}")
        self.loader.restore(saved.state["loader"])
        self.model.load_state_dict(saved.tensors["model"])
        load_optimizer_state(self.optimizer, saved.tensors["optimizer"], saved.state["optimizer"])
        self.counters = Counters(**saved.state["counters"])
        now = measured_by(self.config)
        if saved.state.get("measured", now) != now:  # its lowest held-out loss is none that is measured from here on
            self.counters.best_loss = self.counters.best_step = None
        self.saved_step = self.counters.step

    def _after_step(self) -> None:
        """What is due every so many steps."""
        settings, saving, step = self.config.training, self.config.checkpoint, self.counters.step
        if step == self.max_steps:
            return
        best = False
        if settings.evaluate_every and step % settings.evaluate_every == 0:
            result = self.evaluate(rows=settings.evaluate_rows)
            lowest = math.inf if self.counters.best_loss is None else self.counters.best_loss
            best = result is not None and result.loss < lowest
            if best:
                self.counters.best_loss, self.counters.best_step = result.loss, step
        if (best and saving.keep_best) or (saving.every_steps and step % saving.every_steps == 0):
            self.save(best=best)

    def _explain_nonfinite(self) -> str:
        """Skipped steps leave the weights as they are, so no lower rate helps from there: the way on begins before them."""
        first_skipped = self.counters.step - self.counters.skipped_in_a_row
        saved = checkpoint.saved_steps(self.checkpoints)
        before = [step for step in saved if step < first_skipped]
        same = ", ".join(folder.name for step, folder in saved.items() if step >= first_skipped)
        removing = f", after removing {same} of {self.checkpoints} (saved with the weights of these steps)" if same else ""
        run, optimizer = shlex.quote(str(self.run_dir)), self.config.optimizer
        names = ["learning_rate"] + ["muon_learning_rate"] * (optimizer.name == "muon")
        lower = " ".join(f"optimizer.{name}={getattr(optimizer, name) / 10:.3g}" for name in names)
        return (
            f"step {self.counters.step}: loss or gradient was not finite {self.counters.skipped_in_a_row} times in a row, and "
            f"none of them was applied; look at their data (pellucid trace {run} --step {first_skipped}), or go on with a lower "
            f"optimizer.learning_rate from step {max(before, default=0)}{removing}: pellucid train {lower} --run-dir {run} --resume"
        )


def decisive_settings(config: Config, dataset: Any) -> dict[str, Any]:
    """What may not change between a checkpoint and its continuation."""
    optimizer = config.optimizer
    return {
        "model": config.model.model_dump(mode="json", exclude={"preset", "init_from"}),
        "data": {"fingerprint": dataset.fingerprint, "tokenizer": dataset.tokenizer.fingerprint},
        "training": config.training.model_dump(mode="json", include={"seed", "batch_size", "precision", "task"}),
        "optimizer": {"name": optimizer.name} | ({"state_dtype": optimizer.state_dtype} if optimizer.state_dtype != "fp32" else {}),
    }


def measured_by(config: Config) -> dict[str, Any]:
    """What may change between a checkpoint and its continuation, but makes the held-out loss while training another number."""
    names = {"label_smoothing", "class_weights", "huber_delta", "evaluate_rows"}
    return config.training.model_dump(mode="json", include=names)
