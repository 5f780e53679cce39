"""Uniformly random token sequences: text with nothing to learn, only to remember (Morris et al. 2025, arXiv 2505.24832).

It stands where a Dataset stands; the "held-out" rows are the very training rows, so that the loop's evaluation tells
how many bits are remembered. Letters: B rows, T positions.
"""

from __future__ import annotations

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import torch

from pellucid.data.dataset import Batch
from pellucid.data.order import permute

RESERVED = 1  # pad, which the architecture masks: it cannot be told


class RandomTokens:
    """`count` sequences of `length` tokens drawn from vocab_size - 1 symbols; the same for the same seed."""

    def __init__(self, count: int, length: int, vocab_size: int, seed: int = 0):
        self.count, self.length, self.seed = count, length, seed
        random = np.random.default_rng([seed, count, length, vocab_size])
        self.tokens = torch.from_numpy(random.integers(RESERVED, vocab_size, (count, length)))
        facts = f"random {count} {length} {vocab_size} {seed}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        self.tokenizer = SimpleNamespace(
            vocab_size=vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=1, fingerprint=self.fingerprint,
            byte_lengths=np.ones(vocab_size))  # fmt: skip
        self.rows_per_epoch, self.mixture = count, ()
        self.bits = count * length * math.log2(vocab_size - RESERVED)  # entropy of all of it

    @property
    def train(self) -> RandomTokens:
        return self

    @property
    def validation(self) -> RandomTokens:
        return self

    def split(self, name: str, seed: int = 0) -> RandomTokens:
        return self

    def __len__(self) -> int:
        return self.count

    def epoch_of(self, step: int, batch_size: int) -> float:
        return step * batch_size / self.count

    def steps_in_all(self, batch_size: int) -> None:
        """No end."""

    def batch(self, step: int, batch_size: int) -> Batch:
        return self.samples(step * batch_size, (step + 1) * batch_size, batch_size)

    def samples(self, start: int, stop: int, batch_size: int) -> Batch:
        """Every sequence once in each epoch, in a new order; samples counted over the whole run."""
        epochs, within = np.divmod(np.arange(start, stop), self.count)
        return self._assemble(permute(within, self.count, (self.seed << 32) + epochs))

    def rows(self, start: int, stop: int) -> Batch:
        return self._assemble(np.arange(start, min(stop, self.count)))

    def _assemble(self, rows: np.ndarray) -> Batch:
        """Each sequence is predicted from its first token on; before it stands always the same token."""
        targets = self.tokens[torch.from_numpy(rows)]
        B, T = targets.shape
        tokens = torch.cat([targets.new_full((B, 1), self.tokenizer.bos_token_id), targets[:, :-1]], dim=1)
        ids = torch.from_numpy(rows)
        return Batch(tokens, targets, torch.ones(B, T, dtype=torch.int32), torch.arange(T, dtype=torch.int32).repeat(B, 1),
                     ids, torch.zeros_like(ids))
