"""All experts of a layer, forward and backward, in Triton: grouped products with their pointwise work in the epilogue.

gather   rows sorted by expert, so that tiles of them can be loaded by Hopper's copy engine (elsewhere by plain loads)
up       two products (gate, up), epilogue: gelu(gate) * up * factor; gate and up are kept
down     the hidden layer times each expert's down; then every token sums its choices' rows: no atomics
backward grad rows gathered, product with down, epilogue: gradients of gate, up and factor, and the hidden layer anew
weights  gradients summed over an expert's rows in fp32, written once
The factor (a pair's gate) is multiplied into the hidden layer, so that nothing after `down` need be kept (SonicMoE,
arXiv 2512.14080). Rows that fill up an expert's last tile are zeros throughout. The definition is `MoE.mix_plain`.
Letters: N tokens, k choices, M rows sorted by expert (routing.py), D hidden, F intermediate, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pellucid.model.kernels.gpu.launch import HARDWARE_TANH, INTERPRETED, describe, dot, gelu, programs, wide
from pellucid.model.kernels.gpu.routing import TILE, Order, sort_by_expert

BF16 = {"GROUP": 16, "FLAT": True, "num_warps": 8, "num_stages": 3}
FP32 = {"BLOCK_O": 64, "BLOCK_I": 32, "GROUP": 16, "FLAT": False, "num_warps": 8, "num_stages": 2}
TINY = {"BLOCK_O": 32, "BLOCK_I": 32, "GROUP": 2, "FLAT": False}
# By bytes of a number. FLAT: the loads of a program's next tile begin while the last one is written.
UP = {2: {"BLOCK_O": 128, "BLOCK_I": 64, **BF16}, 4: FP32}
DOWN = {2: {"BLOCK_O": 256, "BLOCK_I": 64, **BF16}, 4: FP32}
BACK = {2: {"BLOCK_O": 128, "BLOCK_I": 64, **BF16}, 4: FP32}
WEIGHT = {2: {"BLOCK_O": 128, "BLOCK_I": 256, "BLOCK_M": 64, **BF16}, 4: {**FP32, "BLOCK_I": 64, "BLOCK_M": 32}}
if INTERPRETED:
    UP = DOWN = BACK = {2: TINY, 4: TINY}
    WEIGHT = dict.fromkeys((2, 4), {**TINY, "BLOCK_M": 16})
GATHER_BLOCK = 1024


@triton.jit
def _place(at, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a product's at-th tile: GROUP row tiles meet all columns, then the next; L2 keeps what they share."""
    group = at // (GROUP * column_tiles)
    within = at - group * GROUP * column_tiles
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def _up(x, weight, expert_of_tile, used, factor, gate_up, inner, M, D, F,
        TILE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
        HARDWARE: tl.constexpr, FLAT: tl.constexpr):  # fmt: skip
    row_tiles, column_tiles = tl.load(used), tl.cdiv(F, BLOCK_O)
    for at in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLAT):
        row_tile, column_tile = _place(at, row_tiles, column_tiles, GROUP)
        expert = tl.load(expert_of_tile + row_tile)
        own = expert * 2 * F + column_tile * BLOCK_O
        gate, up = tl.zeros((TILE, BLOCK_O), tl.float32), tl.zeros((TILE, BLOCK_O), tl.float32)
        for first in range(0, D, BLOCK_I):
            x_tile = x.load([row_tile * TILE, first])
            gate = dot(x_tile, weight.load([own, first]).T, gate, WIDE)
            up = dot(x_tile, weight.load([own + F, first]).T, up, WIDE)
        row, column = row_tile * TILE, column_tile * BLOCK_O
        gate, up = gate.to(gate_up.dtype), up.to(gate_up.dtype)  # what is kept is what is used
        gate_up.store([row, column], gate)
        gate_up.store([M + row, column], up)
        active, _ = gelu(gate.to(tl.float32), HARDWARE)
        hidden = active * up.to(tl.float32) * tl.load(factor + row + tl.arange(0, TILE))[:, None]
        inner.store([row, column], hidden.to(inner.dtype))


