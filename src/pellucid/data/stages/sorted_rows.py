"""Sorting more rows than fit in memory: sorted runs on disk, merged block by block.

Deduplication is grouping, and grouping is sorting: rows with the same key come out next to each other. Rows are
uint64 columns in lexicographic order. The order in which rows were added leaves no trace in what comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

MEMORY_ROWS = 1 << 18
LEAST = 256  # rows of a run that are read at once
MOST_RUNS = MEMORY_ROWS // LEAST  # that are read side by side; then they become one


class SortedRows:
    """Add rows in any order, then iterate: all of them, sorted, as arrays [n, columns].

    Uses about 3 * memory_rows rows of memory, however many there are, and, in `folder`, files of the size of all rows.
    """

    def __init__(self, folder: Path, name: str, columns: int, memory_rows: int = MEMORY_ROWS):
        self.folder, self.name, self.columns, self.memory_rows = folder, name, columns, memory_rows
        self.runs: list[tuple[Path, int]] = []
        self.rows = 0
        self._buffer = np.empty((memory_rows, columns), np.uint64)
        self._used = self._fresh = self._written = 0  # rows in the buffer; runs not merged yet; files made

    def add(self, *columns: np.ndarray | int) -> None:
        """Append rows given column by column; a number stands for a column of it."""
        shape = np.broadcast_shapes(*(np.shape(column) for column in columns), (1,))[0]
        done = 0
        while done < shape:
            if self._used == self.memory_rows:
                self._spill()
            take = min(shape - done, self.memory_rows - self._used)
            part = self._buffer[self._used : self._used + take]
            for number, column in enumerate(columns):
                part[:, number] = column[done : done + take] if np.ndim(column) else column
            self._used, done = self._used + take, done + take
        self.rows += shape

    def __iter__(self) -> Iterator[np.ndarray]:
        if not self.runs:
            if self._used:
                yield sort_rows(self._buffer[: self._used])
            return
        if self._used:
            self._spill()
        yield from self._merge(self.runs)

    def remove(self) -> None:
        """Delete the files and let go of the memory."""
        for path, _ in self.runs:
            path.unlink()
        self.runs, self._used, self._buffer = [], 0, np.empty((0, self.columns), np.uint64)

    def _spill(self) -> None:
        """The buffer becomes a run, and MOST_RUNS of them become one."""
        self._write([sort_rows(self._buffer[: self._used])])
        self._used, self._fresh = 0, self._fresh + 1
        if self._fresh == MOST_RUNS:
            whole, parts = self.runs[: -self._fresh], self.runs[-self._fresh :]
            self.runs, self._fresh = whole, 0
            self._write(self._merge(parts))
            for path, _ in parts:
                path.unlink()

    def _write(self, chunks: Iterable[np.ndarray]) -> None:
        path, rows = self.folder / f"{self.name}-{self._written:05d}.rows", 0
        self._written += 1
        with open(path, "wb") as file:
            for chunk in chunks:
                chunk.tofile(file)
                rows += len(chunk)
        self.runs.append((path, rows))

    def _merge(self, parts: list[tuple[Path, int]]) -> Iterator[np.ndarray]:
        """All rows up to the smallest of the blocks' last rows are complete: sort and give them, then read on."""
        block = max(LEAST, self.memory_rows // len(parts))
        runs = [_Run(path, rows, self.columns, block) for path, rows in parts]
        while runs := [run for run in runs if run.fill()]:
            pivot = min(tuple(run.block[-1].tolist()) for run in runs)
            yield sort_rows(np.concatenate([run.take(pivot) for run in runs]))


class InTurn:
    """Sorted rows, handed out as far as they are asked for."""

    def __init__(self, chunks: Iterable[np.ndarray], columns: int):
        self._chunks, self._pending = iter(chunks), np.empty((0, columns), np.uint64)

    def until(self, end: int) -> np.ndarray:
        """The rows not given yet whose first column is below `end`, [n, columns]."""
        parts = []
        while True:
            count = int(np.searchsorted(self._pending[:, 0], np.uint64(end)))
            parts.append(self._pending[:count])
            self._pending = self._pending[count:]
            if len(self._pending) or (rows := next(self._chunks, None)) is None:
                return np.concatenate(parts) if len(parts) > 1 else parts[0]
            self._pending = rows


class _Run:
    def __init__(self, path: Path, rows: int, columns: int, size: int):
        self.path, self.rows, self.columns, self.size = path, rows, columns, size
        self.read = 0
        self.block = np.empty((0, columns), np.uint64)

    def fill(self) -> bool:
        """Have a block, unless the run is at its end."""
        if not len(self.block) and self.read < self.rows:
            take = min(self.size, self.rows - self.read)
            offset = self.read * self.columns * 8
            self.block = np.fromfile(self.path, np.uint64, take * self.columns, offset=offset).reshape(take, self.columns)
            self.read += take
        return len(self.block) > 0

    def take(self, pivot: tuple[int, ...]) -> np.ndarray:
        """Remove and return the block's rows that are not greater than the pivot row."""
        greater = np.zeros(len(self.block), bool)
        equal = np.ones(len(self.block), bool)
        for column, value in zip(self.block.T, pivot, strict=True):
            greater |= equal & (column > np.uint64(value))
            equal &= column == np.uint64(value)
        count = len(self.block) - int(np.count_nonzero(greater))
        taken, self.block = self.block[:count], self.block[count:]
        return taken


def sort_rows(rows: np.ndarray) -> np.ndarray:
    """Rows in lexicographic order, the first column weighing most."""
    return rows[np.lexsort(rows.T[::-1])]


def distinct(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Sorted rows, each once."""
    last: np.ndarray | None = None
    for rows in chunks:
        new = np.ones(len(rows), bool)
        new[1:] = (rows[1:] != rows[:-1]).any(axis=1)
        new[0] = last is None or bool((rows[0] != last).any())
        last = rows[-1].copy()
        if new.any():
            yield rows[new]


def with_group_heads(chunks: Iterable[np.ndarray], key_columns: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each sorted chunk: (rows, head), where head[i] is the first row of all that share row i's key.

    A group may reach over chunks; its head is carried along.
    """
    carried: np.ndarray | None = None
    for rows in chunks:
        keys = rows[:, :key_columns]
        starts = np.ones(len(rows), bool)
        starts[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        heads = rows[np.maximum.accumulate(np.where(starts, np.arange(len(rows)), 0))]
        if carried is not None and (keys[0] == carried[:key_columns]).all():
            continued = len(rows) if starts[1:].sum() == 0 else int(np.argmax(starts[1:])) + 1
            heads[:continued] = carried
        carried = heads[-1].copy()
        yield rows, heads
