"""Matrix products by the fastest way this processor has for them, forward and backward.

On AMD processors with AVX-512 the product is Pellucid's own (products.cpp): there torch asks Intel's MKL in fp32, which
leaves AVX-512 unused, and oneDNN in bf16, which compiles a product anew for every size it meets (0.7 ms, and half a megabyte
kept). A handful of rows, and all other processors, are torch's; but one row without a gradient, as in decoding, is cpu.cpp's
everywhere. In bf16 torch needs a processor with AVX-512, and otherwise multiplies number by number (8 to 10 GFLOP/s a core, 1 for
an input's gradient, against 42 to 70). There the factors are widened to fp32, where a product of two bf16 numbers is exact, and
the result is rounded once. All are the same definition: operands in the activations' dtype (fp32 masters are rounded to bf16 as
they are read), sums in fp32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pellucid.model.kernels import native
from pellucid.model.kernels.gpu.copies import copy_of, may_have_copy, narrowed

ROWS = 256  # at a time, of products whose number of rows changes from call to call
FEW = 16  # rows below which packing costs more than it brings


def product(x_MI: Tensor, weight_OI: Tensor, out: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """x @ weight.T, or x[rows] @ weight.T, without a gradient; [M, I], [O, I] -> [M, O]. The weight may be a transposed view,
    and an fp32 master of bf16 products."""
    M = len(x_MI) if rows is None else len(rows)
    x_MI, rows = _with_rows(x_MI, rows)
    if M >= FEW:
        into = x_MI.new_empty(M, len(weight_OI)) if out is None else out
        if _is_ours(x_MI, weight_OI.t(), into):
            return _own(x_MI, weight_OI.t(), into, rows)
    x_MI, weight_OI, emulated = _chosen(x_MI, rows), weight_OI.to(x_MI.dtype), _is_emulated(x_MI)
    if emulated:
        weight_OI = weight_OI.float()  # once, not for every piece
    if out is None:
        return torch.mm(x_MI.float(), weight_OI.t()).to(x_MI.dtype) if emulated else torch.mm(x_MI, weight_OI.t())
    if x_MI.device.type != "cpu":
        return torch.mm(x_MI, weight_OI.t(), out=out)
    for start in native.starts(M, ROWS):  # as fast as all at once, and of fewer sizes: see `sizes_cost`
        x, y = x_MI[start : start + ROWS], out[start : start + ROWS]
        if emulated:
            y.copy_(torch.mm(x.float(), weight_OI.t()))
        else:
            torch.mm(x, weight_OI.t(), out=y)
    return out


def transposed_product(
    left_MO: Tensor, right_MI: Tensor, out: Tensor, *, add: bool = False,
    left_rows: Tensor | None = None, right_rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out = left.T @ right, or out += it: the gradient of a weight; out [O, I] may be wider than the factors (an fp32
    master's). left_rows, right_rows: which rows of a factor are meant, where not all."""
    (left_MO, left_rows), (right_MI, right_rows) = _with_rows(left_MO, left_rows), _with_rows(right_MI, right_rows)
    if _is_ours(left_MO, right_MI, out, add):
        return _own(left_MO.t(), right_MI, out, left_rows, right_rows, add, read_soon=False)
    left_MO, right_MI = _chosen(left_MO, left_rows), _chosen(right_MI, right_rows)
    if _is_emulated(left_MO):
        left_MO, right_MI = left_MO.float(), right_MI.float()
    if native.dry() == "cuda":
        return out
    if out.is_cuda and out.dtype == torch.float32 != left_MO.dtype:  # summed and written in fp32
        return torch.addmm(out, left_MO.t(), right_MI, out_dtype=out.dtype, out=out) if add else (
            torch.mm(left_MO.t(), right_MI, out_dtype=out.dtype, out=out))  # fmt: skip
    if out.dtype != left_MO.dtype:
        found = torch.mm(left_MO.t(), right_MI)
        return out.add_(found) if add else out.copy_(found)
    return out.addmm_(left_MO.t(), right_MI) if add else torch.mm(left_MO.t(), right_MI, out=out)