@triton.jit
def _product(x, weight, expert_of_tile, used, y, M, O, I, PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK_O: tl.constexpr,
             BLOCK_I: tl.constexpr, GROUP: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr):  # fmt: skip
    """y[M, O] = the sum over parts of x[part, M, I] @ weight[expert, part], which is [I, O], or [O, I] and TRANSPOSED."""
    row_tiles, column_tiles = tl.load(used), tl.cdiv(O, BLOCK_O)
    length = tl.cdiv(I, BLOCK_I) * BLOCK_I
    for at in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLAT):
        row_tile, column_tile = _place(at, row_tiles, column_tiles, GROUP)
        row, column = row_tile * TILE, column_tile * BLOCK_O
        expert = tl.load(expert_of_tile + row_tile) * PARTS
        total = tl.zeros((TILE, BLOCK_O), tl.float32)
        for first in range(0, PARTS * length, BLOCK_I):
            part = first // length
            i = first - part * length
            x_tile = x.load([part * M + row, i])
            if TRANSPOSED:
                total = dot(x_tile, weight.load([(expert + part) * O + column, i]).T, total, WIDE)
            else:
                total = dot(x_tile, weight.load([(expert + part) * I + i, column]), total, WIDE)
        y.store([row, column], total.to(y.dtype))


@triton.jit
def _back(grad, down, expert_of_tile, used, factor, gate_up, inner, grad_gate_up, grad_factor, M, D, F,
          TILE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
          HARDWARE: tl.constexpr, FLAT: tl.constexpr):  # fmt: skip
    """From the gradient of the output to those of gate, up and (one share per block of columns) the factor."""
    row_tiles, column_tiles = tl.load(used), tl.cdiv(F, BLOCK_O)
    for at in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLAT):
        row_tile, column_tile = _place(at, row_tiles, column_tiles, GROUP)
        expert = tl.load(expert_of_tile + row_tile)
        reached = tl.zeros((TILE, BLOCK_O), tl.float32)  # gradient of the hidden layer
        for first in range(0, D, BLOCK_I):
            reached = dot(grad.load([row_tile * TILE, first]), down.load([expert * D + first, column_tile * BLOCK_O]), reached, WIDE)
        row, column = row_tile * TILE, column_tile * BLOCK_O
        gate, up = gate_up.load([row, column]).to(tl.float32), gate_up.load([M + row, column]).to(tl.float32)
        rows = row + tl.arange(0, TILE)
        share = tl.load(factor + rows)[:, None]
        active, slope = gelu(gate, HARDWARE)
        tl.store(grad_factor + column_tile.to(tl.int64) * M + rows, tl.sum(reached * active * up, 1))
        grad_gate_up.store([row, column], (reached * share * slope * up).to(grad_gate_up.dtype))
        grad_gate_up.store([M + row, column], (reached * share * active).to(grad_gate_up.dtype))
        inner.store([row, column], (active * up * share).to(inner.dtype))


@triton.jit
def _weight_gradient(left, right, first_E, tokens_E, out, M, O, I, E, PARTS: tl.constexpr, BLOCK_O: tl.constexpr,
                     BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
                     FLAT: tl.constexpr):  # fmt: skip
    """out[expert, part] [O, I] = left[part].T @ right over the expert's rows, in fp32; left [part, M, O], right [M, I]."""
    row_tiles, column_tiles = tl.cdiv(O, BLOCK_O), tl.cdiv(I, BLOCK_I)
    tiles = row_tiles * column_tiles
    for at in tl.range(tl.program_id(0), tiles * E * PARTS, tl.num_programs(0), flatten=FLAT):
        matrix = at // tiles
        expert, part = matrix // PARTS, matrix % PARTS
        row_tile, column_tile = _place(at - matrix * tiles, row_tiles, column_tiles, GROUP)
        start, count = tl.load(first_E + expert).to(tl.int32), tl.load(tokens_E + expert).to(tl.int32)
        total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for first in range(start, start + count, BLOCK_M):
            left_tile = left.load([part * M + first, row_tile * BLOCK_O])
            total = dot(left_tile.T, right.load([first, column_tile * BLOCK_I]), total, WIDE)
        o, i = row_tile * BLOCK_O + tl.arange(0, BLOCK_O), column_tile * BLOCK_I + tl.arange(0, BLOCK_I)
        to = out + (matrix.to(tl.int64) * O + o[:, None]) * I + i[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=(o[:, None] < O) & (i[None, :] < I))


