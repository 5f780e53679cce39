"""run.sqlite, the reading side: what the dashboard, `trace`, `explain`, exports and rules ask of a run.

Opens the file read-only and holds no transaction between calls, so a reader never delays the trainer.
Shapes: a frame is float32 [rows, columns]; the axes are `rows(stream)` and `stats(stream)`.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pellucid.config import UserError
from pellucid.observe.store import (
    BEFORE,
    FAN,
    FILE_NAME,
    MISSING_BITS,
    ROLLUP_PARTS,
    gather_rollup,
    reduce_frames,
    reduce_rollups,
    stack,
)


def is_missing(values: np.ndarray) -> np.ndarray:
    """Where a float32 array says "not measured", as opposed to a NaN that was measured."""
    return np.ascontiguousarray(values, dtype="<f4").view("<u4") == MISSING_BITS


def explain_error(path: Path, error: sqlite3.Error) -> str:
    """One sentence about telemetry that cannot be read now."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without its extension
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"{path}: the telemetry is busy ({error}); try again in a moment"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"{path}: the telemetry file is damaged ({error}); what the run learnt is in its checkpoints and model"
    return f"{path}: cannot be read ({error})"


def _with_nan(row: sqlite3.Row, *names: str) -> dict:
    """SQLite keeps a NaN as NULL; these columns have no other NULL."""
    return {**dict(row), **{name: math.nan for name in names if row[name] is None}}


