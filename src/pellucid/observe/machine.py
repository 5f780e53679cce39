"""What the machine did: memory, and the share of its peak that the model's own arithmetic used (MFU).

MFU after Chowdhery et al. 2022 (PaLM, appendix B): model FLOPs per second over the device's dense bf16 peak, as its
maker states it without sparsity. Unknown devices have no MFU: null, not a guess.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

PEAKS = {  # dense bf16 FLOP/s by part of the device's name; longer names first where one contains the other
    "B200": 2250e12, "H200": 989.5e12, "GH200": 989.5e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.5e12,
    "A100": 312e12, "A800": 312e12, "H800": 989.5e12, "H20": 148e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "A10G": 70e12, "A10": 125e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12, "RTX 6000 Ada": 364e12,
    "MI300X": 1307.4e12, "MI250X": 383e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def host_memory() -> float:
    """Resident bytes of this process (its largest so far where the system does not tell the present)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest * (1 if sys.platform == "darwin" else 1024)


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


def device_memory(device: torch.device) -> float | None:
    """Largest bytes allocated by torch on an accelerator so far; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
