"""How sure a number is: bootstrap intervals for means of text, whose tokens come in documents (Efron & Tibshirani 1993).

Tokens of one document are alike, so documents are drawn, not tokens. Letters: G documents, S seeds, P columns.
"""

from __future__ import annotations

import numpy as np

DRAWS, LEVEL = 2000, 0.95


def bounds(drawn: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end over axis 0, the draws; NaN draws are left out."""
    edges = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return edges[0], edges[1]


def ratio(sums: np.ndarray, counts: np.ndarray, *, draws: int = DRAWS, level: float = LEVEL, seed: int = 0) -> dict:
    """{"mean", "low", "high"} of sum(sums) / sum(counts) over documents.

    sums, counts: [G] or [G, P], each column an own ratio over the same draws, so that columns may be compared.
    A difference of two conditions on the same documents is the paired comparison: give the difference of their sums.
    """
    sums, counts = np.asarray(sums, float), np.broadcast_to(np.asarray(counts, float), np.shape(sums))
    drawn_WG = _weights(len(sums), draws, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, drawn = sums.sum(0) / counts.sum(0), (drawn_WG @ sums) / (drawn_WG @ counts)
    low, high = bounds(drawn, level)
    return {"mean": _plain(mean), "low": _plain(low), "high": _plain(high)}


def crossed(sums_SG: np.ndarray, counts_G: np.ndarray, *, draws: int = DRAWS, level: float = LEVEL, seed: int = 0) -> dict:
    """As `ratio`, for runs with several seeds over the same documents: both are drawn (Owen 2007's pigeonhole bootstrap).

    Seeds are few: their deviations are widened by sqrt(S / (S - 1)), which makes the variance over draws unbiased.
    """
    sums_SG, counts_G = np.asarray(sums_SG, float), np.asarray(counts_G, float)
    S, G = sums_SG.shape
    if S > 1:
        sums_SG = sums_SG.mean(0) + (sums_SG - sums_SG.mean(0)) * (S / (S - 1)) ** 0.5
    seeds_WS, drawn_WG = _weights(S, draws, seed + 1) / S, _weights(G, draws, seed)
    drawn = np.einsum("ws,sg,wg->w", seeds_WS, sums_SG, drawn_WG, optimize=True) / (drawn_WG @ counts_G)
    low, high = bounds(drawn, level)
    return {"mean": float(sums_SG.sum() / S / counts_G.sum()), "low": float(low), "high": float(high)}


def _weights(count: int, draws: int, seed: int) -> np.ndarray:
    """float64 [draws, count]: how often each was drawn, `count` times with replacement."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(float)


def _plain(values: np.ndarray) -> float | list[float]:
    return values.tolist() if np.ndim(values) else float(values)
