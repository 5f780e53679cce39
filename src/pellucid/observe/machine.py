"""What the machine did: memory, and the share of its peak that the model's own arithmetic used (MFU).

MFU after Chowdhery et al. 2022 (PaLM, appendix B): model FLOPs per second over the device's dense bf16 peak, as its
maker states it without sparsity. Unknown devices have no MFU: null, not a guess.
"""

from __future__ import annotations

import os
import resource
import sys
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


def device_memory(device: torch.device) -> float | None:
    """Largest bytes allocated by torch on an accelerator so far; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
