"""How attention looks, head by head, on a probe row: saturation of the cap, entropy, largest score.

Fast attention gives no scores, so one row of the batch runs forward once more, without gradient, and q.k is computed
beside each layer from the same projections. On a cadence. Sources: Zhai et al. 2023 (entropy collapse, arXiv 2303.06296);
Wortsman et al. 2023 (growth of the logits, arXiv 2309.14322). Letters: T queries, Q of a chunk, S keys, H query heads, d
head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.model.grok import Grok1
from pellucid.model.kernels import native
from pellucid.model.kernels.rotary import rotate
from pellucid.observe.store import Row

QUERIES = 1024  # of a row; of a longer one every n-th
MOST_SCORES = 2**21  # held at once
SATURATED = 0.8814  # |x| / cap where the slope 1 - tanh(x / cap)^2 is a half


def attention_rows(layers: int, heads: int) -> list[Row]:
    """The axis of the stream `attention`."""
    return [Row(f"layers.{n}.heads.{h}", n, None, "head") for n in range(layers) for h in range(heads)]


@torch.no_grad()
def probe_attention(model: Grok1, batch: Any, row: int = 0) -> Tensor:
    """[L * H, 3]: saturation, entropy, largest score of each head, over the real tokens of one row of the batch (QUERIES of them)."""
    found: list[Tensor] = []

    def look(module, inputs) -> None:
        hidden_BTD, rotary, visibility = inputs[:3]
        found.append(_head_statistics(module, hidden_BTD, rotary, visibility))

    hooks = [layer.attention.register_forward_pre_hook(look) for layer in model.layers]
    try:
        part = slice(row, row + 1)
        model.hidden_states(
            batch.tokens_BT[part], segment_ids=batch.segment_ids_BT[part], positions=batch.positions_BT[part])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(found)


def _head_statistics(attention, hidden_BTD: Tensor, rotary, visibility) -> Tensor:
    c = attention.config
    T, K, G = hidden_BTD.shape[1], c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
    q = rotate(attention.q_proj(hidden_BTD).view(1, T, K, G, c.head_dim), *rotary)[0].transpose(1, 2).flatten(0, 1)
    k = rotate(attention.k_proj(hidden_BTD).view(1, T, K, 1, c.head_dim), *rotary)[0].squeeze(2)
    k = k.float().repeat_interleave(G, 0)
    H, step = len(q), -(-T // QUERIES)
    size = max(1, MOST_SCORES // (H * T)) * step  # never a table of T x T
    saturated_H, largest_H, relative_H = (torch.zeros(H, device=q.device) for _ in range(3))
    seen, choices = torch.zeros(2, dtype=torch.int64, device=q.device)
    for start in native.starts(T, size):
        stop = min(start + size, T)
        scores_HQS = (q[:, start:stop:step].float() @ k[:, :stop].transpose(-2, -1)) * c.attn_output_multiplier
        mask = visibility.mask_BTS
        seen_QS = visibility.chunk(start, stop, step)[0] if mask is None else mask[0, start:stop:step, :stop]
        seen_QS = seen_QS & visibility.key_valid_BT[0, start:stop:step, None]  # pads ask nothing
        saturated_H += ((scores_HQS.abs() > SATURATED * c.max_attn_value) & seen_QS).sum((1, 2))
        largest_H = torch.maximum(largest_H, scores_HQS.abs().masked_fill(~seen_QS, 0).amax((1, 2)))
        logs = torch.log_softmax((c.max_attn_value * torch.tanh(scores_HQS / c.max_attn_value)).masked_fill(~seen_QS, -torch.inf), -1)
        entropy_HQ = -(logs.exp() * logs.masked_fill(~seen_QS, 0)).sum(-1)
        keys_Q = seen_QS.sum(-1)
        relative_H += torch.where(keys_Q > 1, entropy_HQ / keys_Q.clamp(min=2).float().log(), 0).sum(-1)
        seen += keys_Q.sum()
        choices += (keys_Q > 1).sum()  # a query with one key has nothing to choose
    return torch.stack([saturated_H / seen.clamp(min=1), relative_H / choices.clamp(min=1), largest_H], 1)
