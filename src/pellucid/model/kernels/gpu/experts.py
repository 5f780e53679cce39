"""All experts of a layer, forward and backward: grouped products and what happens between them, in Triton.

gather   rows sorted by expert, so that tiles of them can be loaded by Hopper's copy engine (elsewhere by plain loads)
up       two products (gate, up), epilogue: gelu(gate) * up * factor; gate and up are kept
down     the hidden layer times each expert's down; then every token sums its choices' rows: no atomics
backward grad rows gathered, product with down; one pass to the gradients of gate, up and factor, and the hidden layer anew
weights  gradients summed over an expert's rows in fp32, written once
The factor (a pair's gate) is multiplied into the hidden layer, so that nothing after `down` need be kept (SonicMoE,
arXiv 2512.14080). Rows that fill up an expert's last tile are zeros, where tiles are read whole. The definition is `MoE.mix_plain`.
Large products, all but `up`, are left to cuBLAS, expert by expert: at two shapes it was 1 to 11 % faster than one grouped product, and
reads no such rows. The host has to wait for the rows' numbers, and takes 0.18 ms to find the way for each product of a size it
has not met.
Letters: N tokens, k choices, M rows sorted by expert (routing.py), D hidden, F intermediate, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pellucid.model.kernels import gpu
from pellucid.model.kernels.gpu.copies import copy_of
from pellucid.model.kernels.gpu.launch import HARDWARE_TANH, INTERPRETED, describe, dot, gelu, narrow, tile, wide
from pellucid.model.kernels.gpu.routing import TILE, Order, sort_by_expert
from pellucid.model.kernels.products import product, transposed_product

BF16 = {"BLOCK_I": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3}
FP32 = {"BLOCK_O": 64, "BLOCK_I": 32, "GROUP": 16, "num_warps": 8, "num_stages": 2}
# By bytes of a number.
UP = {2: {"BLOCK_O": 128, **BF16}, 4: FP32}
DOWN = {2: {"BLOCK_O": 256, **BF16}, 4: FP32}
WEIGHT = {2: {"BLOCK_O": 128, **BF16, "BLOCK_I": 256, "BLOCK_M": 64}, 4: {**FP32, "BLOCK_I": 64, "BLOCK_M": 32}}
if INTERPRETED:
    TINY = {"BLOCK_O": 32, "BLOCK_I": 32, "GROUP": 2}
    UP = DOWN = dict.fromkeys((2, 4), TINY)
    WEIGHT = {2: {**TINY, "BLOCK_M": 16}, 4: {**TINY, "BLOCK_M": 16}}
GATHER_BLOCK, OPEN_BLOCK = 1024, 2048
MUCH = 4e11  # FLOPs of one expert's product, on average, from which on it is the card's time that counts, not the host's


@triton.jit
def _place(at, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a product's at-th tile: GROUP row tiles meet all columns, then the next; L2 keeps what they share."""
    group = at // (GROUP * column_tiles)
    within = at - group * GROUP * column_tiles
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def _up(x, weight, expert_of_tile, used, factor, gate_out, up_out, inner, D, F, TILE: tl.constexpr, BLOCK_O: tl.constexpr,
        BLOCK_I: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    row_tiles, column_tiles = tl.load(used), tl.cdiv(F, BLOCK_O)
    # Under an `if` instead of a loop triton 3.6 writes products that the assembler serializes.
    for at in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):  # one or none
        row_tile, column_tile = _place(at, row_tiles, column_tiles, GROUP)
        row, column = row_tile * TILE, column_tile * BLOCK_O
        own = tl.load(expert_of_tile + row_tile) * 2 * F + column
        gate, up = tl.zeros((TILE, BLOCK_O), tl.float32), tl.zeros((TILE, BLOCK_O), tl.float32)
        for first in range(0, D, BLOCK_I):
            x_tile = x.load([row, first])
            gate = dot(x_tile, weight.load([own, first]).T, gate, WIDE)
            up = dot(x_tile, weight.load([own + F, first]).T, up, WIDE)
        gate, up = narrow(gate, gate_out.dtype, HARDWARE), narrow(up, up_out.dtype, HARDWARE)  # what is kept is what is used
        gate_out.store([row, column], gate)
        up_out.store([row, column], up)
        active, _ = gelu(gate.to(tl.float32), HARDWARE)
        hidden = active * up.to(tl.float32) * tl.load(factor + row + tl.arange(0, TILE))[:, None]
        inner.store([row, column], hidden.to(inner.dtype))


