"""Grouped-query attention with capped logits: logits = c * tanh(multiplier * q.k / c), c = 30.

Source: xai-org/grok-1 model.py (`MultiHeadAttention`); capping after Gemma 2 (2024), GQA after Ainslie et al. 2023.
Query head j reads key/value head j // (H/K). The multiplier acts on the logits, in fp32.
Letters: B batch, T queries, S keys, D hidden_size, H query heads, K key/value heads, G = H/K, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pellucid.config import ModelConfig
from pellucid.model.cache import KVCache
from pellucid.model.kernels import capped, gpu
from pellucid.model.kernels.rotary import rotate
from pellucid.model.layers import Linear

LONG = 2048  # queries; the backward pass of longer rows computes each chunk anew
MASKED = -1e30  # the official value: a row with every key masked becomes uniform, not NaN


@dataclass
class Visibility:
    """Which keys a query may read: key tokens that are not pads, not later, and of the same document.

    `mask_BTS` is set where the whole table is needed (decoding, or rows that begin with pads); else it is built
    chunk by chunk from `key_valid_BT` and `segment_ids_BT` (None: one document per row).
    """

    key_valid_BT: Tensor
    segment_ids_BT: Tensor | None = None
    mask_BTS: Tensor | None = None
    documents: tuple[Tensor, Tensor] = field(init=False)  # of each key (-1: a pad) and of each query, int32 [B, T]
    known_ranges: Tensor | None = field(init=False, default=None)  # what `ranges` found

    def __post_init__(self) -> None:
        valid = self.key_valid_BT
        own = torch.zeros_like(valid, dtype=torch.int32) if self.segment_ids_BT is None else self.segment_ids_BT.int()
        self.documents = own.masked_fill(~valid, -1), own

    def ranges(self) -> Tensor:
        """What the GPU's kernel wants to know of the documents; once for all layers."""
        if self.known_ranges is None:
            from pellucid.model.kernels.gpu.attention import ranges

            self.known_ranges = ranges(*self.documents)
        return self.known_ranges

    def chunk(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Mask [B, queries, stop] of every `step`-th query of start..stop over the keys 0..stop."""
        device = self.key_valid_BT.device
        causal = torch.arange(stop, device=device) <= torch.arange(start, stop, step, device=device).unsqueeze(-1)
        mask = causal & self.key_valid_BT[:, None, :stop]
        if self.segment_ids_BT is not None:
            mask = mask & (self.segment_ids_BT[:, start:stop:step, None] == self.segment_ids_BT[:, None, :stop])
        return mask


def capped_attention(
    q_BKGTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask_BTS: Tensor, *, multiplier: float, cap: float, exact: bool
) -> Tensor:
    """Attention output [B, K, G, T, d] by the formula; `exact` keeps bf16 logits unrounded, as the official code does."""
    B, K, G, T, d = q_BKGTd.shape
    q = q_BKGTd.reshape(B, K, G * T, d)
    keys = k_BKSd.transpose(-2, -1)
    logits = q.float() @ keys.float() if exact else (q @ keys).float()
    logits = cap * torch.tanh(logits * (multiplier / cap))
    logits = logits.view(B, K, G, T, -1).masked_fill(~mask_BTS[:, None, None], MASKED)
    weights = torch.softmax(logits, dim=-1).to(v_BKSd.dtype)
    return (weights.reshape(B, K, G * T, -1) @ v_BKSd).view(B, K, G, T, d)


def chunked_capped_attention(
    q_BKGTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, visibility: Visibility, *, chunk_size: int = 128, **settings
) -> Tensor:
    """The same for causal attention without a full T x T table: each chunk of queries reads only the keys up to its end."""
    T = q_BKGTd.shape[3]

    def one(start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stop = min(start + chunk_size, T)
        return capped_attention(q[..., start:stop, :], k[:, :, :stop], v[:, :, :stop], visibility.chunk(start, stop), **settings)

    if T > LONG and torch.is_grad_enabled():  # what all chunks keep for the backward pass would be that table
        once, one = one, lambda *inputs: checkpoint(once, *inputs, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([one(start, q_BKGTd, k_BKTd, v_BKTd) for start in range(0, T, chunk_size)], dim=3)


class Attention(nn.Module):
    """q, k, v, o projections around capped attention; [B, T, D] -> [B, T, D]. H*d need not equal D."""

    def __init__(self, config: ModelConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        D, H, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(D, H * d, device, dtype)
        self.k_proj = Linear(D, K * d, device, dtype)
        self.v_proj = Linear(D, K * d, device, dtype)
        self.o_proj = Linear(H * d, D, device, dtype)

    def forward(
        self,
        hidden_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        visibility: Visibility,
        cache: KVCache | None = None,
        layer: int = 0,
        parity: bool = False,
    ) -> Tensor:
        c = self.config
        B, T, _ = hidden_BTD.shape
        K, G, d = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, c.head_dim
        q_BKTGd = rotate(self.q_proj(hidden_BTD).view(B, T, K, G, d), *rotary)
        k = rotate(self.k_proj(hidden_BTD).view(B, T, K, 1, d), *rotary).squeeze(3)
        v = self.v_proj(hidden_BTD).view(B, T, K, d).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        settings = {"multiplier": c.attn_output_multiplier, "cap": c.max_attn_value}
        fused = None if visibility.mask_BTS is not None or parity else _fused(q_BKTGd, k, v, c.max_attn_value)
        if fused is not None:
            out_BKTGd = fused(q_BKTGd, k, v, visibility, **settings)
            return self.o_proj(out_BKTGd.transpose(1, 2).reshape(B, T, K * G * d))
        q_BKGTd, settings["exact"] = q_BKTGd.transpose(2, 3), parity
        if visibility.mask_BTS is not None:
            out = capped_attention(q_BKGTd, k, v, visibility.mask_BTS, **settings)
        else:
            out = chunked_capped_attention(q_BKGTd, k, v, visibility, **settings)
        return self.o_proj(out.permute(0, 3, 1, 2, 4).reshape(B, T, K * G * d))


def _fused(q_BKTGd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, cap: float) -> Callable[..., Tensor] | None:
    """A kernel that does what `chunked_capped_attention` does, if one serves these tensors."""
    if cap <= capped.LARGEST_CAP and gpu.fits("attention", q_BKTGd, k_BKTd, v_BKTd) and _gpu_holds(q_BKTGd):
        return _on_gpu
    return _on_cpu if capped.fits(q_BKTGd, k_BKTd, v_BKTd, cap) else None


def _gpu_holds(q_BKTGd: Tensor) -> bool:
    """Whether a multiprocessor has room for tiles of such heads, and their numbers for e^30, which those of fp16 have not."""
    (B, K, *_, d), dtype = q_BKTGd.shape, q_BKTGd.dtype
    return d <= 128 and B * K < 2**16 and dtype != torch.float16 and gpu.rows_fit(dtype, d)


def _on_gpu(q_BKTGd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, visibility: Visibility, **settings) -> Tensor:
    from pellucid.model.kernels.gpu.attention import capped_attention as kernel

    return kernel(q_BKTGd, k_BKTd, v_BKTd, *visibility.documents, visibility.ranges(), **settings)


def _on_cpu(q_BKTGd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, visibility: Visibility, **settings) -> Tensor:
    return capped.fused_capped_attention(q_BKTGd, k_BKTd, v_BKTd, *visibility.documents, **settings)
