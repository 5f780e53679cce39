"""run.sqlite, the writing side: one float32 frame per stream and step, with axes that describe themselves.

A *stream* is a table that grows by one frame a step: rows (tensors, experts, layers, ...) by statistics. SQLite in WAL
mode is the whole technology: one file, crash-safe, read by others while it is written. Layout: docs/telemetry.md.
One background thread writes; the training thread hands over a closure and waits only if the step before is not yet in
the file, so a kill at any moment loses at most the last step.
"""

from __future__ import annotations

import json
import queue
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pellucid.config import UserError
from pellucid.observe.mounts import is_network

SCHEMA_VERSION = 1
FILE_NAME = "run.sqlite"
BEFORE = -1  # the step of what was measured before training
FAN = 16  # a rollup bucket of level n covers FAN**n steps
LEVELS = (1, 2, 3)
RECORDER = 512  # the newest frames of a thinned stream, all kept: the flight recorder
MISSING_BITS = 0x7FC0FFEE  # a quiet NaN with a payload of its own: "not measured". Any other NaN was measured.
MISSING = np.array([MISSING_BITS], dtype="<u4").view("<f4")[0]

TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS stream (name TEXT PRIMARY KEY, rows INTEGER, columns INTEGER, row_is TEXT, about TEXT,
  dense_steps INTEGER, keep_every INTEGER);
CREATE TABLE IF NOT EXISTS row (stream TEXT, id INTEGER, name TEXT, layer INTEGER, expert INTEGER, role TEXT, shape TEXT,
  numel INTEGER, dtype TEXT, PRIMARY KEY (stream, id));
CREATE TABLE IF NOT EXISTS stat (stream TEXT, id INTEGER, name TEXT, unit TEXT, scale TEXT, low REAL, high REAL,
  meaning TEXT, formula TEXT, healthy TEXT, source TEXT, PRIMARY KEY (stream, id));
CREATE TABLE IF NOT EXISTS frame (id INTEGER PRIMARY KEY, stream TEXT, step INTEGER, time REAL, data BLOB,
  UNIQUE (stream, step));
CREATE TABLE IF NOT EXISTS rollup (stream TEXT, level INTEGER, bucket INTEGER, data BLOB,
  PRIMARY KEY (stream, level, bucket));
CREATE TABLE IF NOT EXISTS hist (id INTEGER PRIMARY KEY, step INTEGER, row INTEGER, kind TEXT, zero INTEGER,
  subnormal INTEGER, nan INTEGER, inf INTEGER, first INTEGER, data BLOB, UNIQUE (step, row, kind));
CREATE TABLE IF NOT EXISTS event (id INTEGER PRIMARY KEY, step INTEGER, time REAL, rule TEXT, severity TEXT, subject TEXT,
  value REAL, threshold REAL, text TEXT, detail TEXT);
CREATE INDEX IF NOT EXISTS alarm ON event (step) WHERE severity = 'alarm';
CREATE TABLE IF NOT EXISTS document_loss (step INTEGER, row INTEGER, segment INTEGER, tokens INTEGER, loss REAL,
  worst REAL, PRIMARY KEY (step, row, segment));
CREATE TABLE IF NOT EXISTS worst_token (step INTEGER, rank INTEGER, row INTEGER, position INTEGER, input INTEGER,
  target INTEGER, loss REAL, PRIMARY KEY (step, rank));
CREATE TABLE IF NOT EXISTS sample (id INTEGER PRIMARY KEY, step INTEGER, row INTEGER, sample_id INTEGER, tokens BLOB,
  targets BLOB, losses BLOB);
CREATE TABLE IF NOT EXISTS stage (id INTEGER PRIMARY KEY, name TEXT, documents_in INTEGER, documents_out INTEGER,
  bytes_in INTEGER, bytes_out INTEGER, tokens_in INTEGER, tokens_out INTEGER, detail TEXT);
