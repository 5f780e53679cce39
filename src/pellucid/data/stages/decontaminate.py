"""Picture 2, decontaminate: training text must not hold the text it is later measured on.

Word n-grams in common, case and symbols aside, as GPT-3 was checked (Brown et al. 2020, arXiv 2005.14165, appendix C).
Against benchmarks this is a stage of one document; against our own held-out documents a pass over the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.config import DecontaminateConfig, UserError
from pellucid.data.document import Document, Dropped, Unreadable
from pellucid.data.sources import list_files, read_documents
from pellucid.data.stages.corpus import CorpusPass
from pellucid.data.stages.sorted_rows import InTurn, SortedRows, with_group_heads
from pellucid.data.stages.textview import TextView, mix, view

VERSION = 1


def ngrams(view: TextView, n: int) -> np.ndarray:
    """uint64 hashes of all n-grams of words."""
    return mix(view.grams(n, folded=True))


def overlap(view: TextView, known: np.ndarray, n: int) -> float:
    """Share of a document's n-grams that are in a sorted array of hashes; 0 for fewer than n words."""
    grams = ngrams(view, n)
    if not len(grams) or not len(known):
        return 0.0
    places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
    return float(np.count_nonzero(known[places] == grams)) / len(grams)


def read_benchmarks(config: DecontaminateConfig) -> tuple[np.ndarray, dict[str, Any]]:
    """Sorted hashes of all n-grams of the benchmark texts, and what to record of them. Raises UserError."""
    parts, texts, too_short = [], 0, 0
    for file in list_files(config.against, "data.decontaminate.against"):
        for item in read_documents(file):
            if isinstance(item, Unreadable):
                raise UserError(item.message)
            grams = ngrams(TextView(item.text), config.ngram)
            texts, too_short = texts + 1, too_short + (len(grams) == 0)
            parts.append(grams)
    known = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    if config.against and not len(known):
        raise UserError(f"data.decontaminate.against: no text has {config.ngram} words; lower data.decontaminate.ngram")
    return known, {"texts": texts, "texts_too_short": too_short, "ngrams": len(known),
                   "fingerprint": f"{int(np.bitwise_xor.reduce(mix(known))) if len(known) else 0:016x}"}


class HeldOut(CorpusPass):
    """Drops training documents that share n-grams with held-out ones, in fixed memory.

    The first sweep marks hashes of held-out n-grams in a table; the second sorts those of training documents that hit a
    mark among the held-out ones: 24 bytes on disk each.
    """

    name = "decontaminate held-out"
    version = VERSION
    sweeps = 2

    def __init__(self, config: DecontaminateConfig, folder: Path, is_held_out: Callable[[Document, bytes], bool],
                 slots: int = 1 << 25):
        super().__init__(folder, config.model_dump(mode="json", exclude={"against"}))
        self.ngram, self.max_overlap, self.is_held_out = config.ngram, config.max_overlap, is_held_out
        self.marks = np.zeros(slots, bool)
        self.grams = SortedRows(folder, "grams", 3)  # hash, 0 if held out, number of the document
        self.shared = SortedRows(folder, "shared", 1)  # number of the document, once for each n-gram
        self.sweep = 0
        self._in_turn: InTurn | None = None

    def see(self, number: int, document: Document, content_hash: bytes) -> None:
        held_out = self.is_held_out(document, content_hash)
        if held_out != (self.sweep == 0):
            return
        grams = ngrams(view(document.text), self.ngram)
        slots = (grams & np.uint64(len(self.marks) - 1)).astype(np.int64)
        if held_out:
            self.marks[slots] = True
            self.grams.add(np.unique(grams), 0, 0)
        else:
            self.grams.add(grams[self.marks[slots]], 1, number)

    def settle(self) -> None:
        self.sweep += 1
        if self.sweep == 2:
            self.marks = np.zeros(0, bool)
            for rows, heads in with_group_heads(self.grams, 1):
                self.shared.add(rows[(heads[:, 1] == 0) & (rows[:, 1] == 1), 2])
            self.grams.remove()
            self._in_turn = InTurn(self.shared, 1)

    def apply(self, number: int, document: Document) -> Document | Dropped:
        shared = len(self._in_turn.until(number + 1))
        if not shared or shared / len(ngrams(view(document.text), self.ngram)) <= self.max_overlap:
            return document
        return Dropped("shares text with held-out documents")

    def close(self) -> None:
        self.shared.remove()