@triton.jit
def _product(x, weight, expert_of_tile, used, y, O, I, TILE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
             GROUP: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """y[M, O] = x[M, I] @ weight[expert], which is [I, O], or [O, I] and TRANSPOSED."""
    row_tiles, column_tiles = tl.load(used), tl.cdiv(O, BLOCK_O)
    for at in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):  # one or none: see `_up`
        row_tile, column_tile = _place(at, row_tiles, column_tiles, GROUP)
        row, column = row_tile * TILE, column_tile * BLOCK_O
        expert = tl.load(expert_of_tile + row_tile)
        total = tl.zeros((TILE, BLOCK_O), tl.float32)
        for first in range(0, I, BLOCK_I):
            x_tile = x.load([row, first])
            if TRANSPOSED:
                total = dot(x_tile, weight.load([expert * O + column, first]).T, total, WIDE)
            else:
                total = dot(x_tile, weight.load([expert * I + first, column]), total, WIDE)
        y.store([row, column], total.to(y.dtype))


@triton.jit
def _weight_gradient(left, right, first_E, tokens_E, out, O, I, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
                     BLOCK_M: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """out[expert] [O, I] = left.T @ right over the expert's rows, in fp32; left [M, O], right [M, I]."""
    expert = tl.program_id(1)
    row_tile, column_tile = _place(tl.program_id(0), tl.cdiv(O, BLOCK_O), tl.cdiv(I, BLOCK_I), GROUP)
    start, count = tl.load(first_E + expert).to(tl.int32), tl.load(tokens_E + expert).to(tl.int32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for first in range(start, start + count, BLOCK_M):
        total = dot(left.load([first, row_tile * BLOCK_O]).T, right.load([first, column_tile * BLOCK_I]), total, WIDE)
    o, i = row_tile * BLOCK_O + tl.arange(0, BLOCK_O), column_tile * BLOCK_I + tl.arange(0, BLOCK_I)
    to = out + (expert.to(tl.int64) * O + o[:, None]) * I + i[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(o[:, None] < O) & (i[None, :] < I))


@triton.jit
def _open(reached, gate_up, factor, used, grad_gate_up, grad_factor, F, TILE: tl.constexpr, BLOCK: tl.constexpr,
          HARDWARE: tl.constexpr):  # fmt: skip
    """From the gradient of the hidden layer to those of gate, up and factor; the hidden layer itself takes its place."""
    m = tl.program_id(0).to(tl.int64)
    if m < tl.load(used) * TILE:
        share, total = tl.load(factor + m), tl.full((), 0.0, tl.float32)
        reached += m * F
        gate_up += m * 2 * F
        grad_gate_up += m * 2 * F
        for first in range(0, F, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < F
            slope = tl.load(reached + columns, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(gate_up + F + columns, mask=inside, other=0.0).to(tl.float32)
            active, steep = gelu(tl.load(gate_up + columns, mask=inside, other=0.0).to(tl.float32), HARDWARE)
            total += tl.sum(slope * active * up, 0)
            tl.store(grad_gate_up + columns, (slope * share * steep * up).to(grad_gate_up.dtype.element_ty), mask=inside)
            tl.store(grad_gate_up + F + columns, (slope * share * active).to(grad_gate_up.dtype.element_ty), mask=inside)
            tl.store(reached + columns, (active * up * share).to(reached.dtype.element_ty), mask=inside)
        tl.store(grad_factor + m, total)


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


def _rows_times(x_MI: Tensor, weight: Tensor, order: Order, transposed: bool) -> Tensor:
    """[M, O] = x @ weight[expert], which is [I, O], or [O, I] and transposed."""
    I, O = x_MI.shape[1], weight.shape[1] if transposed else weight.shape[2]
    y_MO = x_MI.new_empty(len(x_MI), O)
    if len(order.host_E):
        for expert, rows in order.stretches():
            if rows.start < rows.stop:
                product(x_MI[rows], weight[expert] if transposed else weight[expert].t(), out=y_MO[rows])
        return y_MO
    config = DOWN[x_MI.element_size()]
    block_o, block_i = config["BLOCK_O"], config["BLOCK_I"]
    _product[(len(order.expert_of_tile) * triton.cdiv(O, block_o),)](
        describe(x_MI, TILE, block_i), describe(weight, *((block_o, block_i) if transposed else (block_i, block_o))),
        order.expert_of_tile, order.used, describe(y_MO, TILE, block_o), O, I, TILE=TILE, TRANSPOSED=transposed, WIDE=wide(x_MI),
        **config)  # fmt: skip
    return y_MO


def _weight_gradients(left_MO: Tensor, right_MI: Tensor, order: Order, like: Tensor) -> Tensor:
    E, O, I = like.shape
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    if len(order.host_E):
        for expert, rows in order.stretches():
            if rows.start == rows.stop:
                out[expert].zero_()
            else:
                transposed_product(left_MO[rows], right_MI[rows], out=out[expert])
        return out
    config = WEIGHT[left_MO.element_size()]
    block_o, block_i, block_m = config["BLOCK_O"], config["BLOCK_I"], config["BLOCK_M"]
    _weight_gradient[(triton.cdiv(O, block_o) * triton.cdiv(I, block_i), E)](
        describe(left_MO, block_m, block_o), describe(right_MI, block_m, block_i), order.first_E, order.tokens_E, out, O, I,
        WIDE=wide(left_MO), **config)  # fmt: skip
    return out


def _factors(gate_Nk: Tensor, order: Order) -> Tensor:
    return gate_Nk.new_zeros(len(order.token_M)).index_copy_(0, order.row_Nk.view(-1), gate_Nk.reshape(-1))


@torch.library.custom_op("pellucid::experts", mutates_args=())
def _experts(x_ND: Tensor, gate_Nk: Tensor, expert_index_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
             gate_up_copy: Tensor | None, down_copy: Tensor | None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x_ND, (E, D, F) = x_ND.contiguous(), down_proj.shape
    order = sort_by_expert(expert_index_Nk, E)
    arrived = order.to_host() if _is_much(expert_index_Nk, down_proj) else None
    M, config = len(order.token_M), UP[x_ND.element_size()]
    gate_up, inner, (block_o, block_i) = x_ND.new_empty(M, 2 * F), x_ND.new_empty(M, F), (config["BLOCK_O"], config["BLOCK_I"])
    _up[(len(order.expert_of_tile) * triton.cdiv(F, block_o),)](
        describe(_sorted(x_ND, order), TILE, block_i), describe(_read(gate_up_proj, gate_up_copy, x_ND), block_o, block_i),
        order.expert_of_tile, order.used, _factors(gate_Nk, order),
        *(describe(part, TILE, block_o) for part in (*gate_up.chunk(2, 1), inner)), D, F,
        TILE=TILE, WIDE=wide(x_ND), HARDWARE=HARDWARE_TANH, **config)  # fmt: skip
    if arrived is not None:
        arrived.synchronize()  # while `_up` still runs: the GPU does not idle
    y_ND = _summed(_rows_times(inner, _read(down_proj, down_copy, x_ND), order, transposed=True), order.row_Nk)
    return (y_ND, gate_up, order.row_Nk, order.token_M, order.expert_of_tile, order.first_E, order.tokens_E, order.used,
            order.host_E)  # fmt: skip


def _read(weight: Tensor, copy: Tensor | None, x: Tensor) -> Tensor:
    """What is multiplied: the weight in x's dtype."""
    return weight.to(x.dtype) if copy is None else copy


def _is_much(expert_index_Nk: Tensor, down_proj: Tensor) -> bool:
    E, D, F = down_proj.shape
    return 2 * (expert_index_Nk.numel() / E) * D * F >= MUCH


@_experts.register_fake
def _(x_ND, gate_Nk, expert_index_Nk, gate_up_proj, down_proj, *copies):
    (N, k), (E, D, F) = expert_index_Nk.shape, down_proj.shape
    tiles, host = (N * k + TILE - 1) // TILE + E, E if _is_much(expert_index_Nk, down_proj) else 0
    empty = lambda dtype, *shape: x_ND.new_empty(shape, dtype=dtype)
    return (empty(x_ND.dtype, N, D), empty(x_ND.dtype, tiles * TILE, 2 * F), empty(torch.int64, N, k), empty(torch.int32, tiles * TILE),
            empty(torch.int32, tiles), empty(torch.int64, E), empty(torch.int64, E), empty(torch.int32),
            torch.empty(host, dtype=torch.int64, device="cpu"))  # fmt: skip


@torch.library.custom_op("pellucid::experts_backward", mutates_args=())
def _experts_backward(grad_ND: Tensor, x_ND: Tensor, gate_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
                      gate_up_copy: Tensor | None, down_copy: Tensor | None, gate_up: Tensor, row_Nk: Tensor, token_M: Tensor,
                      expert_of_tile: Tensor, first_E: Tensor, tokens_E: Tensor, used: Tensor, host_E: Tensor,
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    order = Order(row_Nk, token_M, expert_of_tile, first_E, tokens_E, used, host_E)
    grad_ND, M, F = grad_ND.contiguous(), len(token_M), down_proj.shape[2]
    grad_MD = _sorted(grad_ND, order)
    reached = _rows_times(grad_MD, _read(down_proj, down_copy, x_ND), order, transposed=False)
    grad_gate_up, shares = torch.empty_like(gate_up), gate_Nk.new_empty(M)
    _open[(M,)](reached, gate_up, _factors(gate_Nk, order), used, grad_gate_up, shares, F, TILE, min(OPEN_BLOCK, tile(F)),
                HARDWARE_TANH)  # fmt: skip
    grad_down = _weight_gradients(grad_MD, reached, order, down_proj)  # it is the hidden layer now
    del grad_MD, reached
    grad_x = _summed(_rows_times(grad_gate_up, _read(gate_up_proj, gate_up_copy, x_ND), order, transposed=False), row_Nk)
    grad_gate_up_proj = _weight_gradients(grad_gate_up, _sorted(x_ND.contiguous(), order), order, gate_up_proj)
    return grad_x, shares[row_Nk], grad_gate_up_proj, grad_down


@_experts_backward.register_fake
def _(grad_ND, x_ND, gate_Nk, gate_up_proj, down_proj, *kept):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (x_ND, gate_Nk, gate_up_proj, down_proj))


def _within_forward(x_ND: Tensor, gate_Nk: Tensor, index_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor, copy: Tensor | None, _,
                    ) -> int:  # fmt: skip
    """Bytes while `up` runs, or `down`."""
    rows, (E, D, F), cast = _rows(index_Nk, down_proj), down_proj.shape, copy is None and gate_up_proj.dtype != x_ND.dtype
    return x_ND.element_size() * (rows * (3 * F + D) + cast * 2 * E * D * F)


def _within_backward(grad_ND: Tensor, x_ND: Tensor, gate_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor, copy: Tensor | None, _,
                     gate_up: Tensor, *__) -> int:  # fmt: skip
    """Bytes while the gradient goes back through down, to its weights, through up, and to its weights."""
    rows, (E, D, F), size = len(gate_up), down_proj.shape, x_ND.element_size()
    cast = E * D * F * (copy is None and gate_up_proj.dtype != x_ND.dtype)
    down, up, grad_x = (tensor.numel() * tensor.element_size() for tensor in (down_proj, gate_up_proj, x_ND))
    return max(size * (rows * (D + F) + cast), size * rows * (D + 3 * F) + down, size * (rows * (2 * F + D) + 2 * cast) + down,
               size * rows * (2 * F + D) + down + grad_x + up)  # fmt: skip


def _rows(index_Nk: Tensor, down_proj: Tensor) -> int:
    return (triton.cdiv(index_Nk.numel(), TILE) + len(down_proj)) * TILE


gpu.WITHIN[torch.ops.pellucid.experts.default] = _within_forward
gpu.WITHIN[torch.ops.pellucid.experts_backward.default] = _within_backward


def _save(ctx, inputs, output):
    x_ND, gate_Nk, _, *weights = inputs
    ctx.save_for_backward(x_ND, gate_Nk, *weights, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_ND, *_):
    grad_x, grad_gate, grad_gate_up_proj, grad_down_proj = _experts_backward(grad_ND, *ctx.saved_tensors)
    return grad_x, grad_gate, None, grad_gate_up_proj, grad_down_proj, None, None


_experts.register_autograd(_gradients, setup_context=_save)


def experts(x_ND: Tensor, gate_Nk: Tensor, expert_index_Nk: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Sum over each token's choices of gate * down(gelu(gate_proj(x)) * up(x)), [N, D]; weights may be fp32 masters."""
    copies = (copy_of(weight, x_ND.dtype) for weight in (gate_up_proj, down_proj))
    return _experts(x_ND, gate_Nk, expert_index_Nk, gate_up_proj, down_proj, *copies)[0]
