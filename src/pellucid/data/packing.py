"""Picture 2, pack: which piece of which document lies where in which row. A plan, computed and never stored.

Every predicted token of every document lies in exactly one piece, and every piece in exactly one row of T
positions; a row holds documents of one source only. `best_fit` keeps a document's pieces T long and packs what
remains by best-fit decreasing (Johnson 1973); `concatenate` lays the documents end to end and cuts every T.
Lengths count predicted tokens: a document of n tokens has n + 1, with its closing eos.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Rows of pieces. Row r holds the pieces row_first[r] : row_first[r + 1]; rows of a source are adjacent."""

    sequence_length: int
    document: np.ndarray  # int64, of each piece
    start: np.ndarray  # int64, first predicted token of the piece within its document
    length: np.ndarray  # int64, 1..T
    row_first: np.ndarray  # int64, rows + 1
    source_rows: np.ndarray  # int64, rows of each source
    truncated: int = 0  # documents of which only a row's length is read (labelled ones)

    @property
    def rows(self) -> int:
        return len(self.row_first) - 1

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    @property
    def utilization(self) -> float:
        """Share of positions that predict a token."""
        return self.tokens / max(1, self.rows * self.sequence_length)


def make_plan(lengths: np.ndarray, sources: np.ndarray, number_of_sources: int, sequence_length: int, packing: str,
              truncation_side: str | None = None) -> Plan:
    """Plan the rows of one split from its documents' lengths (predicted tokens) and source indices.

    With truncation_side ("right" or "left") each document is one piece: of a longer one than a row, that side is cut off.
    """
    pieces, counts = [], []
    whole, lengths = lengths, lengths if truncation_side is None else np.minimum(lengths, sequence_length)
    for source in range(number_of_sources):
        documents = np.flatnonzero(sources == source)
        cut = _concatenate if packing == "concatenate" else _best_fit
        piece_row, which, start, length = cut(lengths[documents].astype(np.int64), sequence_length)
        order = np.argsort(piece_row, kind="stable")
        rows = int(piece_row.max()) + 1 if len(piece_row) else 0
        pieces.append((piece_row[order] + sum(counts), documents[which[order]], start[order], length[order]))
        counts.append(rows)
    row, document, start, length = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    row_first = np.searchsorted(row, np.arange(sum(counts) + 1))
    if truncation_side == "left":
        start = start + (whole - lengths)[document]
    truncated = int((whole > lengths).sum())
    return Plan(sequence_length, document, start, length, row_first, np.array(counts, dtype=np.int64), truncated)


def count_rows(parts: Iterable[tuple[np.ndarray, np.ndarray]], number_of_sources: int, sequence_length: int, packing: str,
               truncation_side: str | None = None) -> tuple[int, float, int]:
    """(rows, utilization, truncated) of the plan that make_plan makes of all parts together; holds one part at a time.

    `parts` gives (lengths, sources) of some documents each.
    """
    T, truncated, tokens = sequence_length, 0, np.zeros(number_of_sources, np.int64)
    rests = np.zeros((number_of_sources, T), np.int64)  # of each source: documents by what remains after whole rows
    for lengths, sources in parts:
        truncated += 0 if truncation_side is None else int((lengths > T).sum())
        lengths = lengths if truncation_side is None else np.minimum(lengths, T)
        np.add.at(tokens, sources, lengths)
        np.add.at(rests, (sources, lengths % T), 1)
    if packing == "concatenate":
        rows = int((-(-tokens // T)).sum())
    else:
        rows = int(((tokens - rests @ np.arange(T)) // T).sum()) + sum(_bins_needed(counts.tolist(), T) for counts in rests)
    return rows, int(tokens.sum()) / max(1, rows * T), truncated


def _bins_needed(counts: list[int], capacity: int) -> int:
    """How many bins best_fit_decreasing opens for counts[size] items of each size."""
    free = [0] * (capacity + 1)  # bins by free space
    present = opened = 0
    for size in range(len(counts) - 1, 0, -1):
        left = counts[size]
        while left:
            fitting = present >> size
            space = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            if not fitting:
                free[space] = -(-left // (capacity // size))
                opened += free[space]
            bins, free[space] = free[space], 0
            present &= ~(1 << space)
            each = space // size
            used = min(bins, -(-left // each))
            placed = min(left, used * each)
            left -= placed
            last = placed - (used - 1) * each
            for number, remaining in ((used - 1, space - each * size), (1, space - last * size), (bins - used, space)):
                if number and remaining:
                    free[remaining] += number
                    present |= 1 << remaining
    return opened


def _concatenate(lengths: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, document, start, length) of each piece when documents lie end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.unique(np.concatenate([ends, np.arange(0, total, T), [0, total]]))
    first, length = cuts[:-1], np.diff(cuts)
    document = np.searchsorted(ends, first, side="right")
    return first // T, document, first - (ends - lengths)[document], length


def _best_fit(lengths: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, document, start, length) of each piece: whole rows first, then the remainders, packed."""
    whole, rest = lengths // T, lengths % T
    document = np.repeat(np.arange(len(lengths)), whole)
    number = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    short = np.flatnonzero(rest)
    row = np.concatenate([np.arange(len(document)), len(document) + best_fit_decreasing(rest[short], T)])
    start = np.concatenate([number * T, whole[short] * T])
    length = np.concatenate([np.full(len(document), T, dtype=np.int64), rest[short]])
    return row, np.concatenate([document, short]), start, length


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item: longest items first, each into the fullest bin that still holds it.

    Exactly the textbook rule, done for all items of one size and all bins of one free space at a time: a bin
    that is the fullest that fits stays so until it no longer fits. About sizes' distinct values steps, not items.
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    free: dict[int, list[np.ndarray]] = {}  # free space -> the bins that have it
    present = 0  # bit f: some bin has free space f
    opened = done = 0
    while done < len(order):
        size = int(sizes[order[done]])
        end = done + int(np.searchsorted(-sizes[order[done:]], -size, side="right")) if done + 1 < len(order) else done + 1
        while done < end:
            left = end - done
            fitting = present >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                candidates = np.concatenate(free.pop(space))
                present &= ~(1 << space)
            else:
                space = capacity
                needed = -(-left // (capacity // size))
                candidates = np.arange(opened, opened + needed)
                opened += needed
            each = space // size
            used = min(len(candidates), -(-left // each))
            placed = min(left, used * each)
            bins[order[done : done + placed]] = np.repeat(candidates[:used], each)[:placed]
            done += placed
            last = placed - (used - 1) * each
            for group, remaining in (
                (candidates[: used - 1], space - each * size),
                (candidates[used - 1 : used], space - last * size),
                (candidates[used:], space),
            ):
                if len(group) and remaining:
                    free.setdefault(remaining, []).append(group)
                    present |= 1 << remaining
    return bins
