"""Our own GPU kernels, written in Triton: which of them serve, and why not the others. Each has its plain function.

Triton is a separate package (`pip install pellucid[gpu]`; CUDA and ROCm builds of torch bring it along). PELLUCID_KERNELS
chooses: unset takes those that PROVEN names, `triton` takes all that fit, `plain` none. With TRITON_INTERPRET=1 in the
environment they run on the CPU, slowly, which is how the tests look at them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pellucid.model.kernels import native

KERNELS = {
    "attention": "capped causal attention over grouped heads and documents, forward and backward",
    "experts": "grouped products with GeGLU and gate in the epilogue, sum over choices out; gradients in fp32",
    "scores": "the router's scores in fp32 from bf16 activations",
    "routing": "softmax, top-k and the sort by expert",
    "norm": "RMSNorm with the residual sum",
    "rotary": "rotary positions, from token order to head order",
    "loss": "cross-entropy rows in place",
    "update": "Adam and AdamW in one pass with clipping and the bf16 copy of the weights; rounding of bf16 moments",
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BF16, BOTH = (torch.bfloat16,), (torch.bfloat16, torch.float32)
# Where they serve unasked: kernels whose tests have run on a Hopper card, in the dtypes that training uses; products in fp32 are
# left to torch, which nobody has compared there (docs/speed.md). On other cards nobody has run them.
PROVEN: dict[str, tuple[torch.dtype, ...]] = {
    "attention": BF16, "experts": BF16, "routing": BOTH, "norm": BOTH, "rotary": BOTH, "loss": BOTH,
    "scores": (), "update": (),  # have run in the interpreter alone; "update" is asked with the weights' dtype
}  # fmt: skip
PROVEN_ON = 9, "Hopper"  # compute capability
# Bytes that an operator holds at most while it runs, beside its arguments: what `plan` cannot see from outside. By operator, from its
# arguments; the modules of the kernels write it.
WITHIN: dict[Any, Callable[..., int]] = {}
HAS_TRITON = importlib.util.find_spec("triton") is not None


def fits(name: str, *tensors: Tensor) -> bool:
    """Whether kernel `name` is to be used for these tensors: all on one GPU (or interpreted), the first of a float dtype."""
    here = tensors[0].device
    if here.type != ("cpu" if interpreted() or native.dry() == "cuda" else "cuda"):
        return False
    if here.type == "cuda" and here.index != torch.cuda.current_device():  # a kernel is launched on the current one
        return False
    return chosen(name, tensors[0].dtype) and all(x.device == here and x.numel() for x in tensors)


def rows_fit(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether matrices of so many columns can be described to the copy engine: their rows are multiples of 16 bytes."""
    return all(size * dtype.itemsize % 16 == 0 for size in sizes)


def chosen(name: str, dtype: torch.dtype) -> bool:
    wish = os.environ.get("PELLUCID_KERNELS")
    unasked = wish is None and dtype in PROVEN[name] and (_is_proven_here() or _is_planned())
    return HAS_TRITON and dtype in DTYPES and (wish == "triton" or unasked)


@functools.cache
def _is_proven_here() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == PROVEN_ON[0]


def _is_planned() -> bool:
    """Whether a step is done dry for a GPU that is not here: one of those that the kernels are proven on."""
    return native.dry() == "cuda" and not torch.cuda.is_available()


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def status() -> dict[str, str]:
    """One line for each kernel: whether it is used on a GPU, and why not."""
    def line(name: str) -> str:
        if not HAS_TRITON:
            return "plain PyTorch: the package triton is not installed (pip install 'pellucid[gpu]')"
        if chosen(name, torch.bfloat16):
            only = "" if chosen(name, torch.float32) else "; in fp32 plain PyTorch"
            proven = PROVEN[name] and _is_proven_here()
            return f"our Triton kernel ({KERNELS[name]})" + only + ("" if proven else "; not proven on this card")
        if os.environ.get("PELLUCID_KERNELS") is not None:
            return f"plain PyTorch: PELLUCID_KERNELS={os.environ['PELLUCID_KERNELS']} is set"
        where = f"is proven on {PROVEN_ON[1]} cards only" if PROVEN[name] else "has not run on a card yet"
        return f"plain PyTorch: our Triton kernel {where} (PELLUCID_KERNELS=triton takes it)"

    return {name: line(name) for name in KERNELS}
