"""Held-out loss: what the model expects of text it was not trained on. Loss in nats per token, and bits per byte.

Bits per byte divide by the bytes of the text instead of its tokens, so that models with different tokenizers can be
compared. Letters: B rows, T positions, N = B*T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pellucid.model.grok import Grok1
from pellucid.training.device import widest
from pellucid.training.losses import IGNORE, linear_cross_entropy


@dataclass
class Evaluation:
    """Sums over all predicted tokens of an evaluation."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(self.nats + other.nats, self.tokens + other.tokens, self.text_bytes + other.text_bytes)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.text_bytes)

    def in_words(self) -> str:
        return f"held-out loss {self.loss:.4f} ({self.bits_per_byte:.3f} bits per byte)"

    def as_dict(self) -> dict[str, float]:
        names = ("loss", "perplexity", "bits_per_byte", "tokens", "text_bytes")
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def evaluate_batches(
    model: Grok1, batches: Iterable[Any], byte_lengths_V: np.ndarray, on_batch: Callable[[int], None] | None = None
) -> Evaluation:
    """Sum the losses of batches (data.dataset.Batch). byte_lengths_V: bytes of text that each token stands for."""
    result, device = Evaluation(), model.embedding.weight.device
    for batch in batches:
        batch = batch.to(device)
        hidden, _ = model.hidden_states(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)
        targets_N = batch.targets_BT.reshape(-1)
        losses = linear_cross_entropy(
            hidden.flatten(0, 1), model.embedding.weight, targets_N, multiplier=model.config.output_multiplier_scale
        )
        result.nats += float(losses.per_token_N.sum(dtype=widest(device)))
        result.tokens += int(losses.count)
        result.text_bytes += int(byte_lengths_V[targets_N[targets_N != IGNORE].cpu().numpy()].sum())
        if on_batch is not None:
            on_batch(int(losses.count))
    return result


def split_batches(split: Any, batch_size: int, rows: int | None = None) -> Iterator[Any]:
    """The first `rows` rows of a split (None: all) in its fixed order, each once."""
    rows = len(split) if rows is None else min(rows, len(split))
    for start in range(0, rows, batch_size):
        yield split.rows(start, min(start + batch_size, rows))
