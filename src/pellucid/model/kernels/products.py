"""Matrix products by the fastest way this processor has for them, forward and backward.

On AMD processors with AVX-512 the product is Pellucid's own (products.cpp): there torch asks Intel's MKL in fp32, which
leaves AVX-512 unused, and oneDNN in bf16, which compiles a product anew for every size it meets (0.7 ms, and half a megabyte
kept). Elsewhere torch's serves; in bf16 it needs a processor with AVX-512, and otherwise multiplies number by number (8 to
10 GFLOP/s a core, 1 for an input's gradient, against 42 to 70). There the factors are widened to fp32, where a product of two
bf16 numbers is exact, and the result is rounded once. All are the same definition: operands in the activations' dtype (fp32
masters are rounded to bf16 as they are read), sums in fp32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pellucid.model.kernels import native

ROWS = 256  # at a time, of products whose number of rows changes from call to call
FEW = 16  # rows below which packing costs more than it brings, as in decoding


def product(x_MI: Tensor, weight_OI: Tensor, out: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """x @ weight.T, or x[rows] @ weight.T, without a gradient; [M, I], [O, I] -> [M, O]. The weight may be a transposed view,
    and an fp32 master of bf16 products."""
    M = len(x_MI) if rows is None else len(rows)
    if _is_ours(x_MI) and M >= FEW:
        return _own(x_MI, weight_OI.t(), x_MI.new_empty(M, len(weight_OI)) if out is None else out, rows)
    x_MI = x_MI if rows is None else x_MI.index_select(0, rows)
    weight_OI = weight_OI.to(x_MI.dtype)
    if _is_emulated(x_MI):
        found = torch.mm(x_MI.float(), weight_OI.float().t())
        return found.to(x_MI.dtype) if out is None else out.copy_(found)
    if out is None:
        return torch.mm(x_MI, weight_OI.t())
    for start in native.starts(M, ROWS):  # as fast as all at once, and of fewer sizes: see `sizes_cost`
        torch.mm(x_MI[start : start + ROWS], weight_OI.t(), out=out[start : start + ROWS])
    return out


def transposed_product(
    left_MO: Tensor, right_MI: Tensor, out: Tensor, *, add: bool = False,
    left_rows: Tensor | None = None, right_rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out = left.T @ right, or out += it: the gradient of a weight; out [O, I] may be wider than the factors (an fp32
    master's). left_rows, right_rows: which rows of a factor are meant, where not all."""
    if _is_ours(left_MO) and right_MI.shape[1] > 1:
        return _own(left_MO.t(), right_MI, out, left_rows, right_rows, add)
    left_MO = left_MO if left_rows is None else left_MO.index_select(0, left_rows)
    right_MI = right_MI if right_rows is None else right_MI.index_select(0, right_rows)
    if _is_emulated(left_MO):
        left_MO, right_MI = left_MO.float(), right_MI.float()
    if out.dtype != left_MO.dtype:
        found = torch.mm(left_MO.t(), right_MI)
        return out.add_(found) if add else out.copy_(found)
    return out.addmm_(left_MO.t(), right_MI) if add else torch.mm(left_MO.t(), right_MI, out=out)


def batched_product(a_BMI: Tensor, b_BIO: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a @ b for each of B pairs of matrices, without a gradient; into `out`, or added to what it holds."""
    if _is_ours(a_BMI) and (not add or out.dtype == torch.float32):
        out = a_BMI.new_empty(len(a_BMI), a_BMI.shape[1], b_BIO.shape[2]) if out is None else out
        return _own(a_BMI, b_BIO, out, add=add)
    found = torch.bmm(a_BMI.float(), b_BIO.float()).to(a_BMI.dtype) if _is_emulated(a_BMI) else torch.bmm(a_BMI, b_BIO)
    return found if out is None else out.add_(found) if add else out.copy_(found)


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`F.linear(x, weight.to(x.dtype))`, of which it is the fast twin."""
    fast = _is_ours(x) or _is_emulated(x)
    if not fast or not native.is_ordinary(x):
        return F.linear(x, weight_OI.to(x.dtype))
    if not torch.is_grad_enabled():
        return product(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], -1)
    return _Linear.apply(x, weight_OI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI):
        ctx.save_for_backward(x, weight_OI)
        return product(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight_OI = ctx.saved_tensors
        grad_MO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = product(grad_MO, weight_OI.t()).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = transposed_product(grad_MO, x.reshape(-1, x.shape[-1]), out=torch.empty_like(weight_OI))
        return grad_x, grad_weight


def _own(
    left: Tensor, right: Tensor, out: Tensor, left_rows: Tensor | None = None, right_rows: Tensor | None = None, add: bool = False
) -> Tensor:
    """out [.., M, N] = left [.., M, K] @ right [.., K, N] by products.cpp, of which left_rows and right_rows choose rows as they
    lie in memory: columns of a factor that is a transposed view."""
    left, right = (x if 1 in x.stride()[-2:] else x.contiguous() for x in (left, right))
    K = left.shape[-1] if left_rows is None or left.stride(-1) == 1 else len(left_rows)
    if K == 0:
        return out if add else out.zero_()
    batch = [len(out), left.stride(0), right.stride(0), out.stride(0)] if out.dim() == 3 else [1, 0, 0, 0]
    native.call(
        "product", left.dtype, left, left.stride(-2), left.stride(-1), left_rows, right, right.stride(-1), right.stride(-2),
        right_rows, out, out.stride(-2), out.shape[-2], out.shape[-1], K, int(add), *batch,
        int(right.dtype == torch.float32), int(out.dtype == torch.float32), strided=True,
    )  # fmt: skip
    return out


def sizes_cost(x: Tensor) -> bool:
    """Whether each new size of a product has a price: oneDNN compiles one for each."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not _is_ours(x) and not _is_emulated(x)


def _is_ours(x: Tensor) -> bool:
    """Whether products.cpp serves; of a single column strides tell nothing."""
    return x.shape[-1] > 1 and native.fits(x) and _own_serves(x.dtype)


@functools.cache
def _own_serves(dtype: torch.dtype) -> bool:
    return "AMD" in torch.cpu.get_capabilities().get("cpu_name", "") and native.has("product", dtype)


def _is_emulated(x: Tensor) -> bool:
    """Whether torch would multiply these bf16 numbers one by one."""
    if torch.compiler.is_compiling():  # it cannot look into what is asked below, and chooses by itself
        return False
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and _lacks_bf16()


@functools.cache
def _lacks_bf16() -> bool:
    """oneDNN takes bf16 from AVX-512 on (before AVX-512 bf16 it widens the numbers itself)."""
    processor = torch.cpu.get_capabilities()
    return processor.get("architecture") == "x86_64" and not (processor.get("avx512_bw") and torch.backends.mkldnn.is_available())
