"""The loss of picture 1: cross-entropy of the next token, with an optional z-loss; all sums in fp32 (or float64).

`cross_entropy` is the definition; `linear_cross_entropy` computes the same from hidden states and the embedding table
without ever holding all logits. Both return sums and counts, so that micro-batches with different numbers of real
tokens can be weighted exactly. Sources: z-loss, PaLM (Chowdhery et al. 2022, section 5).
Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pellucid.model.kernels import gpu, native
from pellucid.model.kernels.gpu.copies import narrowed
from pellucid.model.kernels.products import product, transposed_product

IGNORE = -100
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}  # logits held at once: they should stay in a cache, or fill the GPU
KERNEL_ELEMENTS = 11 * 2**26  # where a kernel works in place: 5,632 rows of Grok-1's vocabulary are two rounds of a Hopper's tiles


@dataclass(frozen=True)
class TokenLoss:
    """Sums over the tokens that have a target. The mean loss of a step is Σ total / Σ count over its micro-batches."""

    total: Tensor  # scalar; Σ cross-entropy + Σ z-loss: the one that carries gradients
    count: Tensor  # scalar int64: tokens with a target
    per_token_N: Tensor  # cross-entropy of each token in nats, 0 where ignored; detached
    z_loss: Tensor  # scalar; Σ z_loss_weight * logsumexp²; detached


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, *, z_loss_weight: float = 0.0, ignore_index: int = IGNORE
) -> TokenLoss:
    """-log softmax(logits)[target] + z_loss_weight * logsumexp(logits)², summed over tokens with a target.

    logits [N, V] of any float dtype; targets [N] int64, `ignore_index` where there is none.
    """
    logits_NV = logits_NV.to(_sum_dtype(logits_NV))
    valid_N = targets_N != ignore_index
    chosen_N = targets_N.masked_fill(~valid_N, 0)
    normalizer_N = logits_NV.logsumexp(dim=-1)
    nats_N = normalizer_N - logits_NV.gather(-1, chosen_N.unsqueeze(-1)).squeeze(-1)
    nats_N = torch.where(valid_N, nats_N, 0.0)
    z = z_loss_weight * torch.where(valid_N, normalizer_N, 0.0).square().sum()
    return TokenLoss(nats_N.sum() + z, valid_N.sum(), nats_N.detach(), z.detach())


def linear_cross_entropy(
    hidden_ND: Tensor,
    embedding_VD: Tensor,
    targets_N: Tensor,
    *,
    multiplier: float = 1.0,
    z_loss_weight: float = 0.0,
    ignore_index: int = IGNORE,
    chunk_size: int | None = None,
) -> TokenLoss:
    """`cross_entropy(multiplier * hidden @ embedding.T, targets)`, in chunks of tokens, logits never all held.

    The products run in hidden's dtype (the embedding may be an fp32 master), all else in fp32, the embedding's gradient
    included. Gradients are computed in the forward pass, so only one backward pass through the result is possible.
    chunk_size: tokens at once; None chooses by vocabulary and device.
    """
    if chunk_size is None:
        elements = CHUNK_ELEMENTS.get(native.dry() or hidden_ND.device.type, CHUNK_ELEMENTS["cpu"])
        on_kernel = gpu.fits("loss", hidden_ND, targets_N) and not gpu.interpreted()
        chunk_size = max(16, (KERNEL_ELEMENTS if on_kernel else elements) // embedding_VD.shape[0])
    wanted = torch.is_grad_enabled()
    total, per_token_N, z_loss = _LinearCrossEntropy.apply(
        hidden_ND, embedding_VD, targets_N, multiplier, z_loss_weight, ignore_index, chunk_size, wanted
    )
    return TokenLoss(total, (targets_N != ignore_index).sum(), per_token_N, z_loss)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, embedding_VD, targets_N, multiplier, z_loss_weight, ignore_index, chunk_size, wanted):
        dtype = _sum_dtype(hidden_ND)
        table_VD = narrowed(embedding_VD, hidden_ND.dtype)
        per_token_N = hidden_ND.new_zeros(len(targets_N), dtype=dtype)
        z_loss = hidden_ND.new_zeros((), dtype=dtype)
        want_hidden, want_embedding = (wanted and need for need in ctx.needs_input_grad[:2])
        ctx.grad_hidden_ND = torch.empty_like(hidden_ND) if want_hidden else None
        ctx.grad_embedding_VD = torch.zeros_like(embedding_VD, dtype=dtype) if want_embedding else None

        for start in native.starts(len(targets_N), chunk_size):
            rows = slice(start, start + chunk_size)
            products, targets = product(hidden_ND[rows], table_VD), targets_N[rows]
            chunk_loss = _rows_of(products, targets)
            per_token_N[rows], normalizer, slope = chunk_loss(
                products, targets, multiplier, z_loss_weight, ignore_index, want_hidden or want_embedding
            )
            z_loss += z_loss_weight * normalizer.square().sum()
            if slope is not None:
                if want_hidden:
                    ctx.grad_hidden_ND[rows] = product(slope, table_VD.t())
                if want_embedding:
                    transposed_product(slope, hidden_ND[rows], out=ctx.grad_embedding_VD, add=True)
        ctx.embedding_dtype = embedding_VD.dtype
        ctx.mark_non_differentiable(per_token_N, z_loss)
        return per_token_N.sum() + z_loss, per_token_N, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _per_token, _z_loss):
        if not hasattr(ctx, "grad_hidden_ND"):
            raise RuntimeError("linear_cross_entropy: its gradients were used by an earlier backward pass")
        hidden, embedding = ctx.grad_hidden_ND, ctx.grad_embedding_VD
        del ctx.grad_hidden_ND, ctx.grad_embedding_VD
        hidden = hidden.mul_(grad_total) if hidden is not None else None
        embedding = embedding.mul_(grad_total).to(ctx.embedding_dtype) if embedding is not None else None
        return hidden, embedding, None, None, None, None, None, None


def _rows_of(products_NV: Tensor, targets_N: Tensor):
    """The fastest of the functions that do what `plain_rows` does."""
    if gpu.fits("loss", products_NV, targets_N):
        from pellucid.model.kernels.gpu.loss import loss_rows

        return loss_rows
    return fused_rows if native.fits(products_NV, targets_N) else plain_rows


def plain_rows(products_NV, targets_N, multiplier, z_loss_weight, ignore_index, want_slope):
    """(nats_N, logsumexp_N, slope_NV or None) of some rows; products are hidden @ embedding.T and may be overwritten.

    slope = d total / d products = ((1 + 2 z lse) softmax - onehot) * multiplier, in products' dtype, all else in fp32.
    Rows without a target are zero.
    """
    valid_N = targets_N != ignore_index
    chosen_N1 = targets_N.masked_fill(~valid_N, 0).unsqueeze(-1)
    logits_NV = products_NV.to(_sum_dtype(products_NV)).mul_(multiplier)
    normalizer_N = logits_NV.logsumexp(dim=-1)
    nats_N = torch.where(valid_N, normalizer_N - logits_NV.gather(-1, chosen_N1).squeeze(-1), 0.0)
    if not want_slope:
        return nats_N, torch.where(valid_N, normalizer_N, 0.0), None
    softmax_NV = logits_NV.sub_(normalizer_N.unsqueeze(-1)).exp_()
    if z_loss_weight:
        softmax_NV.mul_((1 + 2 * z_loss_weight * normalizer_N).unsqueeze(-1))
    rows = torch.arange(len(softmax_NV), device=softmax_NV.device)
    softmax_NV[rows, chosen_N1.squeeze(-1)] -= 1.0  # each row once; scatter_add_ would be 100 times slower on a CPU
    slope_NV = softmax_NV.mul_(multiplier).masked_fill_(~valid_N.unsqueeze(-1), 0.0)
    return nats_N, torch.where(valid_N, normalizer_N, 0.0), slope_NV.to(products_NV.dtype)


def fused_rows(products_NV, targets_N, multiplier, z_loss_weight, ignore_index, want_slope):
    """As `plain_rows`, in one pass over each row, in place."""
    (N, V), dtype = products_NV.shape, products_NV.dtype
    targets_N = targets_N.masked_fill(targets_N == ignore_index, -1).contiguous()
    nats_N, normalizer_N = (torch.empty(N, dtype=torch.float32) for _ in range(2))
    settings = (float(multiplier), float(z_loss_weight), int(want_slope))
    native.call("cross_entropy", dtype, products_NV, targets_N, nats_N, normalizer_N, N, V, *settings)
    return nats_N, normalizer_N, products_NV if want_slope else None


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
