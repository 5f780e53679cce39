"""Picture 2, loader: which row is sample k, as a pure function of (seed, k). Nothing is remembered.

Epoch e shuffles by a permutation keyed by (seed, e): a Feistel network (Luby & Rackoff 1988) over the next power
of four, walked along its cycles until it lands inside the range (Black & Rogaway 2002). A source of R rows and
weight w has q = round(w R) places in an epoch, and goes through one permutation of its own rows after another.
Under a mixture schedule, epochs give way to cycles of CYCLE samples in which each source has its share of places;
a source still goes through its rows pass after pass, and a change of shares neither repeats nor leaves out one. A
source with a budget of rows leaves its places to the others, in proportion, from the sample after its last row on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ROUNDS = 6
CYCLE = 4096  # samples; shares are kept to one part in so many
NO_END = 2**62


def permute(index: np.ndarray, size: int, key: np.ndarray | int) -> np.ndarray:
    """Where a permutation of 0..size-1 sends each index. `key` (one, or one per index) chooses the permutation."""
    half = np.uint64(((max(2, size) - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << int(half)) - 1)
    value = np.asarray(index, dtype=np.uint64)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), value.shape)
    keys = _mix(keys + np.arange(ROUNDS, dtype=np.uint64)[:, None])
    result, waiting = value.copy(), np.arange(value.size)
    while waiting.size:
        left, right = result[waiting] >> half, result[waiting] & low
        for round_key in keys[:, waiting]:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        result[waiting] = (left << half) | right
        waiting = waiting[result[waiting] >= size]
    return result.astype(np.int64)


def sample_rows(samples: np.ndarray, source_rows: np.ndarray, quotas: np.ndarray, seed: int) -> np.ndarray:
    """The row of each sample number. `source_rows` and `quotas` are the rows of each source and its places per epoch."""
    samples = np.asarray(samples, dtype=np.int64)
    epoch, within = np.divmod(samples, quotas.sum())
    place = permute(within, int(quotas.sum()), _key(seed, 0, epoch))
    ends, first_row = np.cumsum(quotas), np.cumsum(source_rows) - source_rows
    source = np.searchsorted(ends, place, side="right")
    rows = np.empty_like(samples)
    for number in np.unique(source):
        mine = source == number
        turn = epoch[mine] * quotas[number] + place[mine] - (ends - quotas)[number]
        pass_, position = np.divmod(turn, source_rows[number])
        rows[mine] = first_row[number] + permute(position, int(source_rows[number]), _key(seed, 1 + int(number), pass_))
    return rows


@dataclass(frozen=True)
class Mixture:
    """A schedule of shares: segments of the run, each with the places of every source in a cycle.

    `turns[segment][source]`: rows that the source has given before the segment begins. `stop`: the sample for which
    no source has a row left; None: there are rows for ever.
    """

    first: tuple[int, ...]  # sample at which each segment begins
    quotas: tuple[tuple[int, ...], ...]
    turns: tuple[tuple[int, ...], ...]
    stop: int | None = None


def make_mixture(segments: list[tuple[int, list[float]]], seed: int, budgets: list[int | None] | None = None) -> Mixture:
    """From (first sample, shares) of each segment, the first at sample 0; and the rows each source gives at most."""
    first, quotas, turns = [], [], []
    given = np.zeros(len(segments[0][1]), dtype=np.int64)
    most = np.array([NO_END if budget is None else budget for budget in budgets or [None] * len(given)], dtype=np.int64)
    ends = [begin for begin, _ in segments[1:]] + [NO_END]
    for (begin, shares), end in zip(segments, ends, strict=True):
        while begin < end:
            left = np.where(given < most, shares, 0.0)
            if not left.any():
                return Mixture(tuple(first), tuple(quotas), tuple(turns), begin)
            number, places = len(first), _in_cycle(left)
            first.append(begin)
            quotas.append(places)
            turns.append(tuple(given.tolist()))
            capped = (n for n, place in enumerate(places) if place and most[n] < NO_END)
            stop = min([end, *(begin + _place_of(seed, number, places, n, int(most[n] - given[n]) - 1) + 1 for n in capped)])
            if stop == NO_END:
                break
            cycles, rest = divmod(stop - begin, CYCLE)
            source, _ = _cycle(seed, number, cycles, places)
            given = given + cycles * np.array(places, dtype=np.int64) + np.bincount(source[:rest], minlength=len(places))
            begin = stop
    return Mixture(tuple(first), tuple(quotas), tuple(turns))


def _place_of(seed: int, segment: int, quotas: tuple[int, ...], source: int, turn: int) -> int:
    """The sample of a segment, from 0, in which a source gives its row number `turn` of that segment."""
    cycle, rank = divmod(turn, quotas[source])
    sources, _ = _cycle(seed, segment, cycle, quotas)
    return cycle * CYCLE + int(np.flatnonzero(sources == source)[rank])


def mixed_rows(samples: np.ndarray, source_rows: np.ndarray, mixture: Mixture, seed: int) -> np.ndarray:
    """The row of each sample number under a mixture schedule."""
    samples = np.asarray(samples, dtype=np.int64)
    segment = np.searchsorted(mixture.first, samples, side="right") - 1
    cycle, place = np.divmod(samples - np.array(mixture.first, dtype=np.int64)[segment], CYCLE)
    source, turn = np.empty_like(samples), np.empty_like(samples)
    for number, which in sorted(set(zip(segment.tolist(), cycle.tolist(), strict=True))):
        mine = (segment == number) & (cycle == which)
        sources, rank = _cycle(seed, number, which, mixture.quotas[number])
        source[mine] = sources[place[mine]]
        given = np.array(mixture.turns[number]) + which * np.array(mixture.quotas[number])
        turn[mine] = given[source[mine]] + rank[place[mine]]
    first_row, rows = np.cumsum(source_rows) - source_rows, np.empty_like(samples)
    for number in np.unique(source):
        mine = source == number
        pass_, position = np.divmod(turn[mine], source_rows[number])
        rows[mine] = first_row[number] + permute(position, int(source_rows[number]), _key(seed, 1 + int(number), pass_))
    return rows


def _in_cycle(shares: np.ndarray) -> tuple[int, ...]:
    """Places of each source in a cycle, by largest remainders (Hamilton); a source with a share has one at least."""
    exact = shares / shares.sum() * CYCLE
    places = np.where(exact > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    for number in np.argsort(places - exact, kind="stable")[: max(0, CYCLE - int(places.sum()))]:
        places[number] += 1
    places[np.argmax(places)] -= places.sum() - CYCLE
    return tuple(int(p) for p in places)


@lru_cache(maxsize=16)
def _cycle(seed: int, segment: int, cycle: int, quotas: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(source of each place of one cycle, how many places of the same source come before it)."""
    order = permute(np.arange(CYCLE), CYCLE, _key(seed, 2**32 + segment, np.array([cycle])))
    source = np.searchsorted(np.cumsum(quotas), order, side="right")
    sorted_ = np.argsort(source, kind="stable")
    rank = np.empty(CYCLE, dtype=np.int64)
    rank[sorted_] = np.arange(CYCLE) - np.repeat(np.cumsum(quotas) - quotas, quotas)
    return source, rank


def _key(seed: int, stream: int, epoch: np.ndarray) -> np.ndarray:
    base = _mix(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(stream)
    return _mix(_mix(base) + np.asarray(epoch, dtype=np.uint64))


def _mix(value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64 bits without visible structure."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
