"""MinHash signatures of documents and the bands that near-duplicates share (Broder 1997; Leskovec et al., chapter 3).

A document is the set of its word n-grams. Under a random order of all n-grams, two documents have the same first
one with probability J, their Jaccard similarity. With b bands of r such firsts, they share a band with probability
1 - (1 - J**r)**b: for 14 bands of 8, 5 % at J = 0.5, 56 % at 0.72, 92 % at 0.8, 99.9 % at 0.9.
"""

from __future__ import annotations

import numpy as np

from pellucid.data.stages.textview import MULTIPLIER, TextView, mix

CHUNK = 512  # n-grams hashed at once: 112 * 512 * 4 bytes stay in the second-level cache


class MinHash:
    """The hash functions of one setting: x -> a * x + b modulo 2**32 with a odd, on well mixed x."""

    def __init__(self, bands: int = 14, rows: int = 8, ngram: int = 5, seed: int = 1):
        self.bands, self.rows, self.ngram = bands, rows, ngram
        random = np.random.Generator(np.random.Philox(seed))
        self.a = random.integers(0, 2**31, (bands * rows, 1), np.uint32) * np.uint32(2) + np.uint32(1)
        self.b = random.integers(0, 2**32, (bands * rows, 1), np.uint32)
        self.band_salt = mix(np.arange(1, bands + 1, dtype=np.uint64) * MULTIPLIER)

    def signature(self, view: TextView) -> np.ndarray | None:
        """uint32 [bands * rows]: the least hash of the document's n-grams under each function; None without n-grams."""
        grams = view.grams(self.ngram, folded=True)
        if not len(grams):
            return None
        values = (mix(grams) >> np.uint64(32)).astype(np.uint32)
        least = np.full(len(self.a), 0xFFFFFFFF, np.uint32)
        table = np.empty((len(self.a), CHUNK), np.uint32)
        for start in range(0, len(values), CHUNK):
            chunk = values[start : start + CHUNK]
            hashes = table[:, : len(chunk)]
            np.multiply(chunk, self.a, out=hashes)
            hashes += self.b
            np.minimum(least, hashes.min(axis=1), out=least)
        return least

    def band_keys(self, signature: np.ndarray) -> np.ndarray:
        """uint64 [bands]: documents with the same key were equal in all rows of that band."""
        keys = self.band_salt
        for column in signature.reshape(self.bands, self.rows).T:
            keys = mix(keys + column) * MULTIPLIER
        return keys
