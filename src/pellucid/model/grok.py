"""Picture 1: tokens -> embedding -> [attention -> router -> experts] x layers -> scores of the next token.

Grok-1 exactly (xai-org/grok-1 model.py): four RMSNorms a layer, rotary positions, grouped-query attention with capped
logits, top-2 of 8 experts, tied embedding, multipliers on both ends, no biases.
A model that labels documents has a head of its own for the scores of K classes, or K numbers, instead of the table.
Letters: B batch, T sequence, N = B*T, D hidden_size, V vocabulary, K outputs of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pellucid.config import ModelConfig
from pellucid.model.attention import Attention, Visibility
from pellucid.model.cache import KVCache
from pellucid.model.kernels.products import linear
from pellucid.model.layers import Linear, RMSNorm, rotary_phases
from pellucid.model.moe import MoE, Routing

CHECKPOINT = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a layer is random


class Layer(nn.Module):
    """h += norm(attention(norm(h))); h += norm(moe(norm(h)))."""

    def __init__(self, config: ModelConfig, device=None, dtype=None):
        super().__init__()
        norm = lambda: RMSNorm(config.hidden_size, config.rms_norm_eps, device)
        self.pre_attn_norm = norm()
        self.attention = Attention(config, device, dtype)
        self.post_attn_norm = norm()
        self.pre_moe_norm = norm()
        self.moe = MoE(config, device, dtype)
        self.post_moe_norm = norm()

    def forward(self, hidden_BTD: Tensor, rotary, visibility, cache, layer: int, parity: bool, recompute: str = "none",
                ) -> tuple[Tensor, Routing]:  # fmt: skip
        """recompute: what the backward pass computes anew instead of keeping it (see Grok1.recompute)."""
        if recompute == "all":
            return checkpoint(self, hidden_BTD, rotary, visibility, cache, layer, parity, **CHECKPOINT)
        if recompute == "attention":
            hidden_BTD = checkpoint(self.attend, hidden_BTD, rotary, visibility, cache, layer, parity, **CHECKPOINT)
        else:
            hidden_BTD = self.attend(hidden_BTD, rotary, visibility, cache, layer, parity)
        mixed, routing = self.moe(self.pre_moe_norm(hidden_BTD), parity)
        return self.post_moe_norm.onto(hidden_BTD, mixed), routing

    def attend(self, hidden_BTD: Tensor, rotary, visibility, cache, layer: int, parity: bool) -> Tensor:
        attended = self.attention(self.pre_attn_norm(hidden_BTD), rotary, visibility, cache, layer, parity)
        return self.post_attn_norm.onto(hidden_BTD, attended)


class Embedding(nn.Module):
    """One table [V, D] for both ends: rows in, scores out."""

    def __init__(self, config: ModelConfig, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype))

    def forward(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens_BT, self.weight).to(dtype)


class Grok1(nn.Module):
    """A model of the Grok-1 architecture. Parameters are uninitialised: load them, or call `initialize`.

    `compute_dtype` (float32 or bfloat16) is the dtype of products and of the residual stream; parameters may be fp32
    masters. `parity` follows every cast of the official bf16 run, at some cost in speed. `recompute` trades time for memory
    in training (Chen et al. 2016, arXiv 1604.06174), bit for bit: "attention" keeps the experts' products and computes norms
    and attention anew in the backward pass (under a tenth of the forward work at Grok-1's shape), "all" whole layers.
    """

    def __init__(self, config: ModelConfig, device=None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = dtype
        self.recompute = "none"  # "attention" | "all"
        self.parity = dtype == torch.bfloat16  # weights held in bf16 serve; training keeps fp32 masters and chooses itself
        self.embedding = Embedding(config, device, dtype)
        self.layers = nn.ModuleList(Layer(config, device, dtype) for _ in range(config.num_hidden_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device)
        outputs = len(config.head.labels) if config.head is not None else 0
        self.score = Linear(config.hidden_size, outputs, device, dtype) if outputs else None  # Hugging Face's name

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Scores [B, T, V] in fp32 of the token that follows each of `tokens_BT` (int64).

        With a head: what it says [B, T, K] at each token of the text so far; a document's answer is at its last token.

        segment_ids [B, T] or [1, T]: documents within a row, which do not see each other. positions, alike: default 0..T-1,
        counted on from the cache. cache: holds the past of these rows; it grows by T.
        """
        hidden, _ = self.hidden_states(tokens_BT, segment_ids=segment_ids, positions=positions, cache=cache)
        return self.logits(hidden)

    def hidden_states(
        self,
        tokens_BT: Tensor,
        *,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Final normed states [B, T, D] and each layer's routing: the way in for a loss that never holds all scores."""
        c = self.config
        if positions is None:
            past = cache.length if cache is not None else 0
            positions = torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device)
        positions = positions.expand_as(tokens_BT)
        segment_ids = segment_ids.expand_as(tokens_BT) if segment_ids is not None else None
        rotary = rotary_phases(positions, c.head_dim, c.rope_theta)
        visibility = visible_keys(tokens_BT, segment_ids, cache, c.pad_token_id)
        hidden = self.embedding(tokens_BT, self.compute_dtype)
        hidden = hidden * _rounded(c.embedding_multiplier_scale, hidden.dtype)
        recompute = self.recompute if torch.is_grad_enabled() and cache is None else "none"
        routings = []
        for index, layer in enumerate(self.layers):
            hidden, routing = layer(hidden, rotary, visibility, cache, index, self.parity, recompute)
            routings.append(routing)
        if cache is not None:
            cache.advance(tokens_BT.shape[1])
        return self.final_norm(hidden), routings

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., V] in fp32 from final states [..., D]: the embedding table again, times the output multiplier.

        With a head: its scores [..., K].
        """
        if self.score is not None:
            return self.score(hidden).float()
        scores = linear(hidden, self.embedding.weight)
        return scores.float() * self.config.output_multiplier_scale

    def new_cache(self) -> KVCache:
        return KVCache()


def visible_keys(tokens_BT: Tensor, segment_ids: Tensor | None, cache: KVCache | None, pad: int) -> Visibility:
    """The pad rule: a key is masked by its token id alone; pads inside a cached prompt are masked no more.

    A row that begins with pads has queries that see nothing; the official result, uniform over all T keys, needs the
    whole mask, so such batches (and decoding) take the plain path.
    """
    visibility = Visibility(tokens_BT != pad, segment_ids)
    past = cache.length if cache is not None else 0
    if past == 0 and (segment_ids is not None or not bool((tokens_BT[:, 0] == pad).any())):
        return visibility
    mask = visibility.chunk(0, tokens_BT.shape[1])
    if past:
        mask = torch.cat((mask.new_ones(*tokens_BT.shape, past), mask), dim=-1)
    visibility.mask_BTS = mask
    return visibility


def _rounded(multiplier: float, dtype: torch.dtype) -> float:
    """JAX rounds a Python constant to the dtype of the array it multiplies."""
    return torch.tensor(multiplier, dtype=torch.float32).to(dtype).item()