class Reader:
    """Read-only view of a run, alive or ended. Safe to share between threads.

    Raises UserError, whatever is asked, where the file is damaged or locked for long."""

    def __init__(self, run_dir: str | Path):
        """`run_dir` is a run's folder or its run.sqlite. Raises UserError if there is none."""
        path = Path(run_dir)
        self.path = path / FILE_NAME if path.is_dir() else path
        if not self.path.is_file():
            raise UserError(f"{run_dir}: no {FILE_NAME} here; give a run's folder (trained with observe.enabled)")
        self._lock = threading.Lock()
        self._run = self._connect()

    def _connect(self) -> sqlite3.Connection:
        """mode=ro; where the folder is read-only, immutable; where a kill left a rollback journal, let SQLite roll back."""
        problem: Exception | None = None
        quoted = self.path.resolve().as_uri()
        for address in (f"{quoted}?mode=ro", f"{quoted}?mode=rw", f"{quoted}?immutable=1"):
            try:
                run = sqlite3.connect(address, uri=True, timeout=10, check_same_thread=False)
                run.row_factory = sqlite3.Row
                run.execute("SELECT count(*) FROM stream").fetchone()
                return run
            except sqlite3.Error as error:
                problem = error
        raise UserError(f"{self.path}: cannot be read as telemetry ({problem})")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One reader at a time; what SQLite cannot do becomes one sentence."""
        with self._lock:
            try:
                yield self._run
            except sqlite3.Error as error:
                raise UserError(explain_error(self.path, error)) from None

    def _all(self, query: str, parameters: tuple = ()) -> list[sqlite3.Row]:
        with self._reading() as run:
            return run.execute(query, parameters).fetchall()

    def _shape(self, stream: str) -> tuple[int, int]:
        found = self._all("SELECT rows, columns FROM stream WHERE name = ?", (stream,))
        if not found:
            raise UserError(f"{self.path}: no stream '{stream}'; it has: {', '.join(sorted(self.streams()))}")
        return found[0]["rows"], found[0]["columns"]

    # ------------------------------------------------------------------------------------------- axes

    @property
    def meta(self) -> dict:
        return {row["key"]: json.loads(row["value"]) for row in self._all("SELECT key, value FROM meta")}

    def streams(self) -> dict[str, dict]:
        """name -> {rows, columns, row_is, about, dense_steps, keep_every}."""
        return {row["name"]: dict(row) for row in self._all("SELECT * FROM stream")}

    def rows(self, stream: str) -> list[dict]:
        return [dict(row) for row in self._all("SELECT * FROM row WHERE stream = ? ORDER BY id", (stream,))]

    def stats(self, stream: str) -> list[dict]:
        return [dict(row) for row in self._all("SELECT * FROM stat WHERE stream = ? ORDER BY id", (stream,))]

    def latest_step(self, stream: str = "run") -> int | None:
        return self._all("SELECT max(step) AS step FROM frame WHERE stream = ?", (stream,))[0]["step"]

    # ----------------------------------------------------------------------------------------- numbers

    def frames(
        self, stream: str, since: int = BEFORE - 1, until: int | None = None, newest: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Steps int64 [n] and frames float32 [n, rows, columns] with since < step <= until, or the `newest` of them, oldest first."""
        query = "SELECT step, data FROM frame WHERE stream = ? AND step > ? AND step <= ? ORDER BY step DESC LIMIT ?"
        shape = self._shape(stream)
        found = self._all(query, (stream, since, 2**62 if until is None else until, -1 if newest is None else newest))[::-1]
        return np.array([f["step"] for f in found], dtype=np.int64), stack([f["data"] for f in found], shape)

    def series(self, row: str | int, stat: str, stream: str = "param", since: int = BEFORE - 1) -> tuple[np.ndarray, np.ndarray]:
        """Steps int64 [n] and values float32 [n] of one cell: reads four bytes a frame."""
        at = 1 + 4 * (self._index("row", stream, row) * self._shape(stream)[1] + self._index("stat", stream, stat))
        query = f"SELECT step, substr(data, {at}, 4) AS cell FROM frame WHERE stream = ? AND step > ? ORDER BY step"
        found = self._all(query, (stream, since))
        steps = np.array([f["step"] for f in found], dtype=np.int64)
        return steps, np.frombuffer(b"".join(f["cell"] for f in found), dtype="<f4")

    def _index(self, axis: str, stream: str, name: str | int) -> int:
        if isinstance(name, int):
            return name
        found = self._all(f"SELECT id FROM {axis} WHERE stream = ? AND name = ?", (stream, name))
        if not found:
            raise UserError(f"{self.path}: stream '{stream}' has no {axis} '{name}'")
        return found[0]["id"]

    def rollup(
        self, stream: str, level: int, since: int = BEFORE - 1, until: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bucket numbers int64 [n] and float32 [n, 6, rows, columns] (min, max, mean, last, measured, nonfinite).

        Bucket b of level l covers steps b*16^l to (b+1)*16^l - 1 (-1: before training); level 0 is the frames themselves.
        The bucket still open is there too, computed from what is below. Only buckets > `since` and <= `until` are read.
        """
        rows, columns = self._shape(stream)
        if level == 0:
            steps, frames = self.frames(stream, since, until)
            parts = [reduce_frames(frame[None]) for frame in frames]
            return steps, np.stack(parts) if parts else np.empty((0, len(ROLLUP_PARTS), rows, columns), np.float32)
        until = 2**62 if until is None else until
        query = "SELECT bucket, data FROM rollup WHERE stream = ? AND level = ? AND bucket > ? AND bucket <= ? ORDER BY bucket"
        found = self._all(query, (stream, level, since, until))
        buckets = [f["bucket"] for f in found]
        parts = stack([f["data"] for f in found], (len(ROLLUP_PARTS), rows, columns))
        newest = self.latest_step(stream)
        if newest is not None and until >= newest // FAN**level > max([since, *buckets]):
            part = self._open_bucket(stream, level, newest, rows, columns)
            buckets, parts = [*buckets, newest // FAN**level], np.concatenate([parts, part[None]])
        return np.array(buckets, dtype=np.int64), parts

    def _open_bucket(self, stream: str, level: int, newest: int, rows: int, columns: int) -> np.ndarray:
        """The bucket of `newest`: what is closed below it, and the open bucket below it (after a resume there may be none)."""
        query = "SELECT 1 FROM rollup WHERE stream = ? AND level = ? AND bucket = ?"
        with self._reading() as run:
            run.execute("BEGIN")  # both answers from one state of the file
            try:
                closed = gather_rollup(run, stream, level, newest // FAN**level, rows, columns)
                complete = run.execute(query, (stream, level - 1, newest // FAN ** (level - 1))).fetchone() is not None
            finally:
                run.rollback()
        if level == 1 or complete:
            return closed
        below = self._open_bucket(stream, level - 1, newest, rows, columns)
        return below if closed is None else reduce_rollups(np.stack([closed, below]))

    # ------------------------------------------------------------------------------------------- facts

    def events(self, since_id: int = 0) -> list[dict]:
        return [dict(row) for row in self._all("SELECT * FROM event WHERE id > ? ORDER BY id", (since_id,))]

    def histogram(self, row: str | int, kind: str, step: int | None = None) -> dict | None:
        """Newest exponent histogram (at or before `step`) of a `param` row; kind is weight, gradient or update.

        `data` becomes uint32 [2, n]: counts of positive and negative values with IEEE exponent first .. first+n-1.
        """
        query = "SELECT * FROM hist WHERE row = ? AND kind = ? AND step <= ? ORDER BY step DESC LIMIT 1"
        found = self._all(query, (self._index("row", "param", row), kind, 2**62 if step is None else step))
        return {**dict(found[0]), "data": np.frombuffer(found[0]["data"], "<u4").reshape(2, -1)} if found else None

    def document_losses(self, step: int) -> list[dict]:
        """Document pieces of a step, the worst first: those whose loss is no number."""
        query = "SELECT * FROM document_loss WHERE step = ? ORDER BY loss IS NOT NULL, loss DESC"
        return [_with_nan(row, "loss", "worst") for row in self._all(query, (step,))]

    def worst_tokens(self, step: int) -> list[dict]:
        query = "SELECT * FROM worst_token WHERE step = ? ORDER BY rank"
        return [_with_nan(row, "loss") for row in self._all(query, (step,))]

    def samples(self, since: int = -1) -> list[dict]:
        """Rows kept with the loss of each token: tokens and targets int32 [T], losses float32 [T]."""
        kinds = {"tokens": "<i4", "targets": "<i4", "losses": "<f4"}
        found = self._all("SELECT * FROM sample WHERE step > ? ORDER BY step", (since,))
        return [{**dict(row), **{k: np.frombuffer(row[k], kind) for k, kind in kinds.items()}} for row in found]

    def stages(self) -> list[dict]:
        """The data river: what each stage of preparation took in and gave out (see data/river.py)."""
        return [{"tokens_in": None, **dict(r), "detail": json.loads(r["detail"])} for r in self._all("SELECT * FROM stage ORDER BY id")]

    def capsules(self) -> list[dict]:
        """Replayed steps whose tensors were kept by `explain`: {step, file}."""
        files = (self.path.parent / "capsules").glob("step-*.safetensors")
        found = [{"step": int(f.stem.removeprefix("step-")), "file": str(f)} for f in files]
        return sorted(found, key=lambda capsule: capsule["step"])

    def query(self, sql: str, parameters: tuple = ()) -> list[dict]:
        """Any SELECT of your own."""
        return [dict(row) for row in self._all(sql, parameters)]

    def close(self) -> None:
        self._run.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
