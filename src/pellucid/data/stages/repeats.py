"""Picture 2, deduplicate: passages that stand elsewhere already are cut, one copy stays.

After ExactSubstr of Lee et al. 2022 (arXiv 2107.06499), with words for tokens and rolling hashes of windows instead
of a suffix array: 32 bytes on disk for each word that lies in a repeated window, a fixed table in memory. A removed
word always has an equal at a smaller (identity, position), so the smallest copy of every passage is still there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pellucid.config import DeduplicateConfig
from pellucid.data.document import Document, Dropped
from pellucid.data.stages.corpus import CorpusPass, identity
from pellucid.data.stages.sorted_rows import InTurn, SortedRows, with_group_heads
from pellucid.data.stages.textview import MULTIPLIER, WORD, mix, view


class CutRepeats(CorpusPass):
    """Cuts passages of so many words that stand elsewhere already, within a document or across documents.

    The first sweep marks hashes of windows in a table of fixed size; the second makes rows of those marked twice only.
    """

    name = "cut repeated passages"
    version = 2
    sweeps = 2

    def __init__(self, config: DeduplicateConfig, folder: Path, slots: int = 1 << 26):
        super().__init__(folder, {"substring_words": config.substring_words})
        self.window = config.substring_words
        self.marks = np.zeros(slots, np.uint8)
        self.windows = SortedRows(folder, "windows", 4)  # hash, identity, number << 32 | position
        self.cuts: SortedRows | None = None
        self.sweep = 0
        self._in_turn: InTurn | None = None

    def see(self, number: int, document: Document, content_hash: bytes) -> None:
        hashes = window_hashes(document.text, self.window)
        slots = (hashes & np.uint64(len(self.marks) - 1)).astype(np.int64)
        if self.sweep == 0:
            slots.sort()
            twice = slots[1:][slots[1:] == slots[:-1]]
            self.marks[slots] = np.minimum(self.marks[slots] + 1, 2)
            self.marks[twice] = 2
        else:
            positions = np.flatnonzero(self.marks[slots] == 2)
            first, second = identity(document, content_hash)
            self.windows.add(hashes[positions], first, second, positions.astype(np.uint64) + np.uint64(number << 32))

    def settle(self) -> None:
        self.sweep += 1
        if self.sweep == 2:
            self.marks = np.zeros(0, np.uint8)
            self.cuts = SortedRows(self.folder, "cuts", 1)
            for rows, heads in with_group_heads(self.windows, 1):
                self.cuts.add(rows[rows[:, 3] != heads[:, 3], 3])
            self.windows.remove()
            self._in_turn = InTurn(self.cuts, 1)

    def apply(self, number: int, document: Document) -> Document | Dropped:
        cuts = self._in_turn.until((number + 1) << 32)[:, 0]  # documents come in order
        positions = (cuts & np.uint64(0xFFFFFFFF)).astype(np.int64)  # where the windows to be cut start, in words
        if not len(positions):
            return document
        text = cut_words(document.text, positions, self.window)
        left = any(map(str.isalnum, text))  # marks alone are no text: what stood before the first word
        return replace(document, text=text, exact=False) if left else Dropped("nothing but repeated passages")

    def close(self) -> None:
        self.cuts.remove()


def window_hashes(text: str, window: int) -> np.ndarray:
    """uint64 hashes of all runs of `window` words, symbols and case aside; [max(0, words - window + 1)]."""
    words = view(text).folded
    count = len(words) - window + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    powers = np.cumprod(np.full(len(words), MULTIPLIER, np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mix(words) * powers, dtype=np.uint64)])
    # sum of word[i + j] * m**(i + j + 1), divided by m**i: m is odd, so it has an inverse modulo 2**64
    inverse = np.uint64(pow(int(MULTIPLIER), -1, 2**64))
    back = np.concatenate([np.ones(1, np.uint64), np.cumprod(np.full(count - 1, inverse, np.uint64))])
    return mix((sums[window:] - sums[:-window]) * back)


def cut_words(text: str, positions: np.ndarray, window: int) -> str:
    """The text without the words [p, p + window) for each position p, and without what stands between them."""
    spans = [match.span() for match in WORD.finditer(text) if any(map(str.isalnum, match[0]))]
    starts = [start for start, _ in spans] + [len(text)]
    pieces, kept = [], 0
    for position in positions.tolist():
        start, end = starts[position], starts[position + window]
        if start > kept:
            pieces.append(text[kept:start])
        kept = max(kept, end)
    return "".join([*pieces, text[kept:]])
