"""Cross-entropy of rows of scores, in place, in Triton: one program a row, one pass to sum, one to write the slope.

The definition is `plain_rows` of training/losses.py. Letters: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pellucid.model.kernels import native
from pellucid.model.kernels.gpu.launch import INTERPRETED

BLOCK = 256 if INTERPRETED else 8192


@triton.jit
def _rows(products, targets, nats, normalizer, V, multiplier, z_weight, ignore, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    products += n * V
    target = tl.load(targets + n)
    valid = target != ignore
    own = tl.load(products + tl.where(valid, target, 0)).to(tl.float32) * multiplier  # now: the slope will take its place
    largest, total = tl.full((), -1e38, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        scores = tl.load(products + columns, mask=columns < V, other=0.0).to(tl.float32) * multiplier
        scores = tl.where(columns < V, scores, -1e38)
        higher = tl.maximum(largest, tl.max(scores, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.where(columns < V, tl.exp(scores - higher), 0.0), 0)
        largest = higher
    lse = largest + tl.log(total)
    tl.store(nats + n, tl.where(valid, lse - own, 0.0))
    tl.store(normalizer + n, tl.where(valid, lse, 0.0))
    if SLOPE:
        scale = tl.where(valid, multiplier, 0.0)
        for first in range(0, V, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            scores = tl.load(products + columns, mask=columns < V, other=0.0).to(tl.float32) * multiplier
            slope = tl.exp(scores - lse) * (1.0 + 2.0 * z_weight * lse) - tl.where(columns == target, 1.0, 0.0)
            tl.store(products + columns, (slope * scale).to(products.dtype.element_ty), mask=columns < V)


def loss_rows(products_NV: Tensor, targets_N: Tensor, multiplier: float, z_loss_weight: float, ignore_index: int,
              want_slope: bool) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(nats_N, logsumexp_N, slope_NV or None); the products are overwritten by the slope."""
    N, V = products_NV.shape
    nats_N, normalizer_N = torch.empty(2, N, device=products_NV.device).unbind()
    if native.dry() is None:
        _rows[(N,)](products_NV, targets_N, nats_N, normalizer_N, V, multiplier, z_loss_weight, ignore_index, want_slope,
                    min(BLOCK, triton.next_power_of_2(V)), num_warps=8)  # fmt: skip
    return nats_N, normalizer_N, products_NV if want_slope else None
