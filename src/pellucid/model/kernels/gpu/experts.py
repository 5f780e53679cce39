"""All experts of a layer, forward and backward, in Triton: grouped products without a sorted copy of the input.

up       rows gathered from x, two products (gate, up), epilogue: gelu(gate) * up * factor; gate and up are kept
down     the hidden layer times each expert's down; then every token sums its choices' rows: no atomics
backward grad rows gathered, product with down, epilogue: gradients of gate, up and factor, and the hidden layer anew
weights  gradients summed over an expert's rows in fp32, written once
The factor (a pair's gate) is multiplied into the hidden layer, so that nothing after `down` need be kept (SonicMoE,
arXiv 2512.14080). The definition is `MoE.mix_plain`.
Letters: N tokens, k choices, M rows sorted by expert (routing.py), D hidden, F intermediate, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pellucid.model.kernels.gpu.launch import HARDWARE_TANH, INTERPRETED, dot, gelu, wide
from pellucid.model.kernels.gpu.routing import TILE, Order, sort_by_expert

if INTERPRETED:
    UP = DOWN = BACK = {"BLOCK_O": 32, "BLOCK_I": 32}
    WEIGHT = {"BLOCK_O": 32, "BLOCK_I": 32, "BLOCK_M": 16}
else:
    UP = {"BLOCK_O": 64, "BLOCK_I": 64, "num_warps": 8, "num_stages": 3}
    DOWN = {"BLOCK_O": 128, "BLOCK_I": 64, "num_warps": 8, "num_stages": 3}
    BACK = {"BLOCK_O": 64, "BLOCK_I": 64, "num_warps": 8, "num_stages": 3}
    WEIGHT = {"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_M": 64, "num_warps": 8, "num_stages": 3}
GATHER_BLOCK = 1024


@triton.jit
def _tile(pointer, rows, row_inside, columns, width, stride):
    """[rows, columns] of a matrix, zeros beyond its edges."""
    inside = row_inside[:, None] & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _up(x, weight, token, expert_of_tile, factor, gate_up, inner, D, F,
        TILE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    expert = tl.load(expert_of_tile + tl.program_id(0))
    if expert < 0:
        return
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    source = tl.load(token + rows)
    weight += expert.to(tl.int64) * 2 * F * D
    gate, up = tl.zeros((TILE, BLOCK_O), tl.float32), tl.zeros((TILE, BLOCK_O), tl.float32)
    for first in range(0, D, BLOCK_I):
        inputs = first + tl.arange(0, BLOCK_I)
        x_tile = _tile(x, source, source >= 0, inputs, D, D)
        gate = dot(x_tile, tl.trans(_tile(weight, columns, columns < F, inputs, D, D)), gate, WIDE)
        up = dot(x_tile, tl.trans(_tile(weight + F.to(tl.int64) * D, columns, columns < F, inputs, D, D)), up, WIDE)
    out = gate_up + rows[:, None].to(tl.int64) * 2 * F + columns[None, :]
    inside = (columns[None, :] < F) & (rows[:, None] >= 0)
    gate, up = gate.to(gate_up.dtype.element_ty), up.to(gate_up.dtype.element_ty)  # what is kept is what is used
    tl.store(out, gate, mask=inside)
    tl.store(out + F, up, mask=inside)
    active, _ = gelu(gate.to(tl.float32), HARDWARE)
    hidden = active * up.to(tl.float32) * tl.load(factor + rows)[:, None]
    tl.store(inner + rows[:, None].to(tl.int64) * F + columns[None, :], hidden.to(inner.dtype.element_ty), mask=inside)


@triton.jit
def _product(x, weight, expert_of_tile, y, O, I, stride_o, stride_i,
             TILE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """y[M, O] = x[M, I] @ weight[expert][O, I].T, by strides."""
    expert = tl.load(expert_of_tile + tl.program_id(0))
    if expert < 0:
        return
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    weight += expert.to(tl.int64) * O * I
    total = tl.zeros((TILE, BLOCK_O), tl.float32)
    for first in range(0, I, BLOCK_I):
        inputs = first + tl.arange(0, BLOCK_I)
        inside = (inputs[:, None] < I) & (columns[None, :] < O)
        at = inputs[:, None].to(tl.int64) * stride_i + columns[None, :].to(tl.int64) * stride_o
        total = dot(_tile(x, rows, rows >= 0, inputs, I, I), tl.load(weight + at, mask=inside, other=0.0), total, WIDE)
    out = y + rows[:, None].to(tl.int64) * O + columns[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(columns[None, :] < O) & (rows[:, None] >= 0))


@triton.jit
def _back(grad, down, token, expert_of_tile, factor, gate_up, inner, grad_gate_up, grad_factor, D, F,
          TILE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """From the gradient of the output to those of gate, up and (one share per block of columns) the factor."""
    expert = tl.load(expert_of_tile + tl.program_id(0))
    if expert < 0:
        return
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    source = tl.load(token + rows)
    down += expert.to(tl.int64) * D * F
    reached = tl.zeros((TILE, BLOCK_O), tl.float32)  # gradient of the hidden layer
    for first in range(0, D, BLOCK_I):
        inputs = first + tl.arange(0, BLOCK_I)
        reached = dot(_tile(grad, source, source >= 0, inputs, D, D), _tile(down, inputs, inputs < D, columns, F, F), reached, WIDE)
    at = rows[:, None].to(tl.int64) * 2 * F + columns[None, :]
    inside = (columns[None, :] < F) & (rows[:, None] >= 0)
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + F, mask=inside, other=0.0).to(tl.float32)
    share = tl.load(factor + rows)[:, None]
    active, slope = gelu(gate, HARDWARE)
    tl.store(grad_factor + tl.program_id(1).to(tl.int64) * tl.num_programs(0) * TILE + rows, tl.sum(reached * active * up, 1))
    tl.store(grad_gate_up + at, (reached * share * slope * up).to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate_up + at + F, (reached * share * active).to(grad_gate_up.dtype.element_ty), mask=inside)
    hidden = (active * up * share).to(inner.dtype.element_ty)
    tl.store(inner + rows[:, None].to(tl.int64) * F + columns[None, :], hidden, mask=inside)


@triton.jit
def _weight_gradient(left, right, token, first_E, tokens_E, out, O, I, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
                     BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """out[expert] [O, I] = left.T @ right over the expert's rows, in fp32; a gathered factor is read by token."""
    expert = tl.program_id(2)
    start, count = tl.load(first_E + expert), tl.load(tokens_E + expert)
    o, i = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for first in range(0, count, BLOCK_M):
        rows = start + first + tl.arange(0, BLOCK_M)
        inside = first + tl.arange(0, BLOCK_M) < count
        source = tl.load(token + rows, mask=inside, other=0).to(tl.int64)
        left_tile = _tile(left, source if GATHER_LEFT else rows, inside, o, O, O)
        right_tile = _tile(right, source if GATHER_RIGHT else rows, inside, i, I, I)
        total = dot(tl.trans(left_tile), right_tile, total, WIDE)
    at = out + (expert.to(tl.int64) * O + o[:, None]) * I + i[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(o[:, None] < O) & (i[None, :] < I))


