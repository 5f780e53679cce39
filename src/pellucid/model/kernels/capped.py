"""Causal attention with capped logits, forward and backward; never a table of T x T.

Where the products are Pellucid's own, attention.cpp does all of it, block by block; elsewhere torch's products and cpu.cpp's softmax
take turns on chunks of queries. Saved for the backward pass: q, k, v, one sum per row, and for attention.cpp the result with what
rounding took from it; weights are computed anew. The plain definition is `chunked_capped_attention` of model/attention.py; but a
query that sees nothing gives zeros. Letters: B batch, T sequence, K key/value heads, G query heads for each of them, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.model.kernels import native, products
from pellucid.model.kernels.products import batched_product

LARGEST_CAP = 60.0  # e^logit is summed without a maximum, and its products with v: float32 holds them up to here
CHUNK = 128  # queries at a time, beside torch's products


def fits(q_BKTGd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, cap: float) -> bool:
    return cap <= LARGEST_CAP and native.fits(q_BKTGd, k_BKTd, v_BKTd) and q_BKTGd.dtype == k_BKTd.dtype == v_BKTd.dtype


def fused_capped_attention(
    q_BKTGd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, key_document_BT: Tensor, query_document_BT: Tensor,
    *, multiplier: float, cap: float,
) -> Tensor:  # fmt: skip
    """Attention output [B, K, T, G, d]. A query reads earlier keys of its own document (int32; keys of pads hold -1)."""
    documents = key_document_BT.contiguous(), query_document_BT.contiguous()
    if products.own_serves(q_BKTGd.dtype):
        return _Blocks.apply(q_BKTGd, k_BKTd, v_BKTd, *documents, multiplier, cap)
    return _Chunks.apply(q_BKTGd, k_BKTd, v_BKTd, *documents, multiplier, cap)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BKTGd, k_BKTd, v_BKTd, key_document_BT, query_document_BT, multiplier, cap):
        B, K, T, G, d = q_BKTGd.shape
        q, k, v = q_BKTGd.contiguous(), k_BKTd.contiguous(), v_BKTd.transpose(1, 2).contiguous()  # v by token, as it comes
        out_BTKGd, total = q.new_empty(B, T, K, G, d), q.new_empty(B * K * T * G, dtype=torch.float32)
        lost = torch.empty_like(out_BTKGd) if q.dtype == torch.bfloat16 else None
        tensors = (q, k, v, key_document_BT, query_document_BT, out_BTKGd, lost, total)
        ctx.settings = (B, K, T, G, d, float(multiplier), float(cap))
        native.call("attention", q.dtype, *tensors, *ctx.settings)
        ctx.save_for_backward(*tensors)
        return out_BTKGd.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BKTGd):
        q, k, v, *_ = tensors = ctx.saved_tensors
        grad_q, (grad_k, grad_v) = torch.empty_like(q), (torch.empty_like(x, dtype=torch.float32) for x in (k, v))
        grads = (grad_BKTGd.transpose(1, 2).contiguous(), grad_q, grad_k, grad_v)
        native.call("attention_backward", q.dtype, *tensors, *grads, *ctx.settings)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype).transpose(1, 2), *[None] * 4


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BKTGd, k_BKTd, v_BKTd, key_document_BT, query_document_BT, multiplier, cap):
        B, K, T, G, d = q_BKTGd.shape
        q, k, v = (x.contiguous().view(B * K, -1, d) for x in (q_BKTGd, k_BKTd, v_BKTd))
        documents, totals = (key_document_BT, query_document_BT), q.new_empty(B * K * T * G, dtype=torch.float32)
        ctx.settings, out = (float(multiplier), float(cap)), torch.empty_like(q)
        for start in native.starts(T, CHUNK):
            stop = min(start + CHUNK, T)
            queries, total = slice(start * G, stop * G), totals[B * K * G * start : B * K * G * stop]
            weights = batched_product(q[:, queries], k[:, :stop].mT)
            sizes = (B * K, K, (stop - start) * G, G, stop, T, start)
            native.call("capped_softmax", q.dtype, weights, *documents, total, *sizes, *ctx.settings)
            batched_product(weights, v[:, :stop], out=out[:, queries])
        ctx.save_for_backward(q_BKTGd, k_BKTd, v_BKTd, *documents, totals)
        return out.view_as(q_BKTGd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BKTGd):
        B, K, T, G, d = grad_BKTGd.shape
        *saved, key_document_BT, query_document_BT, totals = ctx.saved_tensors  # once: recomputation gives them only once
        q, k, v, grad = (x.contiguous().view(B * K, -1, d) for x in (*saved, grad_BKTGd))
        documents, grad_q = (key_document_BT, query_document_BT), torch.empty_like(q)
        grad_k, grad_v = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))  # sums over chunks
        for start in native.starts(T, CHUNK):
            stop = min(start + CHUNK, T)
            queries, total = slice(start * G, stop * G), totals[B * K * G * start : B * K * G * stop]
            weights = batched_product(q[:, queries], k[:, :stop].mT)
            slope = batched_product(grad[:, queries], v[:, :stop].mT)
            sizes = (B * K, K, (stop - start) * G, G, stop, T, start)
            native.call("capped_softmax_backward", q.dtype, weights, slope, *documents, total, *sizes, *ctx.settings)
            batched_product(slope, k[:, :stop], out=grad_q[:, queries])
            batched_product(slope.mT, q[:, queries], out=grad_k[:, :stop], add=True)
            batched_product(weights.mT, grad[:, queries], out=grad_v[:, :stop], add=True)
        return *(g.view(x.shape).to(x.dtype) for g, x in zip((grad_q, grad_k, grad_v), saved, strict=True)), *[None] * 4
