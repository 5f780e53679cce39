"""What the Triton kernels share: products of two tiles, tanh and GELU, block sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pellucid.model.kernels.gpu import interpreted

INTERPRETED = interpreted()
HARDWARE_TANH = torch.version.cuda is not None and not INTERPRETED  # one instruction since sm_75, error about 2^-11


@triton.jit
def dot(a, b, total, WIDE: tl.constexpr):
    """total + a @ b, summed in fp32; fp32 factors exactly. WIDE: the interpreter cannot multiply bf16."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def tanh(x, HARDWARE: tl.constexpr):
    if HARDWARE:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def narrow(x, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """fp32 numbers as `dtype`. To bf16 two at a time: where the result is widened again, triton 3.6 would take them one by one, by the
    unit that computes exp2 and tanh."""
    if HARDWARE and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    return x.to(dtype)


@triton.jit
def gelu(x, HARDWARE: tl.constexpr):
    """(gelu_tanh(x), its derivative) of Hendrycks & Gimpel 2016, the approximation by tanh; x in fp32."""
    t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x), HARDWARE)
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * x * (1.0 + t), slope


def tile(size: int) -> int:
    """The block that holds `size` columns: a power of two, at least what a tensor core multiplies."""
    return max(16, triton.next_power_of_2(size))


def describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The matrix (a stack of them counts as one of all their rows) for loads and stores of blocks; zeros beyond its edges."""
    return TensorDescriptor.from_tensor(matrix.reshape(-1, matrix.shape[-1]), [rows, columns])


def wide(tensor: Tensor) -> bool:
    return INTERPRETED and tensor.dtype == torch.bfloat16