@triton.jit
def _gather_sum(rows, index, y, D, k: tl.constexpr, BLOCK: tl.constexpr):
    """y[n] = the sum of rows[index[n, :]], in fp32, in order."""
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(k):
        total += tl.load(rows + tl.load(index + n * k + choice) * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(y + n * D + columns, total.to(y.dtype.element_ty), mask=columns < D)


def _summed(rows_MD: Tensor, row_Nk: Tensor) -> Tensor:
    (N, k), D = row_Nk.shape, rows_MD.shape[1]
    y_ND, block = rows_MD.new_empty(N, D), min(GATHER_BLOCK, triton.next_power_of_2(D))
    _gather_sum[(N, triton.cdiv(D, block))](rows_MD, row_Nk, y_ND, D, k, block)
    return y_ND


def _rows_times(x_MI: Tensor, weight_EOI: Tensor, order: Order) -> Tensor:
    """[M, O]; the weight may be a transposed view."""
    _, O, I = weight_EOI.shape
    y_MO = x_MI.new_empty(len(x_MI), O)
    grid = (len(order.expert_of_tile), triton.cdiv(O, DOWN["BLOCK_O"]))
    _product[grid](x_MI, weight_EOI, order.expert_of_tile, y_MO, O, I, *weight_EOI.stride()[1:], TILE=TILE, WIDE=wide(x_MI), **DOWN)
    return y_MO


def _weight_gradients(left: Tensor, right: Tensor, order: Order, like: Tensor, gather_left: bool, gather_right: bool) -> Tensor:
    E, O, I = like.shape
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(O, WEIGHT["BLOCK_O"]), triton.cdiv(I, WEIGHT["BLOCK_I"]), E)
    _weight_gradient[grid](left, right, order.token_M, order.first_E, order.tokens_E, out, O, I, gather_left, gather_right,
                           WIDE=wide(left), **WEIGHT)  # fmt: skip
    return out