def batched_product(a_BMI: Tensor, b_BIO: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a @ b for each of B pairs of matrices, without a gradient; into `out`, or added to what it holds."""
    into = a_BMI.new_empty(len(a_BMI), a_BMI.shape[1], b_BIO.shape[2]) if out is None else out
    if _is_ours(a_BMI, b_BIO, into, add):
        return _own(a_BMI, b_BIO, into, add=add)
    found = torch.bmm(a_BMI.float(), b_BIO.float()).to(a_BMI.dtype) if _is_emulated(a_BMI) else torch.bmm(a_BMI, b_BIO)
    return found if out is None else out.add_(found) if add else out.copy_(found)


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`F.linear(x, weight.to(x.dtype))`, of which it is the fast twin."""
    if x.numel() == x.shape[-1] and not torch.is_grad_enabled() and _one_row_fits(x, weight_OI):
        return _one_row(x, weight_OI)
    own = own_serves(x.dtype) if native.fits(x) else _is_emulated(x) and native.is_ordinary(x)
    if not own and not may_have_copy(weight_OI, x.dtype):
        return F.linear(x, weight_OI.to(x.dtype))
    if not torch.is_grad_enabled():
        read = weight_OI if own else narrowed(weight_OI, x.dtype)
        return product(x.reshape(-1, x.shape[-1]), read).view(*x.shape[:-1], len(weight_OI))
    return _Linear.apply(x, weight_OI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_OI):
        copy_OI = copy_of(weight_OI, x.dtype)
        ctx.save_for_backward(x, weight_OI, copy_OI)
        return product(x.reshape(-1, x.shape[-1]), weight_OI if copy_OI is None else copy_OI).view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight_OI, copy_OI = ctx.saved_tensors
        grad_MO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = product(grad_MO, (weight_OI if copy_OI is None else copy_OI).t()).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = weight_OI.new_empty(weight_OI.shape)
            transposed_product(grad_MO, x.reshape(-1, x.shape[-1]), out=grad_weight)
        return grad_x, grad_weight


def _own(
    left: Tensor, right: Tensor, out: Tensor, left_rows: Tensor | None = None, right_rows: Tensor | None = None, add: bool = False,
    read_soon: bool = True,
) -> Tensor:  # fmt: skip
    """out [.., M, N] = left [.., M, K] @ right [.., K, N] by products.cpp, of which left_rows and right_rows choose rows as they
    lie in memory: columns of a factor that is a transposed view. read_soon: whether out should stay in the processor's caches."""
    left, right = (x if 1 in x.stride()[-2:] else x.contiguous() for x in (left, right))
    by_row = left_rows is not None and left.stride(-1) == 1
    M, K = len(left_rows) if by_row else left.shape[-2], left.shape[-1] if by_row or left_rows is None else len(left_rows)
    N, depth = right.shape[-1], right.shape[-2] if right_rows is None else len(right_rows)
    if K != depth or out.shape[-2:] != (M, N) or (out.dim() == 3 and not len(left) == len(right) == len(out)):
        raise ValueError(f"no product: {list(left.shape)} @ {list(right.shape)} into {list(out.shape)}")
    if K == 0:
        return out if add else out.zero_()
    batch = [len(out), left.stride(0), right.stride(0), out.stride(0)] if out.dim() == 3 else [1, 0, 0, 0]
    native.call(
        "product", left.dtype, left, left.stride(-2), left.stride(-1), left_rows, right, right.stride(-1), right.stride(-2),
        right_rows, out, out.stride(-2), M, N, K, int(add), int(read_soon), *batch,
        int(right.dtype == torch.float32), int(out.dtype == torch.float32), strided=True,
    )  # fmt: skip
    return out


def _one_row(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight.T of one row, as in decoding: the weight is read once and as it lies, in whatever dtype."""
    (O, K), y = weight_OI.shape, x.new_empty(*x.shape[:-1], weight_OI.shape[0])
    if K != x.shape[-1]:
        raise ValueError(f"no product: {list(x.shape)} @ {list(weight_OI.t().shape)}")
    native.call("one_row", x.dtype, x, weight_OI, weight_OI.stride(0), int(weight_OI.dtype == torch.bfloat16), y, O, K, strided=True)
    return y


def _one_row_fits(x: Tensor, weight_OI: Tensor) -> bool:
    return x.stride(-1) == weight_OI.stride(-1) == 1 and native.fits(x, weight_OI) and weight_OI.dtype in native.SUFFIXES


def _with_rows(x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and which of its rows are meant; they are taken out here, if it does not lie row by row."""
    row_by_row = x.stride(-1) == 1 and x.stride(-2) > 1
    return (x, rows) if rows is None or row_by_row else (x.index_select(0, rows), None)


def _chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def sizes_cost(x: Tensor) -> bool:
    """Whether each new size of a product has a price: oneDNN compiles one for each."""
    own = native.fits(x) and own_serves(x.dtype)
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not own and not _is_emulated(x)


def status() -> str:
    """One line: whose products serve on this CPU."""
    ways = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x = torch.empty(1, dtype=dtype)
        own = native.fits(x) and own_serves(dtype)
        ways[name] = "Pellucid's own (AMD with AVX-512)" if own else "torch's, by way of fp32" if _is_emulated(x) else "torch's"
    return ways["fp32"] if len(set(ways.values())) == 1 else "; ".join(f"{name}: {way}" for name, way in ways.items())


def _is_ours(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> bool:
    """Whether products.cpp serves: factors of one dtype into it or into fp32, or an fp32 master on the right into bf16."""
    wide = torch.float32
    dtypes = (right.dtype, out.dtype) in {(left.dtype, left.dtype), (left.dtype, wide), (wide, left.dtype)}
    can = dtypes and (out.stride(-1) == 1 or out.shape[-1] == 1) and (not add or out.dtype == wide)
    return can and native.fits(left, right, out) and own_serves(left.dtype)


@functools.cache
def own_serves(dtype: torch.dtype) -> bool:
    return native.has("product", dtype) and "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


def _is_emulated(x: Tensor) -> bool:
    """Whether torch would multiply these bf16 numbers one by one."""
    if torch.compiler.is_compiling():  # it cannot look into what is asked below, and chooses by itself
        return False
    return x.device.type == "cpu" and native.dry() != "cuda" and x.dtype == torch.bfloat16 and _lacks_bf16()


@functools.cache
def _lacks_bf16() -> bool:
    """oneDNN takes bf16 from AVX-512 on (before AVX-512 bf16 it widens the numbers itself)."""
    processor = torch.cpu.get_capabilities()
    return processor.get("architecture") == "x86_64" and not (processor.get("avx512_bw") and torch.backends.mkldnn.is_available())
