"""Causal attention with capped logits in chunks of queries, forward and backward; never a table of T x T.

Saved for the backward pass: q, k, v and one sum per row; weights are computed anew. The plain definition is
`chunked_capped_attention` of model/attention.py. Letters: B batch, T sequence, K key/value heads, G query heads for each
of them, d head_dim; R = rows of a chunk, (query, head) pairs; S = keys up to the chunk's end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.model.kernels import native
from pellucid.model.kernels.products import batched_product

LARGEST_CAP = 60.0  # e^logit is summed without a maximum, which float32 can hold up to here


def fits(q_BKTGd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, cap: float) -> bool:
    return cap <= LARGEST_CAP and native.fits(q_BKTGd, k_BKTd, v_BKTd) and q_BKTGd.dtype == k_BKTd.dtype == v_BKTd.dtype


def fused_capped_attention(
    q_BKTGd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, key_document_BT: Tensor, query_document_BT: Tensor,
    *, multiplier: float, cap: float, chunk_size: int = 128,
) -> Tensor:  # fmt: skip
    """Attention output [B, K, T, G, d]. A query reads earlier keys of its own document (int32; keys of pads hold -1)."""
    return _CappedAttention.apply(
        q_BKTGd, k_BKTd, v_BKTd, key_document_BT, query_document_BT, multiplier, cap, chunk_size
    )


class _CappedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BKTGd, k_BKTd, v_BKTd, key_document_BT, query_document_BT, multiplier, cap, chunk_size):
        B, K, T, G, d = q_BKTGd.shape
        q, k, v = (x.contiguous().view(B * K, -1, d) for x in (q_BKTGd, k_BKTd, v_BKTd))
        ctx.documents = key_document_BT.contiguous(), query_document_BT.contiguous()
        ctx.settings, ctx.chunk_size, ctx.totals = (float(multiplier), float(cap)), chunk_size, torch.empty(B * K * T * G)
        out = torch.empty_like(q)
        for start in native.starts(T, chunk_size):
            stop = min(start + chunk_size, T)
            queries, total = slice(start * G, stop * G), ctx.totals[B * K * G * start : B * K * G * stop]
            weights = batched_product(q[:, queries], k[:, :stop].mT)
            sizes = (B * K, K, (stop - start) * G, G, stop, T, start)
            native.call("capped_softmax", q.dtype, weights, *ctx.documents, total, *sizes, *ctx.settings)
            batched_product(weights, v[:, :stop], out=out[:, queries])
        ctx.save_for_backward(q_BKTGd, k_BKTd, v_BKTd)
        return out.view_as(q_BKTGd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BKTGd):
        B, K, T, G, d = grad_BKTGd.shape
        saved = ctx.saved_tensors  # once: recomputation gives them only once
        q, k, v, grad = (x.contiguous().view(B * K, -1, d) for x in (*saved, grad_BKTGd))
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))  # sums over chunks
        for start in native.starts(T, ctx.chunk_size):
            stop = min(start + ctx.chunk_size, T)
            queries, total = slice(start * G, stop * G), ctx.totals[B * K * G * start : B * K * G * stop]
            weights = batched_product(q[:, queries], k[:, :stop].mT)
            slope = batched_product(grad[:, queries], v[:, :stop].mT)
            sizes = (B * K, K, (stop - start) * G, G, stop, T, start)
            native.call("capped_softmax_backward", q.dtype, weights, slope, *ctx.documents, total, *sizes, *ctx.settings)
            batched_product(slope, k[:, :stop], out=grad_q[:, queries])
            batched_product(slope.mT, q[:, queries], out=grad_k[:, :stop], add=True)
            batched_product(weights.mT, grad[:, queries], out=grad_v[:, :stop], add=True)
        return *(g.view(x.shape).to(x.dtype) for g, x in zip((grad_q, grad_k, grad_v), saved, strict=True)), *[None] * 5
