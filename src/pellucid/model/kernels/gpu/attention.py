"""Capped causal attention over grouped heads and packed documents, forward and backward, in Triton.

Logits are capped at c = 30, so e^logit needs no running maximum: a row keeps one sum. Rows are (query, head) pairs
that share a key/value head. Blocks of keys outside a block's documents are never read. Saved: q, k, v, out, the sums.
The definition is `chunked_capped_attention` of model/attention.py. Flash attention: Dao 2023 (arXiv 2307.08691).
Letters: B batch, K key/value heads, T sequence, G query heads for each of them, d head_dim; M rows, N keys of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pellucid.model.kernels.gpu.launch import HARDWARE_TANH, INTERPRETED, dot, tanh, tile, wide

LOG2_E = tl.constexpr(1.4426950408889634)
FORWARD = {"BLOCK_M": 32, "BLOCK_N": 32} if INTERPRETED else {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
BACKWARD = {"BLOCK_M": 32, "BLOCK_N": 32} if INTERPRETED else {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


@triton.jit
def _rows(pointer, rows, total_rows, d: tl.constexpr, BLOCK_D: tl.constexpr):
    """[len(rows), BLOCK_D] of a matrix [total_rows, d], zeros beyond its edges."""
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < total_rows) & (columns[None, :] < d)
    return tl.load(pointer + rows[:, None].to(tl.int64) * d + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(pointer, values, rows, total_rows, d: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < total_rows) & (columns[None, :] < d)
    tl.store(pointer + rows[:, None].to(tl.int64) * d + columns[None, :], values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _weights(q, k, rows, keys, query_document, key_document, T, G: tl.constexpr, multiplier, cap,
             WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """(e^logit or 0 where the key may not be read, tanh of the logit / cap); [M, N]."""
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), WIDE)
    capped = tanh(scores * (multiplier / cap), HARDWARE)
    position = rows // G
    own = tl.load(query_document + position, mask=position < T, other=-2)
    theirs = tl.load(key_document + keys, mask=keys < T, other=-3)
    visible = (keys[None, :] <= position[:, None]) & (own[:, None] == theirs[None, :])
    return tl.where(visible, tl.exp2(capped * (cap * LOG2_E)), 0.0), capped


@triton.jit
def _forward(q, k, v, key_document, query_document, first_key, out, sums, K, T, multiplier, cap,
             G: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
             WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    batch = head // K
    q, out, sums = q + head.to(tl.int64) * T * G * d, out + head.to(tl.int64) * T * G * d, sums + head.to(tl.int64) * T * G
    k, v = k + head.to(tl.int64) * T * d, v + head.to(tl.int64) * T * d
    key_document, query_document, first_key = key_document + batch * T, query_document + batch * T, first_key + batch * T
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    position = rows // G
    start = tl.min(tl.load(first_key + position, mask=position < T, other=T)) // BLOCK_N * BLOCK_N
    stop = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G + 1, T)
    q_tile = _rows(q, rows, T * G, d, BLOCK_D)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        weights, _ = _weights(q_tile, _rows(k, keys, T, d, BLOCK_D), rows, keys, query_document, key_document, T, G,
                              multiplier, cap, WIDE, HARDWARE)  # fmt: skip
        total += tl.sum(weights, 1)
        v_tile = _rows(v, keys, T, d, BLOCK_D)
        result = dot(weights.to(v_tile.dtype), v_tile, result, WIDE)
    result = result / tl.where(total > 0, total, 1.0)[:, None]  # a row that may read nothing gives zeros
    _store_rows(out, result, rows, T * G, d, BLOCK_D)
    tl.store(sums + rows, total, mask=rows < T * G)


@triton.jit
def _slope(q, k, v, grad, rows, keys, sums, delta, query_document, key_document, T, G: tl.constexpr, multiplier, cap,
           WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    """(attention weights, gradient of q.k), both [M, N]."""
    weights, capped = _weights(q, k, rows, keys, query_document, key_document, T, G, multiplier, cap, WIDE, HARDWARE)
    total = tl.load(sums + rows, mask=rows < T * G, other=0.0)
    weights = weights / tl.where(total > 0, total, 1.0)[:, None]
    reached = dot(grad, tl.trans(v), tl.zeros((q.shape[0], k.shape[0]), tl.float32), WIDE)
    mean = tl.load(delta + rows, mask=rows < T * G, other=0.0)
    return weights, weights * (reached - mean[:, None]) * (1.0 - capped * capped) * multiplier


@triton.jit
def _backward_q(q, k, v, grad, sums, delta, key_document, query_document, first_key, grad_q, K, T, multiplier, cap,
                G: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    batch, wide_head = head // K, head.to(tl.int64)
    q, grad, grad_q = q + wide_head * T * G * d, grad + wide_head * T * G * d, grad_q + wide_head * T * G * d
    k, v, sums, delta = k + wide_head * T * d, v + wide_head * T * d, sums + wide_head * T * G, delta + wide_head * T * G
    key_document, query_document, first_key = key_document + batch * T, query_document + batch * T, first_key + batch * T
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    position = rows // G
    start = tl.min(tl.load(first_key + position, mask=position < T, other=T)) // BLOCK_N * BLOCK_N
    stop = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G + 1, T)
    q_tile, grad_tile = _rows(q, rows, T * G, d, BLOCK_D), _rows(grad, rows, T * G, d, BLOCK_D)
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k_tile = _rows(k, keys, T, d, BLOCK_D)
        _, slope = _slope(q_tile, k_tile, _rows(v, keys, T, d, BLOCK_D), grad_tile, rows, keys, sums, delta,
                          query_document, key_document, T, G, multiplier, cap, WIDE, HARDWARE)  # fmt: skip
        result = dot(slope.to(k_tile.dtype), k_tile, result, WIDE)
    _store_rows(grad_q, result, rows, T * G, d, BLOCK_D)


@triton.jit
def _backward_kv(q, k, v, grad, sums, delta, key_document, query_document, last_query, grad_k, grad_v, K, T, multiplier, cap,
                 G: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 WIDE: tl.constexpr, HARDWARE: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    batch, wide_head = head // K, head.to(tl.int64)
    q, grad, sums, delta = (q + wide_head * T * G * d, grad + wide_head * T * G * d, sums + wide_head * T * G,
                            delta + wide_head * T * G)  # fmt: skip
    k, v, grad_k, grad_v = k + wide_head * T * d, v + wide_head * T * d, grad_k + wide_head * T * d, grad_v + wide_head * T * d
    key_document, query_document, last_query = key_document + batch * T, query_document + batch * T, last_query + batch * T
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(0) * BLOCK_N * G // BLOCK_M * BLOCK_M
    stop = (tl.max(tl.load(last_query + keys, mask=keys < T, other=-1)) + 1) * G
    k_tile, v_tile = _rows(k, keys, T, d, BLOCK_D), _rows(v, keys, T, d, BLOCK_D)
    result_k, result_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q_tile, grad_tile = _rows(q, rows, T * G, d, BLOCK_D), _rows(grad, rows, T * G, d, BLOCK_D)
        weights, slope = _slope(q_tile, k_tile, v_tile, grad_tile, rows, keys, sums, delta, query_document, key_document, T,
                                G, multiplier, cap, WIDE, HARDWARE)  # fmt: skip
        result_v = dot(tl.trans(weights.to(grad_tile.dtype)), grad_tile, result_v, WIDE)
        result_k = dot(tl.trans(slope.to(q_tile.dtype)), q_tile, result_k, WIDE)
    _store_rows(grad_k, result_k, keys, T, d, BLOCK_D)
    _store_rows(grad_v, result_v, keys, T, d, BLOCK_D)


@torch.library.custom_op("pellucid::capped_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, key_document: Tensor, query_document: Tensor, multiplier: float,
               cap: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, K, T, G, d = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, sums = torch.empty_like(q), q.new_empty(B, K, T, G, dtype=torch.float32)
    first_key, _ = _ranges(key_document, query_document)
    grid = (triton.cdiv(T * G, FORWARD["BLOCK_M"]), B * K)
    _forward[grid](q, k, v, key_document, query_document, first_key, out, sums, K, T, multiplier, cap, G, d,
                   BLOCK_D=tile(d), WIDE=wide(q), HARDWARE=HARDWARE_TANH, **FORWARD)  # fmt: skip
    return out, sums


@_attention.register_fake
def _(q, k, v, key_document, query_document, multiplier, cap):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.custom_op("pellucid::capped_attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, key_document: Tensor,
                        query_document: Tensor, multiplier: float, cap: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, K, T, G, d = q.shape
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = (grad.float() * out.float()).sum(-1)
    first_key, last_query = _ranges(key_document, query_document)
    shared = {"G": G, "d": d, "BLOCK_D": tile(d), "WIDE": wide(q), "HARDWARE": HARDWARE_TANH, **BACKWARD}
    read = (q, k, v, grad, sums, delta, key_document, query_document)
    _backward_q[(triton.cdiv(T * G, BACKWARD["BLOCK_M"]), B * K)](*read, first_key, grad_q, K, T, multiplier, cap, **shared)
    grid = (triton.cdiv(T, BACKWARD["BLOCK_N"]), B * K)
    _backward_kv[grid](*read, last_query, grad_k, grad_v, K, T, multiplier, cap, **shared)
    return grad_q, grad_k, grad_v


@_attention_backward.register_fake
def _(grad, q, k, v, out, sums, key_document, query_document, multiplier, cap):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.settings = inputs[5:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, _grad_sums):
    return *_attention_backward(grad_out, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_attention.register_autograd(_gradients, setup_context=_save)


def capped_attention(q_BKTGd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, key_document_BT: Tensor, query_document_BT: Tensor, *,
                     multiplier: float, cap: float) -> Tensor:  # fmt: skip
    """Attention output [B, K, T, G, d]. A query reads earlier keys of its own document (int32; keys of pads hold -1)."""
    documents = key_document_BT.contiguous(), query_document_BT.contiguous()
    return _attention(q_BKTGd, k_BKTd, v_BKTd, *documents, multiplier, cap)[0]


def _ranges(key_document_BT: Tensor, query_document_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(first key of each query's document, last query of each key's document), int32 [B, T]; whatever the order of ids."""
    B, T = query_document_BT.shape
    ids, order = torch.sort(query_document_BT, dim=1, stable=True)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = torch.arange(T, device=ids.device).expand(B, T)
    first = torch.where(begins, place, 0).cummax(1).values
    ends = torch.ones_like(begins)
    ends[:, :-1] = begins[:, 1:]
    last = torch.where(ends, place, T).flip(1).cummin(1).values.flip(1)
    spread = lambda at: torch.empty_like(order).scatter_(1, order, order.gather(1, at)).to(torch.int32).contiguous()
    return spread(first), spread(last)
