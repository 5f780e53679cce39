"""Sorting on disk and components, against numpy's sort of everything and a textbook union-find."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.data.stages import sorted_rows
from pellucid.data.stages.components import components
from pellucid.data.stages.sorted_rows import InTurn, SortedRows, distinct, sort_rows, with_group_heads

ROW = st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))
ROWS = st.lists(ROW, max_size=120)


@given(rows=ROWS, memory=st.integers(1, 40), block=st.integers(1, 50))
@settings(deadline=None, max_examples=60)
def test_rows_come_out_sorted_whatever_the_memory(tmp_path_factory, rows, memory, block):
    folder = tmp_path_factory.mktemp("rows")
    table = np.array(rows, np.uint64).reshape(-1, 3)
    sorter = SortedRows(folder, "x", 3, memory)
    for start in range(0, len(table), block):
        sorter.add(*table[start : start + block].T)
    chunks = list(sorter)
    assert np.array_equal(np.concatenate([table[:0], *chunks]), np.array(sorted(rows), np.uint64).reshape(-1, 3))
    sorter.remove()
    assert not list(folder.iterdir())


def test_blocks_are_merged_when_runs_are_longer_than_a_block(tmp_path):
    random = np.random.default_rng(0)
    table = random.integers(0, 300, (5000, 2), np.uint64)  # many equal keys, over chunk borders
    sorter = SortedRows(tmp_path, "x", 2, memory_rows=600)
    sorter.add(*table.T)
    chunks = list(sorter)
    assert len(sorter.runs) == 9 and len(chunks) > 9
    assert np.array_equal(np.concatenate(chunks), sort_rows(table))
    first = {}
    for key, value in sort_rows(table).tolist():
        first.setdefault(key, value)
    for rows, heads in with_group_heads(iter(sorter), 1):
        assert (rows[:, 0] == heads[:, 0]).all()
        assert heads[:, 1].tolist() == [first[key] for key in rows[:, 0].tolist()]


def test_runs_become_one_when_they_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(sorted_rows, "MOST_RUNS", 4)
    table = np.random.default_rng(1).integers(0, 300, (1003, 2), np.uint64)
    sorter = SortedRows(tmp_path, "x", 2, memory_rows=10)
    sorter.add(*table.T)
    assert np.array_equal(np.concatenate(list(sorter)), sort_rows(table))
    assert [rows for _, rows in sorter.runs] == [40] * 25 + [3]
    assert len(list(tmp_path.iterdir())) == len(sorter.runs)
    sorter.remove()
    assert not list(tmp_path.iterdir())


@given(rows=st.lists(st.integers(0, 20), max_size=40), ends=st.lists(st.integers(0, 22), max_size=8), block=st.integers(1, 9))
@settings(deadline=None)
def test_rows_are_handed_out_in_turn_and_once(rows, ends, block):
    table = np.array(sorted(rows), np.uint64).reshape(-1, 1)
    chunks = [table[i : i + block] for i in range(0, len(table), block)]
    in_turn, before = InTurn(chunks, 1), 0
    for end in sorted(ends):
        assert in_turn.until(end)[:, 0].tolist() == [row for row in sorted(rows) if before <= row < end]
        before = max(before, end)
    assert [row for chunk in distinct(chunks) for row in chunk[:, 0].tolist()] == sorted(set(rows))


def test_a_number_stands_for_a_column(tmp_path):
    sorter = SortedRows(tmp_path, "x", 2)
    sorter.add(np.array([3, 1], np.uint64), 7)
    sorter.add(2, 8)
    assert np.concatenate(list(sorter)).tolist() == [[1, 7], [2, 8], [3, 7]]


def union_find(count: int, edges: list[tuple[int, int]]) -> list[int]:
    parent = list(range(count))

    def find(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    for a, b in edges:
        a, b = sorted((find(a), find(b)))
        parent[b] = a
    return [find(node) for node in range(count)]


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60), st.integers(1, 9), st.integers(3, 99), st.randoms())
@settings(deadline=None)
def test_components_are_those_of_union_find_in_any_order_and_blocks(tmp_path_factory, edges, block, memory, random):
    label = union_find(40, edges)
    joined = {node for pair in edges for node in pair if pair[0] != pair[1]}
    shuffled = [pair[:: random.choice((1, -1))] for pair in edges]
    random.shuffle(shuffled)
    parts = [np.array(shuffled[i : i + block], np.uint64) for i in range(0, len(shuffled), block)]
    folder = tmp_path_factory.mktemp("rows")
    found = components(parts, folder, memory)
    assert {tuple(row) for chunk in found for row in chunk.tolist()} == {(node, label[node]) for node in joined}
    found.remove()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("order", ["along", "against", "mixed"])
def test_a_long_chain_is_one_component_after_few_sorts(tmp_path, monkeypatch, order):
    count, sorts = 20000, []
    edges = np.stack([np.arange(count - 1), np.arange(1, count)], axis=1).astype(np.uint64)
    if order != "along":
        edges = edges[::-1] if order == "against" else np.random.default_rng(0).permutation(edges)

    class Counted(SortedRows):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            sorts.append(self)

    monkeypatch.setattr("pellucid.data.stages.components.SortedRows", Counted)
    rows = np.concatenate(list(distinct(components(np.array_split(edges, 7), tmp_path))))
    assert rows[:, 0].tolist() == list(range(count)) and not rows[:, 1].any()
    assert len(sorts) <= 60
    assert max(made.rows for made in sorts) <= 2 * count