"""
_DIGIT = "instr('123456789ABCDEF', substr(h, {0}, 1))"  # SQLite has no float32 reader, so one is spelt out in SQL
_BITS = " | ".join(
    f"({_DIGIT.format(at)} << {shift})" for at, shift in zip((7, 8, 5, 6, 3, 4, 1, 2), range(28, -1, -4), strict=True)
)
VIEWS = f"""
CREATE VIEW IF NOT EXISTS tensor AS
SELECT id, name, layer, expert, role, shape, numel, dtype FROM row WHERE stream = 'param';
CREATE VIEW IF NOT EXISTS value AS
SELECT stream, step, row, layer, expert, role, stat,
  CASE WHEN e = 255 THEN NULL ELSE
    (CASE WHEN bits >= 0x80000000 THEN -1.0 ELSE 1.0 END) * ((bits & 0x7FFFFF) + (CASE WHEN e > 0 THEN 0x800000 ELSE 0 END))
    * (1 << min(max(p, 0), 60)) * (1 << min(max(p - 60, 0), 60))
    / (1 << min(max(-p, 0), 60)) / (1 << min(max(-p - 60, 0), 60)) / (1 << max(-p - 120, 0)) END AS value,
  CASE WHEN bits = {MISSING_BITS} THEN 'missing' WHEN e < 255 THEN 'finite' WHEN bits & 0x7FFFFF THEN 'nan'
    WHEN bits >= 0x80000000 THEN '-inf' ELSE '+inf' END AS state
FROM (SELECT *, (bits >> 23) & 255 AS e, max((bits >> 23) & 255, 1) - 150 AS p
FROM (SELECT *, {_BITS} AS bits
FROM (SELECT f.stream, f.step, r.name AS row, r.layer, r.expert, r.role, s.name AS stat,
  hex(substr(f.data, 1 + 4 * (r.id * t.columns + s.id), 4)) AS h
  FROM stream t JOIN row r ON r.stream = t.name JOIN stat s ON s.stream = t.name JOIN frame f ON f.stream = t.name)));
"""


@dataclass(frozen=True)
class Stat:
    """One column of a stream, with what a reader needs to draw and understand it."""

    name: str
    unit: str = ""
    scale: str = "linear"  # linear | log
    low: float | None = None  # domain of the colour scale
    high: float | None = None
    meaning: str = ""
    formula: str = ""
    healthy: str = ""
    source: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a stream: a tensor, an expert's slice of one, a layer, a position bucket, a data source, ..."""

    name: str
    layer: int | None = None
    expert: int | None = None
    role: str = ""
    shape: str = ""
    numel: int | None = None
    dtype: str = ""


@dataclass
class Record:
    """Everything of one step, written in one transaction."""

    step: int
    frames: dict[str, np.ndarray] = field(default_factory=dict)  # stream -> float32 [rows, columns]
    rows: list[tuple[str, list[tuple]]] = field(default_factory=list)  # (INSERT statement, parameters)
    events: list[dict] = field(default_factory=list)  # keys: columns of `event`; an alarm keeps its flight recorder


