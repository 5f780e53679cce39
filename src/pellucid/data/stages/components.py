"""Connected components: documents linked by chains of near-duplicates, found over edges that may lie on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np


def components(count: int, edges: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
    """int64 [count]: for each node the smallest node of its component.

    `edges()` gives arrays [m, 2] of node numbers, afresh at each call. Labels only fall, each to one of the same
    component; when no edge joins two labels they are its smallest. Needs 8 bytes a node, and reads the edges about
    log(longest chain) times (hooking and pointer jumping, Shiloach & Vishkin 1982).
    """
    label = np.arange(count)
    changed = True
    while changed:
        changed = False
        for part in edges():
            first, second = label[part[:, 0].astype(np.int64)], label[part[:, 1].astype(np.int64)]
            differ = first != second
            if differ.any():
                changed = True
                first, second = first[differ], second[differ]
                np.minimum.at(label, np.maximum(first, second), np.minimum(first, second))
        while changed and (label[label] != label).any():
            label = label[label]
    return label
