"""Picture 2, augment: one random stream per (run seed, document, epoch, augmenter), whatever the order of work.

The key is a hash of the four; the stream is Philox (Salmon et al. 2011), which is counter-based and the same
on every machine. Augmenters draw with `random()` only: its values are the bit generator's own, so they do not
change between NumPy versions as other distributions may.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def stream_key(seed: int, document: str, epoch: int, augmenter: str) -> bytes:
    """16 bytes that name a stream. `document` is the document's id: the hex content hash."""
    return hashlib.blake2b(json.dumps([seed, document, epoch, augmenter]).encode(), digest_size=16).digest()


def generator(key: bytes) -> np.random.Generator:
    """The stream of a key, from its start."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def pick(rng: np.random.Generator, size: int) -> int:
    """One of 0..size-1."""
    return min(int(rng.random() * size), size - 1)
