"""Capped causal attention over grouped heads and packed documents, forward and backward, in Triton.

Logits are capped at c = 30, so e^logit needs no running maximum: a row keeps one sum. Rows are (query, head) pairs
that share a key/value head. Blocks of keys outside a block's documents are never read. Saved: q, k, v, out, what its
rounding took, log2 of the sums. A gradient is a difference with the output: where a row reads one key almost alone, a
rounded output would leave mostly its rounding.
The definition is `chunked_capped_attention` of model/attention.py. Flash attention: Dao 2023 (arXiv 2307.08691).
Letters: B batch, K key/value heads, T sequence, G query heads for each of them, d head_dim; M rows, N keys of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pellucid.model.kernels import gpu
from pellucid.model.kernels.gpu.launch import HARDWARE_TANH, INTERPRETED, describe, dot, narrow, tanh, tile, wide

LOG2_E = tl.constexpr(1.4426950408889634)
HEADS = 16  # of a program that turns gradients
FP32 = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
# By bytes of a number.
FORWARD = {2: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}, 4: FP32}
BACKWARD_Q = {2: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}, 4: FP32}
BACKWARD_KV = {2: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}, 4: FP32}
if INTERPRETED:
    FORWARD = BACKWARD_Q = BACKWARD_KV = {size: {"BLOCK_M": 32, "BLOCK_N": 32} for size in (2, 4)}


@triton.jit
def _visible(weights, position, keys, query_document, key_document, T):
    """The weights, 0 where the key may not be read; positions and keys are laid out along their sides, [M, 1] and [1, N] or turned."""
    own = tl.load(query_document + position, mask=position < T, other=-2)
    theirs = tl.load(key_document + keys, mask=keys < T, other=-3)
    return tl.where((keys <= position) & (own == theirs), weights, 0.0)


@triton.jit
def _keys(position, first_key, run_start, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, G: tl.constexpr, block):
    """Where the keys of a block of rows begin, those that all its rows may read begin and end, and where all end."""
    inside = position < T
    start = tl.min(tl.load(first_key + position, mask=inside, other=T)) // BLOCK_N * BLOCK_N
    stop = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G + 1, T)
    whole = tl.cdiv(tl.max(tl.load(run_start + position, mask=inside, other=0)), BLOCK_N) * BLOCK_N
    whole_stop = (block * BLOCK_M // G + 1) // BLOCK_N * BLOCK_N
    whole_stop = tl.maximum(whole_stop, start)
    return start, tl.minimum(tl.maximum(whole, start), whole_stop), whole_stop, stop


@triton.jit
def _forward(q, k, v, key_document, query_document, first_key, run_start, out, lost, normalizer, K, T, multiplier,
             cap, G: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
             WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    batch = head // K
    key_document, query_document = key_document + batch * T, query_document + batch * T
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    position = rows // G
    start, whole, whole_stop, stop = _keys(position, first_key + batch * T, run_start + batch * T, T, BLOCK_M, BLOCK_N, G, block)
    q_tile = q.load([head * T * G + block * BLOCK_M, 0])
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(3):
        first_of, last_of = (start, whole) if phase == 0 else ((whole, whole_stop) if phase == 1 else (whole_stop, stop))
        for first in range(first_of, last_of, BLOCK_N):
            k_tile, v_tile = k.load([head * T + first, 0]), v.load([head * T + first, 0])
            scores = dot(q_tile, k_tile.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), WIDE)
            weights = tl.exp2(tanh(scores * (multiplier / cap), HARDWARE) * (cap * LOG2_E))
            if phase != 1:
                weights = _visible(weights, position[:, None], first + tl.arange(0, BLOCK_N)[None, :], query_document, key_document, T)
            weights = narrow(weights, v_tile.dtype, HARDWARE)
            total += tl.sum(weights.to(tl.float32), 1)  # what is summed is what is multiplied
            result = dot(weights, v_tile, result, WIDE)
    total = tl.where(total > 0, total, 1.0)  # a row that may read nothing gives zeros
    result = result / total[:, None]
    tl.store(normalizer + head.to(tl.int64) * T * G + rows, tl.log2(total), mask=rows < T * G)
    columns = tl.arange(0, BLOCK_D)
    at = (((batch * T + position).to(tl.int64) * K + head % K) * G + rows % G)[:, None] * d + columns[None, :]
    inside, rounded = (rows[:, None] < T * G) & (columns[None, :] < d), result.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=inside)
    if lost is not None:
        tl.store(lost + at, (result - rounded.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_rows(pointer, values, rows, total_rows, d: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < total_rows) & (columns[None, :] < d)
    tl.store(pointer + rows[:, None].to(tl.int64) * d + columns[None, :], values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _turn_gradient(grad, out, lost, turned, delta, K, T, G: tl.constexpr, d: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The output's gradient from token order [B, T, K, G, d] to head order, and its product with the output, row by row."""
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (heads[:, None] < K * G) & (columns[None, :] < d)
    at = (token * K * G + heads)[:, None] * d + columns[None, :]
    slope, result = tl.load(grad + at, mask=inside, other=0.0), tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    if lost is not None:
        result += tl.load(lost + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(slope.to(tl.float32) * result, 1)
    row = ((token // T * K + heads // G) * T + token % T) * G + heads % G
    tl.store(turned + row[:, None] * d + columns[None, :], slope, mask=inside)
    tl.store(delta + row, mean, mask=heads < K * G)


@triton.jit
def _backward_q(q, k, v, grad, normalizer, delta, key_document, query_document, first_key, run_start, grad_q, K, T, multiplier, cap,
                G: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    batch, own = head // K, head.to(tl.int64) * T * G
    key_document, query_document = key_document + batch * T, query_document + batch * T
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    position = rows // G
    start, whole, whole_stop, stop = _keys(position, first_key + batch * T, run_start + batch * T, T, BLOCK_M, BLOCK_N, G, block)
    q_tile, grad_tile = q.load([head * T * G + block * BLOCK_M, 0]), grad.load([head * T * G + block * BLOCK_M, 0])
    scale = tl.load(normalizer + own + rows, mask=rows < T * G, other=0.0)[:, None]
    mean = tl.load(delta + own + rows, mask=rows < T * G, other=0.0)[:, None]
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(3):
        first_of, last_of = (start, whole) if phase == 0 else ((whole, whole_stop) if phase == 1 else (whole_stop, stop))
        for first in range(first_of, last_of, BLOCK_N):
            k_tile, v_tile = k.load([head * T + first, 0]), v.load([head * T + first, 0])
            capped = tanh(dot(q_tile, k_tile.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), WIDE) * (multiplier / cap), HARDWARE)
            weights = tl.exp2(capped * (cap * LOG2_E) - scale)
            if phase != 1:
                weights = _visible(weights, position[:, None], first + tl.arange(0, BLOCK_N)[None, :], query_document, key_document, T)
            reached = dot(grad_tile, v_tile.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), WIDE)
            slope = weights * (reached - mean) * (1.0 - capped * capped)
            result = dot(slope.to(k_tile.dtype), k_tile, result, WIDE)
    _store_rows(grad_q + own * d, result * multiplier, rows, T * G, d, BLOCK_D)


@triton.jit
def _backward_kv(q, k, v, grad, normalizer, delta, key_document, query_document, last_query, run_start, run_stop, grad_k, grad_v, K, T,
                 multiplier, cap, G: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_D: tl.constexpr, WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    batch = head // K
    normalizer, delta = normalizer + head.to(tl.int64) * T * G, delta + head.to(tl.int64) * T * G
    key_document, query_document = key_document + batch * T, query_document + batch * T
    first_key, last_key = tl.program_id(0) * BLOCK_N, tl.minimum(tl.program_id(0) * BLOCK_N + BLOCK_N, T) - 1
    keys = first_key + tl.arange(0, BLOCK_N)
    start = first_key * G // BLOCK_M * BLOCK_M
    stop = (tl.max(tl.load(last_query + batch * T + keys, mask=keys < T, other=-1)) + 1) * G
    one_run = tl.load(run_start + batch * T + last_key) <= first_key  # then rows from the last key to the run's end read all of them
    whole = tl.cdiv(last_key * G, BLOCK_M) * BLOCK_M
    whole_stop = tl.where(one_run, tl.load(run_stop + batch * T + last_key) * G // BLOCK_M * BLOCK_M, whole)
    whole_stop = tl.maximum(whole, whole_stop)
    k_tile, v_tile = k.load([head * T + first_key, 0]), v.load([head * T + first_key, 0])
    result_k, result_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_M):  # turned, [N, M]: the weights multiply as they lie
        rows = first + tl.arange(0, BLOCK_M)
        q_tile, grad_tile = q.load([head * T * G + first, 0]), grad.load([head * T * G + first, 0])
        capped = tanh(dot(k_tile, q_tile.T, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), WIDE) * (multiplier / cap), HARDWARE)
        scale = tl.load(normalizer + rows, mask=rows < T * G, other=0.0)[None, :]
        weights = tl.exp2(capped * (cap * LOG2_E) - scale)
        if (first < whole) | (first >= whole_stop):  # one loop here: three would keep too much in registers
            weights = _visible(weights, (rows // G)[None, :], keys[:, None], query_document, key_document, T)
        result_v = dot(weights.to(grad_tile.dtype), grad_tile, result_v, WIDE)
        reached = dot(v_tile, grad_tile.T, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), WIDE)
        mean = tl.load(delta + rows, mask=rows < T * G, other=0.0)[None, :]
        slope = weights * (reached - mean) * (1.0 - capped * capped)
        result_k = dot(slope.to(q_tile.dtype), q_tile, result_k, WIDE)
    _store_rows(grad_k + head.to(tl.int64) * T * d, result_k * multiplier, keys, T, d, BLOCK_D)
    _store_rows(grad_v + head.to(tl.int64) * T * d, result_v, keys, T, d, BLOCK_D)


@torch.library.custom_op("pellucid::capped_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, key_document: Tensor, query_document: Tensor, ranges: Tensor, multiplier: float,
               cap: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, K, T, G, d = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (out, lost, normalizer), config = _results(q), FORWARD[q.element_size()]
    M, N, D = config["BLOCK_M"], config["BLOCK_N"], tile(d)
    first_key, _, run_start, _ = ranges
    _forward[(triton.cdiv(T * G, M), B * K)](
        describe(q, M, D), describe(k, N, D), describe(v, N, D), key_document, query_document, first_key, run_start, out,
        lost if len(lost) else None, normalizer, K, T, multiplier, cap, G, d, BLOCK_D=D, WIDE=wide(q), HARDWARE=HARDWARE_TANH,
        **config)  # fmt: skip
    return out, lost, normalizer


def _results(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the output in token order, for what rounding it takes (of fp32 nothing that matters), and for log2 of the sums."""
    B, K, T, G, d = q.shape
    narrow = q.element_size() < 4
    return q.new_empty(B, T, K, G, d), q.new_empty(B if narrow else 0, T, K, G, d), q.new_empty(B, K, T, G, dtype=torch.float32)


@_attention.register_fake
def _(q, k, v, key_document, query_document, ranges, multiplier, cap):
    return _results(q)


@torch.library.custom_op("pellucid::capped_attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lost: Tensor, normalizer: Tensor,
                        key_document: Tensor, query_document: Tensor, ranges: Tensor, multiplier: float, cap: float,
                        ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, K, T, G, d = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    turned, delta = torch.empty_like(q), torch.empty_like(normalizer)
    heads = min(HEADS, triton.next_power_of_2(K * G))
    _turn_gradient[(B * T, triton.cdiv(K * G, heads))](
        grad.contiguous(), out, lost if len(lost) else None, turned, delta, K, T, G, d, heads, tile(d))  # fmt: skip
    first_key, last_query, run_start, run_stop = ranges

    shared = {"G": G, "d": d, "BLOCK_D": tile(d), "WIDE": wide(q), "HARDWARE": HARDWARE_TANH}

    def launch(kernel, config: dict, blocks: int, *others) -> None:
        M, N, D = config["BLOCK_M"], config["BLOCK_N"], tile(d)
        kernel[(blocks, B * K)](
            describe(q, M, D), describe(k, N, D), describe(v, N, D), describe(turned, M, D), normalizer, delta, key_document,
            query_document, *others, K, T, multiplier, cap, **shared, **config)  # fmt: skip

    config = BACKWARD_Q[q.element_size()]
    launch(_backward_q, config, triton.cdiv(T * G, config["BLOCK_M"]), first_key, run_start, grad_q)
    config = BACKWARD_KV[q.element_size()]
    launch(_backward_kv, config, triton.cdiv(T, config["BLOCK_N"]), last_query, run_start, run_stop, grad_k, grad_v)
    return grad_q, grad_k, grad_v


@_attention_backward.register_fake
def _(grad, q, k, v, out, lost, normalizer, key_document, query_document, ranges, multiplier, cap):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _within_backward(grad: Tensor, q: Tensor, *_) -> int:
    """Bytes of the gradient in head order, and of its products with the output."""
    return q.numel() * q.element_size() + q.numel() // q.shape[-1] * 4


gpu.WITHIN[torch.ops.pellucid.capped_attention_backward.default] = _within_backward


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
    ctx.settings = inputs[6:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, *_):
    return *_attention_backward(grad_out, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_save)


def capped_attention(q_BKTGd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, key_document_BT: Tensor, query_document_BT: Tensor,
                     ranges_4BT: Tensor, *, multiplier: float, cap: float) -> Tensor:  # fmt: skip
    """Attention output [B, K, T, G, d], in token order in memory. A query reads earlier keys of its own document (int32; keys of
    pads hold -1). ranges: what `ranges` says of the documents; it is the same for all layers."""
    documents = key_document_BT.contiguous(), query_document_BT.contiguous()
    return _attention(q_BKTGd, k_BKTd, v_BKTd, *documents, ranges_4BT, multiplier, cap)[0].transpose(1, 2)


def ranges(key_document_BT: Tensor, query_document_BT: Tensor) -> Tensor:
    """int32 [4, B, T]: first key of each query's document and last query of each key's, whatever the order of ids; and the run
    that each position lies in, of neighbours of one document without pads: its start, and its stop (one beyond)."""
    T = query_document_BT.shape[1]
    ids, order = torch.sort(query_document_BT, dim=1, stable=True)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first, last = _bounds(begins)
    spread = lambda at: torch.empty_like(order).scatter_(1, order, order.gather(1, at))
    breaks = key_document_BT != query_document_BT  # a pad: no run goes through it
    begins = torch.ones_like(breaks)
    begins[:, 1:] = (query_document_BT[:, 1:] != query_document_BT[:, :-1]) | breaks[:, 1:] | breaks[:, :-1]
    run_start, run_last = _bounds(begins)
    run_start = torch.where(breaks, T, run_start)  # its query may not read even the own key
    return torch.stack([spread(first), spread(last), run_start, run_last + 1]).to(torch.int32)


def _bounds(begins_BT: Tensor) -> tuple[Tensor, Tensor]:
    """First and last place of the stretch that each place lies in."""
    B, T = begins_BT.shape
    place, ends = torch.arange(T, device=begins_BT.device).expand(B, T), torch.ones_like(begins_BT)
    ends[:, :-1] = begins_BT[:, 1:]
    first = torch.where(begins_BT, place, 0).cummax(1).values
    return first, torch.where(ends, place, T).flip(1).cummin(1).values.flip(1)
