"""The compiled CPU kernels (cpu.cpp, products.cpp, attention.cpp): built once per machine by its C++ compiler, cached, called by name.

Without a compiler, or with PELLUCID_KERNELS=plain in the environment, the plain functions serve instead; `status()`
says which and why. The choice never depends on the length of a run, so that a resumed run computes the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.cpp", "products.cpp", "attention.cpp")]
HEADERS = [Path(__file__).with_name(name) for name in ("numbers.h", "products.h")]
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
WIDE = {"x86_64": ["-mprefer-vector-width=512"]}  # compilers choose 256 bits where they fear for the clock
C_TYPES = {int: ctypes.c_int64, float: ctypes.c_float}  # a tensor goes by its address
SUFFIXES = {torch.float32: "float", torch.bfloat16: "bf16"}


_dry: str | None = None


@contextlib.contextmanager
def dry_run(device: str) -> Iterator[None]:
    """Within: kernels serve tensors that have no memory (torch's FakeTensor) too, and compute nothing.

    device: cpu, or cuda: then tensors on the CPU stand for a GPU's, and its kernels serve them, also where there is none."""
    global _dry
    before, _dry = _dry, device
    try:
        yield
    finally:
        _dry = before


def dry() -> str | None:
    """The device of the dry run that goes on."""
    return _dry


def starts(length: int, size: int) -> range:
    """Where chunks of `size` begin. In a dry run only the last two: none before them needs more memory."""
    every = range(0, length, size)
    return every[-2:] if _dry else every


def is_ordinary(tensor: Tensor) -> bool:
    """Whether it is a tensor of torch's own, not of a subclass that a kernel could not look into."""
    return type(tensor) in (Tensor, torch.nn.Parameter) or _dry is not None


def fits(*tensors: Tensor) -> bool:
    """Whether a kernel can take these tensors: plain ones on the CPU, the first in fp32 or bf16; and a kernel exists."""
    return (
        tensors[0].dtype in SUFFIXES
        and _dry != "cuda"
        and all(tensor.device.type == "cpu" and is_ordinary(tensor) for tensor in tensors)
        and not torch.compiler.is_compiling()
        and _load()[0] is not None
    )


def has(name: str, dtype: torch.dtype) -> bool:
    """Whether kernel `name` was built for `dtype`: some are for certain processors only."""
    return hasattr(_load()[0], f"{name}_{SUFFIXES[dtype]}")


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None, strided: bool = False) -> None:
    """Run kernel `name` for `dtype` on tensors (by address), integers and floats, in its declared order.

    Tensors must be contiguous, but where the kernel is told their strides.
    """
    if _dry:
        return
    function = getattr(_load()[0], f"{name}_{SUFFIXES[dtype]}")
    if function.argtypes is None:
        function.argtypes = [C_TYPES.get(type(argument), ctypes.c_void_p) for argument in arguments]
    if not strided and not all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor)):
        raise ValueError("a kernel was given a tensor that is not contiguous")
    function(*[argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments])


def serving() -> str:
    """What computes on the CPU, in one word: their sums round differently in the last bits."""
    return "compiled" if _load()[0] else "plain"


def status() -> str:
    """One line: what serves, and why not the kernels."""
    library, reason = _load()
    return f"compiled by this machine's C++ compiler ({library._name})" if library else f"plain PyTorch: {reason}"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(the library, or None; why there is none)."""
    if os.environ.get("PELLUCID_KERNELS") == "plain":
        return None, "PELLUCID_KERNELS=plain is set"
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler (g++ or clang++) was found"
    try:
        path = cache_folder() / f"cpu-{_fingerprint(compiler)}.so"
        if not path.exists():
            _build(compiler, path)
        return ctypes.CDLL(str(path)), ""
    except (OSError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return None, f"the kernels could not be built ({output[-1] if output else 'no message'})"


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/pellucid or ~/.cache/pellucid, readable by its owner alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pellucid"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _fingerprint(compiler: str) -> str:
    """Changes with the source, the compiler and the processor: code built for one may not run on another."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    processor = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = [source.read_text() for source in (*SOURCES, *HEADERS)]
    return hashlib.sha256("\n".join([*sources, version, processor, *FLAGS]).encode()).hexdigest()[:16]


def _build(compiler: str, path: Path) -> None:
    """Compile into a temporary file and rename: a library that exists is whole."""
    print("compiling pellucid's CPU kernels (once, some seconds)", file=sys.stderr, flush=True)
    flags = [*FLAGS, *WIDE.get(platform.machine(), [])]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
        run = lambda *arguments: subprocess.run(
            [compiler, *arguments], capture_output=True, text=True, check=True, timeout=300
        )

        def build(openmp: str) -> None:
            # Linked without an OpenMP of its own: it must share torch's, or two pools of threads would fight.
            with ThreadPoolExecutor() as together:
                list(together.map(lambda source, to: run(*flags, openmp, "-c", str(source), "-o", to), SOURCES, objects))
            run("-shared", *objects, "-o", str(built))
            ctypes.CDLL(str(built))

        try:
            build("-fopenmp")
        except (subprocess.CalledProcessError, OSError):
            build("-fopenmp-simd")  # one thread
        os.replace(built, path)
