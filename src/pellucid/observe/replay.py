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

from pellucid.config import Config, UserError
from pellucid.data.dataset import Dataset, Split
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.observe.observer import SilentObserver
from pellucid.observe.trace import training_split
from pellucid.training import checkpoint
from pellucid.training.loop import budget_in_steps
from pellucid.training.optimizers import build_optimizer, load_optimizer_state
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
    _same_threads(folder)
    saved = checkpoint.saved_steps(folder / "checkpoints")
    end = budget_in_steps(config, split)
    if step is None:
        step = max(saved, default=0)
    elif step >= end:
        raise UserError(f"{folder}: there is no step {step}: the run has the steps 0 to {end - 1}")
    start = max((s for s in saved if s <= step), default=0)
    if not 0 <= step - start <= MOST_REPLAYED:
        spans = ", ".join(f"{s} to {s + MOST_REPLAYED}" for s in sorted({0, *saved}))
        raise UserError(f"{folder}: step {step} is too far from a checkpoint to be replayed; steps that can be: {spans}")
    if start not in saved and config.model.init_from is not None:
        raise UserError(f"{folder}: step {step} cannot be replayed: this run began from {config.model.init_from}, and its "
                        f"checkpoint of step 0 is gone; steps that can be: from {min(saved, default='none')} on")  # fmt: skip
    model = initialize(Grok1(config.model, device=_device(config)), config.training.seed)
    model.compute_dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
    model.parity = config.training.precision == "parity"
    optimizer = build_optimizer(model, config.optimizer)
    if start in saved:
        found = checkpoint.load(saved[start])
        model.load_state_dict(found.tensors["model"])
        load_optimizer_state(optimizer, found.tensors["optimizer"], found.state["optimizer"])
    replay = Replay(config, dataset, split, model, optimizer, end, start)
    while replay.step < step:
        replay.advance()
        if on_progress:
            on_progress(replay.step - start, step - start)
    return replay


def _same_threads(folder: Path) -> None:
    """Sums depend, in their last bits, on how many threads share them."""
    threads = json.loads((folder / "manifest.json").read_bytes()).get("machine", {}).get("threads")
    if isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)


def _device(config: Config) -> str:
    wanted = config.training.device
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def capsule_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "capsules" / f"step-{step}.safetensors"


def save_capsule(run_dir: str | Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Complete or absent: written beside its place and renamed. Tensors: `before.NAME`, `after.NAME`, `gradient.NAME`, ..."""
    path = capsule_path(run_dir, step)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".saving")
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    safetensors.torch.save_file({k: t.detach().contiguous() for k, t in tensors.items()}, unfinished, metadata)
    unfinished.replace(path)
    return path
