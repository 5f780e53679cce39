"""The baseline every language model must beat: predict each token from the one before, by counting.

Interpolated Kneser-Ney smoothing with one absolute discount (Kneser & Ney 1995; Chen & Goodman 1998).
Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

DISCOUNT = 0.75


def bigram_loss(train, held_out) -> float:
    """Mean nats per token on `held_out` of a bigram model counted on `train` (two data.dataset.Split)."""
    vocab_size = train.tokenizer.vocab_size
    pairs = np.concatenate([previous * vocab_size + token for previous, token in _pairs(train)])
    pairs, counts = np.unique(pairs, return_counts=True)  # only pairs that occur: V x V would not fit a large vocabulary
    previous, following = np.divmod(pairs, vocab_size)
    total_V = np.bincount(previous, weights=counts, minlength=vocab_size)
    followers_V = np.bincount(previous, minlength=vocab_size)
    contexts_V = np.bincount(following, minlength=vocab_size) + 1e-2  # a token never seen keeps some probability
    continuation_V = contexts_V / contexts_V.sum()
    left_over_V = np.where(total_V > 0, DISCOUNT * followers_V / np.maximum(total_V, 1), 1.0)

    nats, tokens = 0.0, 0
    for before, token in _pairs(held_out):
        key = before * vocab_size + token
        place = np.minimum(np.searchsorted(pairs, key), len(pairs) - 1)
        seen = np.where(pairs[place] == key, counts[place] - DISCOUNT, 0.0)
        probability = seen / np.maximum(total_V[before], 1) + left_over_V[before] * continuation_V[token]
        nats -= float(np.log(probability).sum())
        tokens += len(token)
    return nats / max(1, tokens)


def _pairs(split, rows: int = 512) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token, the one that follows) wherever something is predicted; each row of the split once."""
    for start in range(0, len(split), rows):
        batch = split.rows(start, start + rows)
        real = batch.targets_BT >= 0
        yield batch.tokens_BT[real].numpy(), batch.targets_BT[real].numpy()
