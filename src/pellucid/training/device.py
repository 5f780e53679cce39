"""Where a run computes, in which number format, and on how many threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import torch

from pellucid.config import UserError
from pellucid.model.kernels import native


def choose_device(name: str, setting: str = "training.device") -> torch.device:
    """'auto' takes CUDA, then Apple's MPS, then the CPU; a GPU named by number becomes the current one. Raises UserError for a
    device this machine lacks, and names the setting that asked for it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"{setting} = '{name}': not usable on this machine (known: auto, cpu, cuda, cuda:1 and so on, mps)")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels are launched on the current one
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{setting} = '{name}': not usable on this machine ({reason})") from None
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """'auto' becomes bf16 where the processor is fast at it, else fp32."""
    return name if name != "auto" else "bf16" if has_fast_bf16(device) else "fp32"


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, bool]:
    """(dtype of products, whether every official cast is followed)."""
    name = resolve_precision(name, device)
    return (torch.float32 if name == "fp32" else torch.bfloat16), name == "parity"


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def widest(device: torch.device) -> torch.dtype:
    """The dtype of sums whose every bit counts: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def keep_threads(recorded: int | None) -> str | None:
    """Compute on as many threads as a run began with: float sums depend, in their last bits, on how many share them.

    A number the user set (OMP_NUM_THREADS), or one this machine has no processors for, stands. Returns a sentence where
    something had to be said.
    """
    now = torch.get_num_threads()
    if recorded is None or recorded == now:
        return None
    if "OMP_NUM_THREADS" in os.environ or recorded > (os.cpu_count() or 1):
        return (f"this run computed on {recorded} threads so far and goes on with {now}: sums will round differently in "
                "their last bits")  # fmt: skip
    torch.set_num_threads(recorded)
    return f"computing on {recorded} threads as before, for the very same sums (OMP_NUM_THREADS={now} would change that)"


def other_kernels(recorded: str | None) -> str | None:
    """A sentence where other kernels serve on the CPU than a run's steps were computed by, `recorded` in its manifest."""
    if recorded in (None, native.serving()):
        return None
    return (f"this run was computed by the {recorded} CPU kernels, now it is {native.status()}: sums round differently in their last "
            "bits (`pellucid doctor` says more)")  # fmt: skip


# Of mallopt(3); the numbers are malloc.h's.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Within, glibc's malloc keeps what is freed for the next step, rather than give it back and fetch it page by page.

    The kernel clears every page it hands out: a tenth of a step's time with the gradients of 110 million parameters.
    At the end all is given back. MALLOC_MMAP_THRESHOLD_ and its kin (see mallopt(3)), if set, stand; other C libraries
    are left alone.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(libc, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, 65536)  # as it was
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)  # where malloc's own adjustment, which ends with the first mallopt, leads to
        libc.mallopt(TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)
