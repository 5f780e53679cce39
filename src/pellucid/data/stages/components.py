"""Connected components: documents linked by chains of near-duplicates, found in bounded memory by sorting edges on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pellucid.data.stages.sorted_rows import MEMORY_ROWS, SortedRows, distinct, with_group_heads


def components(edges: Iterable[np.ndarray], folder: Path, memory_rows: int = MEMORY_ROWS) -> SortedRows:
    """Rows (node, smallest node of its component) of all nodes that an edge joins to another.

    `edges` gives uint64 [m, 2]. Large-star and small-star in turn until neither changes an edge (Kiveris et al. 2014,
    Connected Components in MapReduce and Beyond): each replaces a node's edges by ones to its smallest neighbor, and is
    one sort. About log(longest chain) rounds, each over no more edges than there were; memory as of SortedRows.
    """
    rows = lambda name: SortedRows(folder, name, 2, memory_rows)
    changed = True
    while changed:
        both = rows("edges")
        for part in edges:
            part = part[part[:, 0] != part[:, 1]]
            both.add(part[:, 0], part[:, 1])
            both.add(part[:, 1], part[:, 0])
        large, changed = _large_star(both, rows("large"))
        both.remove()
        small, moved = _small_star(large, rows("small"))
        large.remove()
        changed |= moved
        edges = _given_away(small)
    label = rows("components")
    for part in edges:
        label.add(part[:, 0], part[:, 1])
        label.add(part[:, 1], part[:, 1])
    return label


def _large_star(both: SortedRows, out: SortedRows) -> tuple[SortedRows, bool]:
    """(larger neighbor, smallest neighbor or the node itself) for each node; and whether that is news."""
    changed = False
    for rows, heads in with_group_heads(distinct(both), 1):
        larger = rows[:, 1] > rows[:, 0]
        node, least = rows[larger, 0], np.minimum(rows[:, 0], heads[:, 1])[larger]
        changed |= bool((least != node).any())
        out.add(rows[larger, 1], least)
    return out, changed


def _small_star(large: SortedRows, out: SortedRows) -> tuple[SortedRows, bool]:
    """(smaller neighbor, smallest neighbor) and (node, smallest neighbor) for each node; and whether that is news."""
    changed = False
    for rows, heads in with_group_heads(distinct(large), 1):
        first = rows[:, 1] == heads[:, 1]
        changed |= not first.all()
        out.add(np.where(first, rows[:, 0], rows[:, 1]), heads[:, 1])
    return out, changed


def _given_away(rows: SortedRows) -> Iterable[np.ndarray]:
    yield from distinct(rows)
    rows.remove()