def _factors(gate_Nk: Tensor, order: Order) -> Tensor:
    return gate_Nk.new_zeros(len(order.token_M)).index_copy_(0, order.row_Nk.view(-1), gate_Nk.reshape(-1))


@torch.library.custom_op("pellucid::experts", mutates_args=())
def _experts(x_ND: Tensor, gate_Nk: Tensor, expert_index_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x_ND, dtype, (E, D, F) = x_ND.contiguous(), x_ND.dtype, down_proj.shape
    order = sort_by_expert(expert_index_Nk, E)
    M = len(order.token_M)
    gate_up, inner = x_ND.new_empty(M, 2 * F), x_ND.new_empty(M, F)
    grid = (len(order.expert_of_tile), triton.cdiv(F, UP["BLOCK_O"]))
    _up[grid](x_ND, gate_up_proj.to(dtype).contiguous(), order.token_M, order.expert_of_tile, _factors(gate_Nk, order), gate_up,
              inner, D, F, TILE=TILE, WIDE=wide(x_ND), HARDWARE=HARDWARE_TANH, **UP)  # fmt: skip
    y_ND = _summed(_rows_times(inner, down_proj.to(dtype), order), order.row_Nk)
    return y_ND, gate_up, order.row_Nk, order.token_M, order.expert_of_tile, order.first_E, order.tokens_E


@_experts.register_fake
def _(x_ND, gate_Nk, expert_index_Nk, gate_up_proj, down_proj):
    (N, k), (E, D, F) = expert_index_Nk.shape, down_proj.shape
    tiles = (N * k + TILE - 1) // TILE + E
    empty = lambda dtype, *shape: x_ND.new_empty(shape, dtype=dtype)
    return (empty(x_ND.dtype, N, D), empty(x_ND.dtype, tiles * TILE, 2 * F), empty(torch.int64, N, k),
            empty(torch.int32, tiles * TILE), empty(torch.int32, tiles), empty(torch.int64, E), empty(torch.int64, E))  # fmt: skip


@torch.library.custom_op("pellucid::experts_backward", mutates_args=())
def _experts_backward(grad_ND: Tensor, x_ND: Tensor, gate_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor, gate_up: Tensor,
                      row_Nk: Tensor, token_M: Tensor, expert_of_tile: Tensor, first_E: Tensor, tokens_E: Tensor,
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    order = Order(row_Nk, token_M, expert_of_tile, first_E, tokens_E)
    grad_ND, x_ND, dtype, (_, D, F) = grad_ND.contiguous(), x_ND.contiguous(), x_ND.dtype, down_proj.shape
    M, blocks = len(token_M), triton.cdiv(F, BACK["BLOCK_O"])
    inner, grad_gate_up, shares = x_ND.new_empty(M, F), torch.empty_like(gate_up), gate_Nk.new_zeros(blocks, M)
    _back[(len(expert_of_tile), blocks)](
        grad_ND, down_proj.to(dtype).contiguous(), token_M, expert_of_tile, _factors(gate_Nk, order), gate_up, inner, grad_gate_up,
        shares, D, F, TILE=TILE, WIDE=wide(x_ND), HARDWARE=HARDWARE_TANH, **BACK)  # fmt: skip
    grad_x = _summed(_rows_times(grad_gate_up, gate_up_proj.to(dtype).mT, order), row_Nk)
    return (grad_x, shares.sum(0)[row_Nk],
            _weight_gradients(grad_gate_up, x_ND, order, gate_up_proj, False, True),
            _weight_gradients(grad_ND, inner, order, down_proj, True, False))  # fmt: skip


@_experts_backward.register_fake
def _(grad_ND, x_ND, gate_Nk, gate_up_proj, down_proj, *kept):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (x_ND, gate_Nk, gate_up_proj, down_proj))


def _save(ctx, inputs, output):
    x_ND, gate_Nk, _, gate_up_proj, down_proj = inputs
    ctx.save_for_backward(x_ND, gate_Nk, gate_up_proj, down_proj, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_ND, *_):
    grad_x, grad_gate, grad_gate_up_proj, grad_down_proj = _experts_backward(grad_ND, *ctx.saved_tensors)
    return grad_x, grad_gate, None, grad_gate_up_proj, grad_down_proj


_experts.register_autograd(_gradients, setup_context=_save)


def experts(x_ND: Tensor, gate_Nk: Tensor, expert_index_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Sum over each token's choices of gate * down(gelu(gate_proj(x)) * up(x)), [N, D]; weights may be fp32 masters."""
    return _experts(x_ND, gate_Nk, expert_index_Nk, gate_up_proj, down_proj)[0]