@triton.jit
def _gather(x, token, y, D, BLOCK: tl.constexpr):
    """y[m] = x[token[m]], zeros where there is none."""
    m = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(token + m).to(tl.int64)
    there = columns < tl.where(source >= 0, D, 0)
    tl.store(y + m * D + columns, tl.load(x + source * D + columns, mask=there, other=0.0), mask=columns < D)


@triton.jit
def _gather_sum(rows, index, y, D, k: tl.constexpr, BLOCK: tl.constexpr):
    """y[n] = the sum of rows[index[n, :]], in fp32, in order."""
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(k):
        total += tl.load(rows + tl.load(index + n * k + choice) * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(y + n * D + columns, total.to(y.dtype.element_ty), mask=columns < D)


def _sorted(x_ND: Tensor, order: Order) -> Tensor:
    M, D = len(order.token_M), x_ND.shape[1]
    y_MD, block = x_ND.new_empty(M, D), min(GATHER_BLOCK, triton.next_power_of_2(D))
    _gather[(M, triton.cdiv(D, block))](x_ND, order.token_M, y_MD, D, block)
    return y_MD


def _summed(rows_MD: Tensor, row_Nk: Tensor) -> Tensor:
    (N, k), D = row_Nk.shape, rows_MD.shape[1]
    y_ND, block = rows_MD.new_empty(N, D), min(GATHER_BLOCK, triton.next_power_of_2(D))
    _gather_sum[(N, triton.cdiv(D, block))](rows_MD, row_Nk, y_ND, D, k, block)
    return y_ND


def _rows_times(x: Tensor, weight: Tensor, order: Order, transposed: bool) -> Tensor:
    """[M, O]; x [M, I] and weight [E, O, I] transposed, or x [parts, M, I] and weight [E, parts * I, O]."""
    M, I = x.shape[-2:]
    O, parts = weight.shape[1] if transposed else weight.shape[2], x.numel() // (M * I)
    config, y_MO = DOWN[x.element_size()], x.new_empty(M, O)
    block_o, block_i = config["BLOCK_O"], config["BLOCK_I"]
    _product[programs(len(order.expert_of_tile) * triton.cdiv(O, block_o))](
        describe(x, TILE, block_i), describe(weight, *((block_o, block_i) if transposed else (block_i, block_o))),
        order.expert_of_tile, order.used, describe(y_MO, TILE, block_o), M, O, I, parts, TILE=TILE, TRANSPOSED=transposed,
        WIDE=wide(x), **config)  # fmt: skip
    return y_MO


def _weight_gradients(left: Tensor, right_MI: Tensor, order: Order, like: Tensor) -> Tensor:
    """Of a weight like [E, parts * O, I]; left [parts, M, O]."""
    (M, O), I, E = left.shape[-2:], like.shape[2], len(like)
    parts, out = like.shape[1] // O, torch.empty_like(like, memory_format=torch.contiguous_format)
    config = WEIGHT[left.element_size()]
    block_o, block_i, block_m = config["BLOCK_O"], config["BLOCK_I"], config["BLOCK_M"]
    _weight_gradient[programs(E * parts * triton.cdiv(O, block_o) * triton.cdiv(I, block_i))](
        describe(left, block_m, block_o), describe(right_MI, block_m, block_i), order.first_E, order.tokens_E, out, M, O, I, E, parts,
        WIDE=wide(left), **config)  # fmt: skip
    return out


def _factors(gate_Nk: Tensor, order: Order) -> Tensor:
    return gate_Nk.new_zeros(len(order.token_M)).index_copy_(0, order.row_Nk.view(-1), gate_Nk.reshape(-1))


@torch.library.custom_op("pellucid::experts", mutates_args=())
def _experts(x_ND: Tensor, gate_Nk: Tensor, expert_index_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x_ND, dtype, (E, D, F) = x_ND.contiguous(), x_ND.dtype, down_proj.shape
    order = sort_by_expert(expert_index_Nk, E)
    M = len(order.token_M)
    gate_up, inner = x_ND.new_empty(2, M, F), x_ND.new_empty(M, F)
    config = UP[x_ND.element_size()]
    block_o, block_i = config["BLOCK_O"], config["BLOCK_I"]
    _up[programs(len(order.expert_of_tile) * triton.cdiv(F, block_o))](
        describe(_sorted(x_ND, order), TILE, block_i), describe(gate_up_proj.to(dtype), block_o, block_i), order.expert_of_tile,
        order.used, _factors(gate_Nk, order), describe(gate_up, TILE, block_o), describe(inner, TILE, block_o), M, D, F, TILE=TILE, WIDE=wide(x_ND),
        HARDWARE=HARDWARE_TANH, **config)  # fmt: skip
    y_ND = _summed(_rows_times(inner, down_proj.to(dtype), order, transposed=True), order.row_Nk)
    return y_ND, gate_up, order.row_Nk, order.token_M, order.expert_of_tile, order.first_E, order.tokens_E, order.used


@_experts.register_fake
def _(x_ND, gate_Nk, expert_index_Nk, gate_up_proj, down_proj):
    (N, k), (E, D, F) = expert_index_Nk.shape, down_proj.shape
    tiles = (N * k + TILE - 1) // TILE + E
    empty = lambda dtype, *shape: x_ND.new_empty(shape, dtype=dtype)
    return (empty(x_ND.dtype, N, D), empty(x_ND.dtype, 2, tiles * TILE, F), empty(torch.int64, N, k), empty(torch.int32, tiles * TILE),
            empty(torch.int32, tiles), empty(torch.int64, E), empty(torch.int64, E), empty(torch.int32))  # fmt: skip


@torch.library.custom_op("pellucid::experts_backward", mutates_args=())
def _experts_backward(grad_ND: Tensor, x_ND: Tensor, gate_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor, gate_up: Tensor,
                      row_Nk: Tensor, token_M: Tensor, expert_of_tile: Tensor, first_E: Tensor, tokens_E: Tensor, used: Tensor,
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    order = Order(row_Nk, token_M, expert_of_tile, first_E, tokens_E, used)
    grad_ND, x_ND, dtype, (_, D, F) = grad_ND.contiguous(), x_ND.contiguous(), x_ND.dtype, down_proj.shape
    M, config = len(token_M), BACK[x_ND.element_size()]
    block_o, block_i = config["BLOCK_O"], config["BLOCK_I"]
    columns, grad_MD = triton.cdiv(F, block_o), _sorted(grad_ND, order)
    inner, grad_gate_up, shares = x_ND.new_empty(M, F), torch.empty_like(gate_up), gate_Nk.new_zeros(columns, M)
    _back[programs(len(expert_of_tile) * columns)](
        describe(grad_MD, TILE, block_i), describe(down_proj.to(dtype), block_i, block_o), expert_of_tile, used,
        _factors(gate_Nk, order), *(describe(x, TILE, block_o) for x in (gate_up, inner, grad_gate_up)), shares, M, D, F, TILE=TILE, WIDE=wide(x_ND),
        HARDWARE=HARDWARE_TANH, **config)  # fmt: skip
    grad_down = _weight_gradients(grad_MD, inner, order, down_proj)
    del inner, grad_MD
    grad_x = _summed(_rows_times(grad_gate_up, gate_up_proj.to(dtype), order, transposed=False), row_Nk)
    grad_gate_up_proj = _weight_gradients(grad_gate_up, _sorted(x_ND, order), order, gate_up_proj)
    return grad_x, shares.sum(0)[row_Nk], grad_gate_up_proj, grad_down


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
