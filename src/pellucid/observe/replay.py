"""Any step of a run, done again: from the nearest checkpoint before it (or the beginning), bit for bit on one machine.

A step is a pure function of weights, optimizer state and step number, so telemetry need not keep tensors: they can be
made again. A capsule (capsules/step-N.safetensors) keeps one replayed step's tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pellucid.config import Config, UserError, make_config
from pellucid.data.dataset import Dataset, Split
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.observe.observer import SilentObserver
from pellucid.observe.reader import Reader
from pellucid.observe.trace import training_split
from pellucid.training import checkpoint
from pellucid.training.device import choose_device, choose_precision
from pellucid.training.loop import budget_in_steps
from pellucid.training.optimizers import build_optimizer, load_optimizer_state, optimizer_state
from pellucid.training.schedules import learning_rate_factor
from pellucid.training.step import StepResult, training_step

MOST_REPLAYED = 500  # steps between a checkpoint and the step asked for


@dataclass
class Replay:
    """A run's state just before step `step`."""

    config: Config
    dataset: Dataset
    split: Split
    model: Grok1
    optimizer: torch.optim.Optimizer
    max_steps: int
    step: int

    def micro_batches(self) -> list[Any]:
        settings = self.config.training
        batch, size = self.split.batch(self.step, settings.batch_size), settings.micro_batch_size
        device = self.model.embedding.weight.device
        return [batch[i : i + size].to(device) for i in range(0, settings.batch_size, size)]

    def factor(self) -> float:
        return learning_rate_factor(self.config.schedule, self.step, self.max_steps)

    def advance(self, observer: Any = None, micro_batches: list[Any] | None = None) -> StepResult:
        """Do the step, as the loop did it."""
        batches = self.micro_batches() if micro_batches is None else micro_batches
        result = training_step(
            self.model, self.optimizer, batches, self.config.training, self.factor(), observer or SilentObserver())
        self.step += 1
        return result


def state_before(run_dir: str | Path, step: int | None, on_progress=None) -> Replay:
    """The state before `step`; None: the newest checkpoint's. Raises UserError naming the steps that can be had.

    on_progress(done, total) is told of each replayed step.
    """
    folder = Path(run_dir)
    config, dataset, split = training_split(folder)
    saved = checkpoint.saved_steps(folder / "checkpoints")
    done = max(_recorded(folder), max(saved, default=0))
    if step is None:
        step = max(saved, default=0)
    elif step >= done:
        steps = f"the steps 0 to {done - 1}" if done else "no step yet"
        raise UserError(f"{folder}: there is no step {step}: the run has done {steps}")
    start = max((s for s in saved if s <= step), default=0)
    if not 0 <= step - start <= MOST_REPLAYED:
        spans = ", ".join(f"{s} to {s + MOST_REPLAYED}" for s in sorted({0, *saved}))
        raise UserError(f"{folder}: step {step} is too far from a checkpoint to be replayed; steps that can be: {spans}")
    if start not in saved and config.model.init_from is not None:
        raise UserError(f"{folder}: step {step} cannot be replayed: this run began from {config.model.init_from}, and its "
                        f"checkpoint of step 0 is gone; steps that can be: from {min(saved, default='none')} on")  # fmt: skip
    began, _ = settings_of_step(folder, config, start)
    device = choose_device(began.training.device)
    model = initialize(Grok1(began.model, device=device), began.training.seed)
    model.compute_dtype, model.parity = choose_precision(began.training.precision, device)
    replay = Replay(began, dataset, split, model, build_optimizer(model, began.optimizer, began.training.seed), 0, start)
    if start in saved:
        found = checkpoint.load(saved[start])
        model.load_state_dict(found.tensors["model"])
        load_optimizer_state(replay.optimizer, found.tensors["optimizer"], found.state["optimizer"])
    _adopt_settings(replay, folder, config)
    while replay.step < step:
        replay.advance()
        _adopt_settings(replay, folder, config)
        if on_progress:
            on_progress(replay.step - start, step - start)
    return replay


def _adopt_settings(replay: Replay, folder: Path, newest: Config) -> None:
    """Go on with the settings of the step that comes next, as a resumed run does."""
    config, threads = settings_of_step(folder, newest, replay.step)
    if threads is not None:
        torch.set_num_threads(threads)
    if config.optimizer != replay.config.optimizer:
        state = optimizer_state(replay.optimizer)
        replay.optimizer = build_optimizer(replay.model, config.optimizer, config.training.seed)
        load_optimizer_state(replay.optimizer, *state)
    replay.config, replay.max_steps = config, budget_in_steps(config, replay.split)
    replay.model.recompute = config.training.recompute


def settings_of_step(folder: Path, newest: Config, step: int) -> tuple[Config, int | None]:
    """Configuration and number of threads that `step` was done with: resumes may have changed them since.

    newest: the run's configuration now.
    """
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for change in manifest.get("changes", []):
        if step < change["step"] and "before" in change:
            return make_config(change["before"]), change["threads"]
    return newest, manifest.get("machine", {}).get("threads")


def kernels_of_step(folder: Path, step: int) -> str | None:
    """Which CPU kernels served when `step` was done; None where that was not noted."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    later = (change for change in manifest.get("changes", []) if step < change["step"])
    return next(later, manifest.get("machine", {})).get("kernels")


def _recorded(folder: Path) -> int:
    """How many steps the telemetry knows."""
    if not (folder / "run.sqlite").is_file():
        return 0
    with Reader(folder) as reader:
        latest = reader.latest_step()
    return 0 if latest is None else latest + 1


def capsule_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "capsules" / f"step-{step}.safetensors"


def forget_capsules(run_dir: str | Path, step: int) -> None:
    """Remove capsules and plays of step number `step` and later: a resumed run does these steps again."""
    for path in (Path(run_dir) / "capsules").glob("step-*.*"):
        number = path.name.removeprefix("step-").partition(".")[0]
        if number.isdigit() and int(number) >= step:
            path.unlink(missing_ok=True)


def save_capsule(run_dir: str | Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Complete or absent: written beside its place and renamed. Tensors: `before.NAME`, `after.NAME`, `gradient.NAME`, ..."""
    path = capsule_path(run_dir, step)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".saving")
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    safetensors.torch.save_file({k: t.detach().contiguous() for k, t in tensors.items()}, unfinished, metadata)
    unfinished.replace(path)
    return path
