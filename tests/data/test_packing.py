"""Packing: against the textbook rule written plainly, and every token in exactly one place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.data.packing import best_fit_decreasing, count_rows, make_plan


def plain_best_fit_decreasing(sizes, capacity):
    """Number of bins and their free spaces by the rule as it is usually told."""
    free = []
    for size in sorted(sizes, reverse=True):
        fitting = [n for n, space in enumerate(free) if space >= size]
        if fitting:
            free[min(fitting, key=lambda n: free[n])] -= size
        else:
            free.append(capacity - size)
    return sorted(free)


@given(st.integers(2, 40).flatmap(lambda T: st.tuples(st.just(T), st.lists(st.integers(1, T), max_size=60))))
def test_best_fit_decreasing_equals_the_plain_rule(case):
    capacity, sizes = case
    bins = best_fit_decreasing(np.array(sizes, dtype=np.int64), capacity)
    filled = np.bincount(bins, weights=sizes).astype(int) if sizes else np.array([], dtype=int)
    assert sorted((capacity - filled).tolist()) == plain_best_fit_decreasing(sizes, capacity)


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 2)), min_size=1, max_size=50), st.integers(2, 30),
       st.sampled_from(["best_fit", "concatenate"]))
def test_every_token_lies_in_exactly_one_place_and_no_row_overflows(documents, T, packing):
    lengths = np.array([length for length, _ in documents])
    sources = np.array([source for _, source in documents])
    plan = make_plan(lengths, sources, 3, T, packing)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    row_source = np.repeat(np.arange(3), plan.source_rows)
    for row in range(plan.rows):
        pieces = range(plan.row_first[row], plan.row_first[row + 1])
        assert 0 < sum(plan.length[p] for p in pieces) <= T
        for p in pieces:
            assert sources[plan.document[p]] == row_source[row]
            seen[plan.document[p]][plan.start[p] : plan.start[p] + plan.length[p]] += 1
            assert plan.start[p] + plan.length[p] <= lengths[plan.document[p]]
    assert all((count == 1).all() for count in seen)
    assert plan.tokens == lengths.sum()


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(2, 30))
def test_concatenate_fills_every_row_but_the_last(lengths, T):
    plan = make_plan(np.array(lengths), np.zeros(len(lengths), dtype=int), 1, T, "concatenate")
    assert plan.rows == -(-sum(lengths) // T)
    assert (np.add.reduceat(plan.length, plan.row_first[:-1])[:-1] == T).all()


def test_documents_are_cut_only_every_T_tokens():
    plan = make_plan(np.array([10, 3, 25]), np.zeros(3, dtype=int), 1, 8, "best_fit")
    pieces = sorted(zip(plan.document.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    assert pieces == [(0, 0, 8), (0, 8, 2), (1, 0, 3), (2, 0, 8), (2, 8, 8), (2, 16, 8), (2, 24, 1)]
    assert plan.rows == 5  # remainders 2 + 3 + 1 share one row


@pytest.mark.parametrize("T", [256, 1024, 4096])
def test_documents_of_real_sizes_use_almost_every_position(T):
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(6.5, 1.3, size=30_000)).astype(np.int64)  # like web text
    assert make_plan(lengths, np.zeros(len(lengths), dtype=int), 1, T, "best_fit").utilization > 0.995


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), max_size=60), st.integers(2, 12), st.integers(1, 9),
       st.sampled_from(["best_fit", "concatenate"]), st.sampled_from([None, "left", "right"]))
def test_rows_are_counted_in_parts_as_the_plan_makes_them(documents, T, size, packing, side):
    lengths, sources = np.array(documents, np.int64).reshape(-1, 2).T
    plan = make_plan(lengths, sources, 3, T, packing, side)
    parts = [(lengths[i : i + size], sources[i : i + size]) for i in range(0, len(lengths), size)]
    assert count_rows(parts, 3, T, packing, side) == (plan.rows, plan.utilization, plan.truncated)
