"""The router's scores in fp32 from activations as they are, forward and backward in Triton: no fp32 copy of them is made or kept.

The definition is `Router.forward` of model/moe.py. Letters: N tokens, D hidden, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pellucid.model.kernels.gpu.launch import INTERPRETED, tile

MOST = 32768  # numbers of a program's block of tokens
BLOCK_N, BLOCK_D = (16, 32) if INTERPRETED else (32, 128)  # of the gradients' programs
BLOCKS = 4 if INTERPRETED else 64  # programs that share the tokens of the weight's gradient; each sums its own, in order


@triton.jit
def _score(x, weight, scores, N, D, E, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < N) & (columns[None, :] < D)
    tokens = tl.load(x + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    for e in range(E):
        own = tl.load(weight + e * D + columns, mask=columns < D, other=0.0)
        tl.store(scores + rows * E + e, tl.sum(tokens * own[None, :], 1), mask=rows < N)


@triton.jit
def _score_backward_x(grad, weight, grad_x, N, D, E, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for e in range(E):
        slope = tl.load(grad + rows * E + e, mask=rows < N, other=0.0)
        total += slope[:, None] * tl.load(weight + e * D + columns, mask=columns < D, other=0.0)[None, :]
    inside = (rows[:, None] < N) & (columns[None, :] < D)
    tl.store(grad_x + rows[:, None] * D + columns[None, :], total.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _score_backward_weight(grad, x, sums, N, D, E, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    columns, experts = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_N, N, tl.num_programs(0) * BLOCK_N):
        rows = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_N)
        slopes = tl.load(grad + rows[None, :] * E + experts[:, None], mask=(rows[None, :] < N) & (experts[:, None] < E), other=0.0)
        inside = (rows[:, None] < N) & (columns[None, :] < D)
        tokens = tl.load(x + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total = tl.dot(slopes, tokens, total, input_precision="ieee")
    to = sums + (tl.program_id(0) * E + experts[:, None]) * D + columns[None, :]
    tl.store(to, total, mask=(experts[:, None] < E) & (columns[None, :] < D))


@torch.library.custom_op("pellucid::router_scores", mutates_args=())
def _scores(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    x_ND, (N, D), E, block_d = x_ND.contiguous(), x_ND.shape, len(weight_ED), tile(x_ND.shape[1])
    scores_NE, block_n = x_ND.new_empty(N, E, dtype=torch.float32), max(1, min(16, MOST // block_d))
    _score[(triton.cdiv(N, block_n),)](x_ND, weight_ED, scores_NE, N, D, E, block_n, block_d, num_warps=8)
    return scores_NE


@_scores.register_fake
def _(x_ND, weight_ED):
    return x_ND.new_empty(len(x_ND), len(weight_ED), dtype=torch.float32)


@torch.library.custom_op("pellucid::router_scores_backward", mutates_args=())
def _scores_backward(grad_NE: Tensor, x_ND: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    grad_NE, x_ND, (N, D), E = grad_NE.contiguous(), x_ND.contiguous(), x_ND.shape, len(weight_ED)
    grad_x, sums = torch.empty_like(x_ND), x_ND.new_empty(min(BLOCKS, triton.cdiv(N, BLOCK_N)), E, D, dtype=torch.float32)
    columns = triton.cdiv(D, BLOCK_D)
    _score_backward_x[(triton.cdiv(N, BLOCK_N), columns)](grad_NE, weight_ED, grad_x, N, D, E, BLOCK_N, BLOCK_D)
    _score_backward_weight[(len(sums), columns)](grad_NE, x_ND, sums, N, D, E, BLOCK_N, BLOCK_D, tile(E))
    return grad_x, sums.sum(0)


@_scores_backward.register_fake
def _(grad_NE, x_ND, weight_ED):
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format), torch.empty_like(weight_ED)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_NE):
    return _scores_backward(grad_NE, *ctx.saved_tensors)


_scores.register_autograd(_gradients, setup_context=_save)


def router_scores(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight.T in fp32, [N, E]; the weight is fp32, x of any dtype."""
    return _scores(x_ND, weight_ED)
