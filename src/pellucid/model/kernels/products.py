"""Matrix products by the fastest way this processor has for them, forward and backward.

In fp32 torch asks Intel's MKL, which on AMD processors leaves AVX-512 unused: there oneDNN runs 1.1 to 1.4 times as
fast, except for the weight's gradient; on processors without AVX-512 MKL is the faster. In bf16 torch asks oneDNN, which
needs a processor with AVX-512; elsewhere torch multiplies number by number (8 to 10 GFLOP/s a core, 1 for an input's
gradient, against 42 to 70). There the factors are widened to fp32, where a product of two bf16 numbers is exact, and
the result is rounded once: the same definition, operands in bf16 and sums in fp32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pellucid.model.kernels import native

ROWS = 256  # at a time, of products whose number of rows changes from call to call


def product(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight.T without a gradient; [M, I], [O, I] -> [M, O]. Either may be a transposed view."""
    if _is_emulated(x_MI):
        return torch.mm(x_MI.float(), weight_OI.float().t()).to(x_MI.dtype)
    if not _onednn_fits(x_MI):
        return torch.mm(x_MI, weight_OI.t())
    return torch.ops.mkldnn._linear_pointwise(x_MI, weight_OI, None, "none", [], "")


def product_by_rows(x_MI: Tensor, weight_OI: Tensor, out: Tensor) -> Tensor:
    """out = x @ weight.T, ROWS rows at a time: oneDNN compiles a product anew for every size it meets (0.7 ms, and half a
    megabyte kept), and is as fast with 256 rows as with more."""
    if _is_emulated(x_MI):
        weight_OI = weight_OI.float()  # once, not for every piece
    for start in native.starts(len(x_MI), ROWS):
        x, y = x_MI[start : start + ROWS], out[start : start + ROWS]
        if _onednn_fits(x_MI) or _is_emulated(x_MI):
            y.copy_(product(x, weight_OI))
        else:
            torch.mm(x, weight_OI.t(), out=y)
    return out


def transposed_product(left_MO: Tensor, right_MI: Tensor, out: Tensor) -> Tensor:
    """out = left.T @ right, the gradient of a weight; out [O, I] may be wider than the factors (an fp32 master's)."""
    if _is_emulated(left_MO):
        left_MO, right_MI = left_MO.float(), right_MI.float()
    if out.dtype == left_MO.dtype:
        return torch.mm(left_MO.t(), right_MI, out=out)
    return out.copy_(torch.mm(left_MO.t(), right_MI))


def batched_product(a_BMI: Tensor, b_BIO: Tensor) -> Tensor:
    """a @ b for each of B pairs of matrices, without a gradient."""
    if _is_emulated(a_BMI):
        return torch.bmm(a_BMI.float(), b_BIO.float()).to(a_BMI.dtype)
    return torch.bmm(a_BMI, b_BIO)


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`F.linear(x, weight)`, of which it is the fast twin."""
    fast = _onednn_fits(x) or _is_emulated(x)
    if not fast or not native.is_ordinary(x):
        return F.linear(x, weight_OI)
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


def _onednn_fits(x: Tensor) -> bool:
    if torch.compiler.is_compiling():  # it cannot look into what is asked below, and chooses by itself
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and _onednn_is_faster()


def _is_emulated(x: Tensor) -> bool:
    """Whether torch would multiply these bf16 numbers one by one."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and _lacks_bf16()


@functools.cache
def _onednn_is_faster() -> bool:
    has_it = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    processor = torch.cpu.get_capabilities()
    return has_it and bool(processor.get("avx512_f")) and "AMD" in processor.get("cpu_name", "")


@functools.cache
def _lacks_bf16() -> bool:
    """oneDNN takes bf16 from AVX-512 on (before AVX-512 bf16 it widens the numbers itself)."""
    processor = torch.cpu.get_capabilities()
    return processor.get("architecture") == "x86_64" and not (processor.get("avx512_bw") and torch.backends.mkldnn.is_available())
