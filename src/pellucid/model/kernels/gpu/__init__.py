"""Our own GPU kernels, written in Triton: which of them serve, and why not the others. Each has its plain function.

Triton is a separate package (`pip install pellucid[gpu]`; CUDA and ROCm builds of torch bring it along). PELLUCID_KERNELS
chooses: unset takes the kernels in PROVEN, `triton` takes all that fit, `plain` none. With TRITON_INTERPRET=1 in the
environment they run on the CPU, slowly, which is how the tests look at them.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

KERNELS = {
    "attention": "capped causal attention over grouped heads and documents, forward and backward",
    "experts": "grouped products with GeGLU and gate in the epilogue, sum over choices out; gradients in fp32",
    "routing": "softmax, top-k and the sort by expert",
    "norm": "RMSNorm with the residual sum",
    "rotary": "rotary positions, from token order to head order",
    "loss": "cross-entropy rows in place",
}
PROVEN: frozenset[str] = frozenset()  # kernels that have passed `pytest -m gpu` on a card and won there: see docs/speed.md
HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(name: str, *tensors: Tensor) -> bool:
    """Whether kernel `name` is to be used for these tensors: all on one GPU (or interpreted), the first of a float dtype."""
    device = "cpu" if interpreted() else "cuda"
    if tensors[0].device.type != device:
        return False
    return chosen(name) and tensors[0].dtype in DTYPES and all(x.device.type == device and x.numel() for x in tensors)


def chosen(name: str) -> bool:
    wish = os.environ.get("PELLUCID_KERNELS")
    return HAS_TRITON and (wish == "triton" or (wish is None and name in PROVEN))


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def status() -> dict[str, str]:
    """One line for each kernel: whether it is used on a GPU, and why not."""
    def line(name: str) -> str:
        if not HAS_TRITON:
            return "plain PyTorch: the package triton is not installed (pip install 'pellucid[gpu]')"
        if chosen(name):
            return f"our Triton kernel ({KERNELS[name]})" + ("" if name in PROVEN else "; not yet proven on a card")
        if os.environ.get("PELLUCID_KERNELS") is not None:
            return f"plain PyTorch: PELLUCID_KERNELS={os.environ['PELLUCID_KERNELS']} is set"
        return "plain PyTorch: our Triton kernel has not run on a card yet (PELLUCID_KERNELS=triton takes it)"

    return {name: line(name) for name in KERNELS}