class Writer:
    """The one writer of a run's telemetry. Thread-safe; errors while writing never stop the training."""

    def __init__(self, run_dir: str | Path, *, meta: dict | None = None):
        """Open or create `run_dir/run.sqlite`."""
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.error: str | None = None
        self.resume_points: Collection[int] = ()  # steps that a resume may begin with: those of the checkpoints there are
        self.worked = 0.0  # seconds of processor time that the writer's thread has used
        self._queue: queue.Queue[Callable[[], Record] | None] = queue.Queue()
        self._wal = not is_network(self.path.parent)
        self._connection = _open(self.path, self._wal)
        self._streams: dict[str, tuple[int, int, int, int]] = {}  # rows, columns, dense_steps, keep_every
        self.set_meta({"schema_version": SCHEMA_VERSION, "journal": "wal" if self._wal else "delete", **(meta or {})})
        self._thread = threading.Thread(target=self._work, name="telemetry", daemon=True)
        self._thread.start()

    def define(
        self, stream: str, rows: Iterable[Row], stats: Iterable[Stat], *, row_is: str, about: str = "",
        dense_steps: int = 0, keep_every: int = 1,
    ) -> None:
        """Declare a stream's axes, before its first frame. After `dense_steps` only the first frame of every `keep_every` steps older
        than the flight recorder's 512 is kept (rollups see them all), and those that an alarm or a resume needs.
        Raises UserError if a resumed run differs."""
        self.flush()
        rows, stats = list(rows), list(stats)
        known = [r[0] for r in self._connection.execute("SELECT name FROM row WHERE stream = ? ORDER BY id", (stream,))]
        if known and known != [row.name for row in rows]:
            raise UserError(f"{self.path}: '{stream}' was recorded of another model, data or version; use a new run directory")
        known = [r[0] for r in self._connection.execute("SELECT name FROM stat WHERE stream = ? ORDER BY id", (stream,))]
        if known and known != [stat.name for stat in stats]:
            raise UserError(f"{self.path}: stream '{stream}' was recorded by another version; use a new run directory")
        with self._transaction() as connection:
            sizes = (len(rows), len(stats), row_is, about, dense_steps, keep_every)
            connection.execute("INSERT OR REPLACE INTO stream VALUES (?, ?, ?, ?, ?, ?, ?)", (stream, *sizes))
            connection.executemany("INSERT OR REPLACE INTO row VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [
                (stream, i, r.name, r.layer, r.expert, r.role, r.shape, r.numel, r.dtype) for i, r in enumerate(rows)])
            connection.executemany("INSERT OR REPLACE INTO stat VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [
                (stream, i, s.name, s.unit, s.scale, s.low, s.high, s.meaning, s.formula, s.healthy, s.source)
                for i, s in enumerate(stats)])
        self._streams[stream] = (len(rows), len(stats), dense_steps, keep_every)

    def set_meta(self, values: dict) -> None:
        """Values are stored as JSON."""
        self.flush()
        with self._transaction() as connection:
            pairs = [(key, json.dumps(value)) for key, value in values.items()]
            connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", pairs)

    def insert(self, statement: str, rows: list[tuple]) -> None:
        """Rows that belong to no step (the stages of the data, for example)."""
        self.flush()
        with self._transaction() as connection:
            connection.executemany(statement, rows)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._connection as connection:
                yield connection
        except sqlite3.Error as error:
            raise UserError(_sentence(self.path, error)) from None

    def submit(self, make: Callable[[], Record]) -> None:
        """Hand over one step. `make` runs on the writer's thread (it may wait for the device, divide, judge).

        Waits until the record before is in the file (on local disks), so that at most one step can be lost.
        """
        if self._wal:
            self._queue.join()
        self._queue.put(make)

    def write(self, record: Record) -> None:
        self.submit(lambda: record)

    def flush(self) -> None:
        """Return when everything handed over is in the file."""
        self._queue.join()

    def close(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            self._connection.close()

    def delete_after(self, step: int) -> None:
        """Forget everything recorded after `step`: a resumed run records it again.

        The rollup bucket that this cuts is then made of the frames still there: all, if `step + 1` was a resume point.
        """
        self.flush()
        with self._connection as connection:
            for table in ("frame", "hist", "event", "document_loss", "worst_token", "sample"):
                connection.execute(f"DELETE FROM {table} WHERE step > ?", (step,))
            for level in LEVELS:  # buckets that are not complete without the deleted steps
                connection.execute(
                    "DELETE FROM rollup WHERE level = ? AND (bucket + 1) * ? > ?", (level, FAN**level, step + 1))

    # ------------------------------------------------------------------------------ on the writer's thread

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            if not self._wal:  # each commit costs three syncs over the network: gather a second's worth
                time.sleep(1.0 if batch[0] is not None else 0)
            while not self._queue.empty():
                batch.append(self._queue.get())
            try:
                with self._connection:
                    for make in batch:
                        if make is not None and self.error is None:
                            self._store(make())
            except Exception as error:
                self.error = f"{type(error).__name__}: {error}"
                print(f"telemetry stopped, training goes on: {self.path}: {self.error}", file=sys.stderr)
            self.worked = time.thread_time()
            for _ in batch:
                self._queue.task_done()
            if None in batch:
                return

    def _store(self, record: Record) -> None:
        run = self._connection
        now = time.time()
        for stream, data in record.frames.items():
            rows, columns, dense_steps, keep_every = self._streams[stream]
            if data.shape != (rows, columns) or data.dtype != np.float32:
                raise ValueError(f"frame of '{stream}' is {data.dtype} {data.shape}, expected float32 {(rows, columns)}")
            run.execute("INSERT OR REPLACE INTO frame (stream, step, time, data) VALUES (?, ?, ?, ?)",
                        (stream, record.step, now, data.tobytes()))
            query = "SELECT max(step) FROM frame WHERE stream = ? AND step < ?"
            (before,) = run.execute(query, (stream, record.step)).fetchone()
            if before is None:
                continue
            self._roll(stream, before, record.step, rows, columns)
            for old in range(max(before - RECORDER, dense_steps) + 1, record.step - RECORDER + 1):
                if not self._is_first(old, keep_every) and not self._is_needed(old):
                    run.execute("DELETE FROM frame WHERE stream = ? AND step = ?", (stream, old))
        for statement, parameters in record.rows:
            run.executemany(statement, parameters)
        for event in record.events:
            event = {"time": now, "step": record.step, **event}
            names = ", ".join(event)
            run.execute(f"INSERT INTO event ({names}) VALUES ({', '.join('?' * len(event))})", list(event.values()))

    def _is_first(self, step: int, of: int) -> bool:
        """Whether some stream's first frame in this stretch of `of` steps is that of `step`: it is kept in all streams, for a step that
        is measured seldom is to be seen whole."""
        if step % of == 0:
            return True
        query = "SELECT 1 FROM stream WHERE keep_every = ? AND ? = (SELECT min(step) FROM frame WHERE stream = name AND step >= ?)"
        return self._connection.execute(query, (of, step, step - step % of)).fetchone() is not None

    def _is_needed(self, step: int) -> bool:
        """Whether an alarm came while `step` was in the flight recorder, or a resume would cut its rollup bucket."""
        if any(step // FAN == point // FAN and step < point for point in self.resume_points):
            return True
        query = "SELECT 1 FROM event WHERE severity = 'alarm' AND step >= ? AND step < ?"
        return self._connection.execute(query, (step, step + RECORDER)).fetchone() is not None

    def _roll(self, stream: str, before: int, step: int, rows: int, columns: int) -> None:
        """Close the buckets that end between the frame before and this one, reading them back: no state to lose.

        One that is closed already, from before a resume, stays: its frames may have been thinned out since.
        """
        for level in LEVELS:
            if before // FAN**level == step // FAN**level:
                return
            data = gather_rollup(self._connection, stream, level, before // FAN**level, rows, columns)
            self._connection.execute("INSERT OR IGNORE INTO rollup VALUES (?, ?, ?, ?)",
                                     (stream, level, before // FAN**level, data.tobytes()))


# ------------------------------------------------------------------------------------------------- rollups

ROLLUP_PARTS = ("min", "max", "mean", "last", "measured", "nonfinite")


def gather_rollup(
    run: sqlite3.Connection, stream: str, level: int, bucket: int, rows: int, columns: int
) -> np.ndarray | None:
    """One bucket, float32 [6, rows, columns] in the order of ROLLUP_PARTS, from the level below; None if it is empty."""
    if level == 1:
        query = "SELECT data FROM frame WHERE stream = ? AND step >= ? AND step < ? ORDER BY step"
        span = (stream, bucket * FAN, (bucket + 1) * FAN)
        blobs = [blob for (blob,) in run.execute(query, span)]
        return reduce_frames(stack(blobs, (rows, columns))) if blobs else None
    query = "SELECT data FROM rollup WHERE stream = ? AND level = ? AND bucket >= ? AND bucket < ? ORDER BY bucket"
    span = (stream, level - 1, bucket * FAN, (bucket + 1) * FAN)
    blobs = [blob for (blob,) in run.execute(query, span)]
    return reduce_rollups(stack(blobs, (len(ROLLUP_PARTS), rows, columns))) if blobs else None


def reduce_frames(frames: np.ndarray) -> np.ndarray:
    """[n, rows, columns] -> [6, rows, columns]. min, max and mean are of finite values; non-finite ones are counted."""
    bits = frames.view("<u4")
    finite = np.isfinite(frames)
    measured = (bits != MISSING_BITS).sum(0)
    number = finite.sum(0)
    low = np.where(finite, frames, np.inf).min(0)
    high = np.where(finite, frames, -np.inf).max(0)
    total = np.where(finite, frames, 0).sum(0, dtype=np.float64)
    return _parts(low, high, total, number, frames[-1], measured, measured - number)


def reduce_rollups(parts: np.ndarray) -> np.ndarray:
    """[n, 6, rows, columns] -> [6, rows, columns]; min, max and counts stay exact at every level."""
    low, high, mean, last, measured, nonfinite = (parts[:, i] for i in range(6))
    number = (measured - nonfinite).astype(np.float64)
    known = number > 0
    low = np.where(known, low, np.inf).min(0)
    high = np.where(known, high, -np.inf).max(0)
    total = np.where(known, mean * number, 0).sum(0)
    return _parts(low, high, total, number.sum(0), last[-1], measured.sum(0), nonfinite.sum(0))


def _parts(low, high, total, number, last, measured, nonfinite) -> np.ndarray:
    none = number == 0
    mean = total / np.maximum(number, 1)
    out = np.stack([low, high, mean, last, measured, nonfinite]).astype("<f4")
    out[:3, none] = MISSING
    out[3] = last  # assigned without arithmetic: it keeps the payload of MISSING
    return out


def stack(blobs: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(b"".join(blobs), dtype="<f4").reshape(len(blobs), *shape)


# ------------------------------------------------------------------------------------------------- opening


def _open(path: Path, wal: bool) -> sqlite3.Connection:
    try:
        run = sqlite3.connect(path, timeout=30, check_same_thread=False)
        run.execute("PRAGMA page_size = 16384")
        run.execute(f"PRAGMA journal_mode = {'WAL' if wal else 'DELETE'}")
        run.execute("PRAGMA synchronous = NORMAL")
        run.executescript(TABLES + VIEWS)
        if not run.execute("SELECT 1 FROM pragma_table_info('stage') WHERE name = 'tokens_in'").fetchone():
            run.execute("ALTER TABLE stage ADD COLUMN tokens_in INTEGER")  # a file from before there was this column
        found = run.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    except sqlite3.Error as error:
        raise UserError(_sentence(path, error)) from None
    if found and json.loads(found[0]) != SCHEMA_VERSION:
        expected = f"schema {found[0]}, expected {SCHEMA_VERSION}"
        raise UserError(f"{path}: written by another version ({expected}); use a new run directory")
    return run


def _sentence(path: Path, error: sqlite3.Error) -> str:
    free = shutil.disk_usage(path.parent).free
    if "full" in str(error) or (free < 1 << 20 and "I/O" in str(error)):
        return f"{path}: the disk is full; free some space, or choose another --run-dir"
    return f"{path}: cannot be used as a telemetry file ({error}); move it away or use a new run directory"
