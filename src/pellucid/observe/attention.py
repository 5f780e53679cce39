"""How attention looks, head by head, on a probe row: saturation of the cap, entropy, largest score.

Fast attention gives no scores, so one row of the batch runs forward once more, without gradient, and q.k is computed
beside each layer from the same projections. On a cadence. Sources: Zhai et al. 2023 (entropy collapse, arXiv 2303.06296);
Wortsman et al. 2023 (growth of the logits, arXiv 2309.14322). Letters: T queries, S keys, H query heads, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.model.grok import Grok1
from pellucid.model.kernels.rotary import rotate
from pellucid.observe.store import Row

SATURATED = 0.8814  # |x| / cap where the slope 1 - tanh(x / cap)^2 is a half


def attention_rows(layers: int, heads: int) -> list[Row]:
    """The axis of the stream `attention`."""
    return [Row(f"layers.{n}.heads.{h}", n, None, "head") for n in range(layers) for h in range(heads)]


@torch.no_grad()
def probe_attention(model: Grok1, batch: Any, row: int = 0) -> Tensor:
    """[L * H, 3]: saturation, entropy, largest score of each head, over the real tokens of one row of the batch."""
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
    k = k.repeat_interleave(G, 0)
    scores_HTS = (q.float() @ k.float().transpose(-2, -1)) * c.attn_output_multiplier
    seen_TS = visibility.chunk(0, T)[0] if visibility.mask_BTS is None else visibility.mask_BTS[0]
    seen_TS = seen_TS & visibility.key_valid_BT[0][:, None]  # pads ask nothing
    saturated = ((scores_HTS.abs() > SATURATED * c.max_attn_value) & seen_TS).sum((1, 2)) / seen_TS.sum().clamp(min=1)
    largest = scores_HTS.abs().masked_fill(~seen_TS, 0).amax((1, 2))
    capped = c.max_attn_value * torch.tanh(scores_HTS / c.max_attn_value)
    logs = torch.log_softmax(capped.masked_fill(~seen_TS, -torch.inf), -1)
    entropy_HT = -(logs.exp() * logs.masked_fill(~seen_TS, 0)).sum(-1)
    keys_T = seen_TS.sum(-1)
    choice_T = keys_T > 1  # a query with one key has nothing to choose
    relative = torch.where(choice_T, entropy_HT / keys_T.clamp(min=2).float().log(), 0)
    return torch.stack([saturated, relative.sum(-1) / choice_T.sum().clamp(min=1), largest], 1)
