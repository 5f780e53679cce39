"""How sure a number is: bootstrap intervals for means of text, whose tokens come in documents (Efron & Tibshirani 1993),
and Student's for what differs from seed to seed.

Tokens of one document are alike, so documents are drawn, not tokens. Letters: G documents, S seeds, P columns.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

DRAWS = 2000


def bounds(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of 95 % over axis 0, the draws; NaN draws are left out."""
    edges = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return edges[0], edges[1]


def ratio(sums: np.ndarray, counts: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> dict:
    """{"mean", "low", "high"} of sum(sums) / sum(counts) over documents.

    sums, counts: [G] or [G, P], each column an own ratio over the same draws, so that columns may be compared.
    A difference of two conditions on the same documents is the paired comparison: give the difference of their sums.
    """
    sums, counts = np.asarray(sums, float), np.broadcast_to(np.asarray(counts, float), np.shape(sums))
    drawn_WG = _weights(len(sums), draws, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, drawn = sums.sum(0) / counts.sum(0), (drawn_WG @ sums) / (drawn_WG @ counts)
    low, high = around(mean, drawn, len(sums))
    return {"mean": _plain(mean), "low": _plain(low), "high": _plain(high)}


def share(sums: np.ndarray, counts: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> dict:
    """As `ratio`, of what lies between 0 and 1.

    Documents that are all without it, or all of it, draw nothing else: there the far end is Clopper & Pearson's (1934), at which
    G documents would all be so one time in forty.
    """
    found = {name: np.clip(value, 0.0, 1.0) for name, value in ratio(sums, counts, draws=draws, seed=seed).items()}
    alike = 0.025 ** (1 / len(sums))
    found["high"] = np.where(found["mean"] == 0, np.maximum(found["high"], 1 - alike), found["high"])
    found["low"] = np.where(found["mean"] == 1, np.minimum(found["low"], alike), found["low"])
    return {name: _plain(value) for name, value in found.items()}


def around(mean: np.ndarray, drawn: np.ndarray, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end from draws of so many documents, or infinite ones: of one document nothing follows about others.

    Draws of G documents vary too little by (G - 1) / G, and know no Student's t: both widen the interval of few.
    """
    if documents < 2:
        return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    low, high = bounds(drawn)
    wider = student_point(min(documents - 1, 300)) / 1.96 * (documents / (documents - 1)) ** 0.5  # of 300 it is 1.97
    return mean - wider * (mean - low), mean + wider * (high - mean)


def crossed(sums_SG: np.ndarray, counts_G: np.ndarray, *, draws: int = DRAWS) -> dict:
    """As `ratio`, for runs with several seeds over the same documents, of which both vary.

    Student's interval over the seeds' ratios and the bootstrap's over documents, their distances from the mean added in
    squares (Zou & Donner 2008). Few seeds say little: the interval of two is 12.7 standard errors to each side.
    """
    sums_SG, counts_G = np.asarray(sums_SG, float), np.asarray(counts_G, float)
    found, half = ratio(sums_SG.mean(0), counts_G, draws=draws), 0.0
    if len(sums_SG) > 1:
        seeds = student(sums_SG.sum(1) / counts_G.sum())
        half = seeds["high"] - seeds["mean"]
    mean = found["mean"]
    return {"mean": mean, "low": mean - math.hypot(mean - found["low"], half), "high": mean + math.hypot(found["high"] - mean, half)}


def student(values: np.ndarray) -> dict[str, float | None]:
    """Mean and its 95 % interval by Student's t over seeds; no interval from one."""
    mean, S = float(values.mean()), len(values)
    half = student_point(S - 1) * float(values.std(ddof=1)) / S**0.5 if S > 1 else None
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}


@cache
def student_point(degrees: int) -> float:
    """The 97.5 % point of Student's t, by bisection of its finite sum (Abramowitz & Stegun 26.7.3 and 26.7.4)."""

    def inside(angle: float) -> float:
        """P(|t| < sqrt(degrees) tan(angle))."""
        term = total = 1.0 if degrees % 2 == 0 else math.cos(angle)
        for n in range(2 if degrees % 2 == 0 else 3, degrees, 2):
            term *= (n - 1) / n * math.cos(angle) ** 2
            total += term
        if degrees % 2 == 0:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _weights(count: int, draws: int, seed: int) -> np.ndarray:
    """float64 [draws, count]: how often each was drawn, `count` times with replacement."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(float)


def _plain(values: np.ndarray) -> float | list[float]:
    return values.tolist() if np.ndim(values) else float(values)
