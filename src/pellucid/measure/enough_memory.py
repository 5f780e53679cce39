"""Whether a training fits into this machine's memory, asked before it begins: else the system would end it without a word."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pellucid.config import Config, UserError
from pellucid.measure.memory import predict_peak
from pellucid.model.size import parameter_counts, training_bytes
from pellucid.observe.machine import host_memory

KEPT_FREE = 0.85  # share of the memory that a step may take which is said to fit: a run keeps some of what it frees


def refuse_beyond_memory(config: Config) -> None:
    """Raises UserError, with what would fit, where training on this machine's processor needs more memory than there is.
    Steps that are far from it are not looked at; of tasks but language modelling, the weights alone."""
    limit, training, least = memory_limit(), config.training, 8 * parameter_counts(config.model)["total"]
    if limit is None or _rough_bytes(config) < limit / 3:
        return
    there = f"GB of memory, and {limit / 1e9:.1f} GB are there"
    if least > limit:
        raise UserError(f"training: weights and gradients alone need {least / 1e9:.1f} {there}: take a smaller model")
    if training.task != "language_modeling":
        return
    rows, held = training.micro_batch_size, private_memory()
    needed = held + predict_peak(config).total
    if needed <= limit:
        return
    mend = "take a smaller model or shorter sequences, or training.recompute = 'all' (`pellucid plan`)"
    while rows > 1:
        rows = max(n for n in range(1, rows // 2 + 1) if training.batch_size % n == 0)
        if held + predict_peak(_with_rows(config, rows)).total <= KEPT_FREE * limit:
            mend = f"set training.micro_batch_size = {rows}, the same batch in pieces that fit"
            break
    at_once = f"{training.micro_batch_size} x {config.data.sequence_length} tokens at once"
    raise UserError(f"training: {at_once} need {needed / 1e9:.1f} {there}: {mend}")


def _rough_bytes(config: Config) -> int:
    """About what a step takes, at a glance; never less than a third of it."""
    shape, rows = config.model, config.training.micro_batch_size
    width = 20 * shape.hidden_size + 6 * shape.num_experts_per_tok * shape.intermediate_size
    return 2 * training_bytes(shape) + 4 * rows * config.data.sequence_length * shape.num_hidden_layers * width


def _with_rows(config: Config, rows: int) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": rows})})


def private_memory() -> float:
    """Resident bytes of this process but those of files, which the system can read again."""
    try:
        resident, of_files = Path("/proc/self/statm").read_text().split()[1:3]
    except OSError:
        return host_memory()
    return (int(resident) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")


def memory_limit() -> int | None:
    """Bytes of memory, swap space with it, that the processes here may fill before the system ends one: the machine's, or what a
    control group (a container's, say) leaves of it. None where the system does not tell."""
    try:
        table = {name: int(rest.split()[0]) * 1024 for name, _, rest in
                 (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())}  # fmt: skip
        return min([table["MemTotal"] + table["SwapTotal"], *_group_limits(table["SwapTotal"])])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _group_limits(swap: int, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Of this process's control group and those it lies in: versions 2 (memory.max) and 1; with the swap space it may use."""
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            base = root / "memory" if kinds else root
            place = base / path.lstrip("/")
            for folder in (place, *place.parents):
                most = _bytes(folder / ("memory.limit_in_bytes" if kinds else "memory.max"))
                if most is not None:
                    beside = swap if (found := _bytes(folder / "memory.swap.max")) is None else min(found, swap)
                    both = _bytes(folder / "memory.memsw.limit_in_bytes")  # version 1 counts them together
                    yield most + beside if both is None else both
                if folder == base:
                    break


def _bytes(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        return int(file.read_text())
    return None
