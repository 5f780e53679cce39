"""All experts of a layer, forward and backward, one expert after the other so that its work stays in the cache.

The gate of each (token, choice) pair is multiplied into the hidden layer, so that the sum over a token's choices is
plain and the experts' outputs need not be kept. Saved for the backward pass: the input and the products gate_up.
Letters: N tokens, D hidden, E experts, k per token, F intermediate; M = rows of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.model.kernels import native
from pellucid.model.kernels.products import product, sizes_cost, transposed_product


def fits(x_ND: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> bool:
    master = gate_up_proj.dtype in (x_ND.dtype, torch.float32)
    return master and len(x_ND) > 0 and native.fits(x_ND, gate_up_proj, down_proj)


def fused_experts(
    x_ND: Tensor, gate_Nk: Tensor, expert_index_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Sum over each token's choices of gate * down(gelu(gate_proj(x)) * up(x)), [N, D], as `MoE.mix_plain`."""
    return _Experts.apply(x_ND, gate_Nk, expert_index_Nk, gate_up_proj, down_proj)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, gate_Nk, expert_index_Nk, gate_up_proj, down_proj):
        x_ND, dtype, F = x_ND.contiguous(), x_ND.dtype, down_proj.shape[2]
        ctx.row_Nk, ctx.rows_E, ctx.token_M = sort_by_expert(expert_index_Nk, len(down_proj), sizes_cost(x_ND))
        ctx.factor_M = torch.zeros(len(ctx.token_M), dtype=torch.float32).index_copy_(0, ctx.row_Nk.view(-1), gate_Nk.reshape(-1))
        gate_up_M, outputs_MD = x_ND.new_empty(len(ctx.token_M), 2 * F), x_ND.new_empty(len(ctx.token_M), x_ND.shape[1])
        columns = (column.split(ctx.rows_E) for column in (ctx.token_M, ctx.factor_M, gate_up_M, outputs_MD))
        for e, (token, factor, gate_up, output) in enumerate(zip(*columns, strict=True)):
            if not len(token):
                continue
            product(x_ND, gate_up_proj[e], out=gate_up, rows=token)
            inner = gate_up.new_empty(len(gate_up), F)
            native.call("geglu", dtype, gate_up, factor, inner, len(inner), F)
            product(inner, down_proj[e], out=output)
        ctx.save_for_backward(x_ND, gate_up_M, gate_up_proj, down_proj)
        return _gather_sum(outputs_MD, ctx.row_Nk)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        x_ND, gate_up_M, gate_up_proj, down_proj = ctx.saved_tensors
        grad_ND, dtype = grad_ND.contiguous(), grad_ND.dtype
        grad_gate_up_proj, grad_down_proj = (weight.new_empty(weight.shape) for weight in (gate_up_proj, down_proj))
        grad_factor_M, grad_x_MD = torch.empty_like(ctx.factor_M), x_ND.new_empty(len(gate_up_M), x_ND.shape[1])
        columns = (c.split(ctx.rows_E) for c in (ctx.token_M, ctx.factor_M, gate_up_M, grad_factor_M, grad_x_MD))
        for e, (token, factor, gate_up, grad_factor, grad_x) in enumerate(zip(*columns, strict=True)):
            if not len(token):
                grad_gate_up_proj[e], grad_down_proj[e] = 0, 0
                continue
            inner = gate_up.new_empty(len(token), down_proj.shape[2])  # its gradient, before the factor
            product(grad_ND, down_proj[e].t(), out=inner, rows=token)
            grad_gate_up = torch.empty_like(gate_up)
            native.call("geglu_backward", dtype, inner, gate_up, factor, grad_gate_up, grad_factor, *inner.shape)
            transposed_product(grad_ND, inner, out=grad_down_proj[e], left_rows=token)
            transposed_product(grad_gate_up, x_ND, out=grad_gate_up_proj[e], right_rows=token)
            product(grad_gate_up, gate_up_proj[e].t(), out=grad_x)
        return _gather_sum(grad_x_MD, ctx.row_Nk), grad_factor_M[ctx.row_Nk], None, grad_gate_up_proj, grad_down_proj


def sort_by_expert(expert_index_Nk: Tensor, experts: int, sizes_cost: bool) -> tuple[Tensor, list[int], Tensor]:
    """Where each (token, choice) pair stands when pairs are sorted by expert: (row_Nk, rows of each expert, token_M).

    Where every new size of a product has a price, an expert's rows are rounded up to a coarse number. The rows that fill up
    read token 0; with a factor of 0 they add nothing to any result or gradient.
    """
    chosen, k = expert_index_Nk.reshape(-1), expert_index_Nk.shape[1]
    order = torch.sort(chosen, stable=True).indices
    real_E = torch.bincount(chosen, minlength=experts)
    rows_E = [_round_up(rows) if sizes_cost else rows for rows in real_E.tolist()]
    shift_E = torch.tensor(rows_E).cumsum(0) - torch.tensor(rows_E) - (real_E.cumsum(0) - real_E)
    row_M = torch.arange(len(order)) + shift_E.repeat_interleave(real_E)
    row_Nk = torch.empty_like(order).index_copy_(0, order, row_M).view_as(expert_index_Nk)
    token_M = torch.zeros(sum(rows_E), dtype=torch.int64).index_copy_(0, row_M, order // k)
    return row_Nk, rows_E, token_M


def _round_up(rows: int) -> int:
    """To a multiple of 16, or of 1/32 of the next power of two below: at most 6 % more, and few different sizes.

    Below 16, where one token at a time is decoded, as they are.
    """
    step = max(16, 1 << max(0, rows.bit_length() - 6)) if rows > 16 else 1
    return -(-rows // step) * step


def _gather_sum(rows_MD: Tensor, index_Nk: Tensor) -> Tensor:
    """y[n] = the sum of rows[index[n, :]], in fp32, in order."""
    (N, k), D = index_Nk.shape, rows_MD.shape[1]
    y_ND = rows_MD.new_empty(N, D)
    native.call("gather_sum", rows_MD.dtype, rows_MD, index_Nk, y_ND, N, k, D)
    return y_ND
