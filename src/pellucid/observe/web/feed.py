"""What the page asks of a run, answered from run.sqlite: the same answers live (server.py) and in a report (report.py).

`answer(feeds, path, query)` is the whole interface: JSON, or for numbers a binary window of one stream. Whatever the
zoom, a window's minimum, maximum and count of non-finite values are exact: they come from the store's rollups.
"""

from __future__ import annotations

import json
import threading
import time
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.config import UserError
from pellucid.observe.mounts import is_network
from pellucid.observe.reader import Reader
from pellucid.observe.rules import RULES, Rule
from pellucid.observe.store import BEFORE, FAN, FILE_NAME, LEVELS, RECORDER, ROLLUP_PARTS, SCHEMA_VERSION
from pellucid.observe.web.capsule import Plays, read_capsule
from pellucid.observe.web.preferences import preferences
from pellucid.observe.web.river import River
from pellucid.training.checkpoint import saved_steps
from pellucid.training.lock import is_trained

COLUMNS = 2048  # the most columns of a window
TEXTS = 40  # the most texts of the model listed
READ_BYTES = 200e6  # the most read for one window; beyond it a coarser rollup is taken
JSON_TYPE, BINARY_TYPE = "application/json", "application/octet-stream"


class Feed:
    """One run directory, alive or ended. Opens its telemetry when it appears; `problem` says why there is none yet."""

    def __init__(self, run_dir: str | Path):
        """Raises UserError if `run_dir` is not a run, or one of a newer version."""
        self.directory = Path(run_dir)
        if not self.directory.exists():
            raise UserError(f"{run_dir}: no such run directory")
        if not self.directory.is_dir() or not ({"config.toml", FILE_NAME} & {p.name for p in self.directory.iterdir()}):
            raise UserError(f"{run_dir}: not a run directory (it has neither config.toml nor {FILE_NAME})")
        self.problem: str | None = None
        self._reader: Reader | None = None
        self._file: tuple[int, int] | None = None  # which file the reader has open
        self._preferring = threading.Lock()
        self._preferences: tuple[int | None, dict] = (None, {})
        self.open()

    def open(self) -> Reader | None:
        """The reader; None while there is no telemetry, with the reason in `problem`. Raises UserError for a newer version.

        A file that was replaced (the run was begun anew) is opened anew.
        """
        path = self.directory / FILE_NAME
        try:
            found = path.stat()
        except OSError:
            self._close()
            gone = not self.directory.is_dir()
            self.problem = (f"{self.directory} is gone; what is shown here is the last that was read" if gone else
                            f"{self.directory} has no telemetry: the run has not begun its first step, or it was trained "
                            "with observe.enabled=false")  # fmt: skip
            return None
        if self._reader is not None and self._file == (found.st_dev, found.st_ino):
            return self._reader
        self._close()
        try:
            reader = Reader(self.directory)
        except UserError as error:  # half-written: the next look may find it whole
            self.problem = str(error)
            return None
        try:
            version, latest = reader.meta.get("schema_version"), reader.latest_step()
        except UserError as error:
            reader.close()
            self.problem = str(error)
            return None
        if version is not None and version > SCHEMA_VERSION:
            reader.close()
            raise UserError(f"{self.directory}: its telemetry has schema {version}, this Pellucid reads up to "
                            f"{SCHEMA_VERSION}; install a newer Pellucid to watch it")  # fmt: skip
        if latest is None:
            reader.close()
            self.problem = f"{self.directory}: no step is recorded yet; this page begins with the first one"
            return None
        self._reader, self._file, self.problem = reader, (found.st_dev, found.st_ino), None
        self.__dict__.pop("river", None)  # of the run that was here before
        self._preferences = (None, {})
        return self._reader

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = self._file = None

    @property
    def reader(self) -> Reader:
        reader = self.open()
        if reader is None:
            raise UserError(self.problem)
        return reader

    def pulse(self) -> dict[str, Any]:
        """What changes while a run trains: newest step and event, or the sentence why not. Costs two index look-ups.

        `files` changes when the run ends or a step is explained: then `describe` has more to say. `training`: see `is_trained`.
        """
        training = is_trained(self.directory)
        files = [self.finished, len(list((self.directory / "capsules").glob("step-*.safetensors")))]
        try:
            if self.open() is None:
                return {"step": None, "event": 0, "files": files, "training": training, "problem": self.problem}
            newest = self.reader.query("SELECT (SELECT max(step) FROM frame WHERE stream = 'run') AS step, "
                                       "(SELECT coalesce(max(id), 0) FROM event) AS event")[0]  # fmt: skip
        except UserError as error:
            return {"step": None, "event": 0, "files": files, "training": training, "problem": str(error)}
        return {**newest, "files": files, "training": training, "problem": None}

    @property
    def finished(self) -> bool:
        return (self.directory / "model" / "config.json").is_file()

    @property
    def looks_at_held_out(self) -> bool:
        """Whether it has held-out text, which a run that looks at it does before its first step."""
        reader = self.open()
        return reader is None or reader.latest_step("run") is None or reader.latest_step("evaluation") is not None

    @cached_property
    def river(self) -> River:
        return River(self.directory, self.manifest)

    @cached_property
    def plays(self) -> Plays:
        return Plays(self.directory)

    @property
    def config(self) -> dict[str, Any]:
        try:
            return tomllib.loads((self.directory / "config.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    @property
    def manifest(self) -> dict[str, Any]:
        try:
            return json.loads((self.directory / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def describe(self) -> dict[str, Any]:
        """Everything that names the axes of a run: streams with rows and statistics, settings, provenance."""
        facts = {"name": self.directory.resolve().name, "config": self.config, "manifest": self.manifest}
        facts |= {"finished": self.finished, "training": is_trained(self.directory)}
        facts["network"] = is_network(self.directory)
        try:
            return {**facts, **self._axes()}
        except UserError as error:  # one run that cannot be read leaves the others on the page
            return {**facts, "problem": str(error), "streams": {}, "capsules": [], "latest": None}

    def _axes(self) -> dict[str, Any]:
        reader = self.reader
        streams = {name: {**about, "rows": reader.rows(name), "stats": reader.stats(name)}
                   for name, about in reader.streams().items()}  # fmt: skip
        newest = reader.query(
            "SELECT max(step) AS step, max(time) AS time, min(time) AS began FROM frame WHERE stream = 'run'"
        )[0]
        return {"problem": None, "streams": streams, "meta": reader.meta, "latest": newest["step"],
                "age": time.time() - newest["time"], "began": newest["began"], "capsules": reader.capsules(),
                "histograms": reader.query("SELECT count(*) AS n FROM hist")[0]["n"]}  # fmt: skip

    # ------------------------------------------------------------------------------------------ numbers

    def window(
        self, stream: str, stat: str, since: int = BEFORE, until: int | None = None, span: int | None = None, newest: int | None = None
    ) -> bytes:
        """Steps since..until of one statistic (or '*': all) of a stream, as few columns as the screen needs.

        span: steps per column (1, 16, 256, 4096), to continue a window; by default chosen. newest: only so many recorded
        steps up to `until`; the 16 steps around `until`, where those near it were thinned out.
        Bytes: uint32 length of a JSON header, the header padded to a multiple of 8, int32 first step of each column,
        float32 [parts, columns, rows(, stats)]. parts: ["value"], or those of a rollup where a column holds `span` steps.
        """
        reader = self.reader
        about = reader.streams().get(stream)
        if about is None:
            raise UserError(f"{self.directory}: this run recorded no stream '{stream}'")
        latest = reader.latest_step(stream)
        column = slice(None) if stat == "*" else reader._index("stat", stream, stat)
        last = -1 if latest is None else min(latest, 2**62 if until is None else until)
        if span in [FAN**known for known in (0, *LEVELS)]:
            level = [FAN**known for known in (0, *LEVELS)].index(span)
        elif newest is not None:
            before = reader.query("SELECT max(step) AS step FROM frame WHERE stream = ? AND step <= ?", (stream, last))[0]["step"]
            level = int(self._thinned(about, last, last, latest) and (before is None or before < last - FAN))
            since = last // FAN * FAN if level else since
        else:
            level = self._level(about, since, last, latest)
        if level == 0:
            steps, frames = reader.frames(stream, since - 1, until, newest)
            parts, names = frames[None], ["value"]
        else:
            buckets, rolled = reader.rollup(stream, level, since // FAN**level - 1, None if until is None else until // FAN**level)
            steps, parts, names = buckets * FAN**level, rolled.swapaxes(0, 1), list(ROLLUP_PARTS)
        parts = parts[..., column]
        header = {"stream": stream, "stat": stat, "parts": names, "shape": list(parts.shape), "span": FAN**level,
                  "latest": latest}  # fmt: skip
        return pack(header, steps, parts)

    def _level(self, about: dict[str, Any], since: int, until: int, latest: int | None) -> int:
        """The finest level that fits the screen and the clock, and that saw every step of the window."""
        recorded = "SELECT count(*) AS n FROM frame WHERE stream = ? AND step >= ? AND step <= ?"
        frames = self.reader.query(recorded, (about["name"], since, until))[0]["n"]
        cells, thinned = about["rows"] * about["columns"], self._thinned(about, since, until, latest)
        for level in (0, *LEVELS):
            columns = (until - since + 1) / FAN**level if thinned else min(frames, (until - since + 1) / FAN**level)
            size = columns * cells * 4 * (len(ROLLUP_PARTS) if level else 1)
            if columns <= COLUMNS and (size <= READ_BYTES or columns <= 64) and not (thinned and level == 0):
                return level
        return LEVELS[-1]

    @staticmethod
    def _thinned(about: dict[str, Any], since: int, until: int, latest: int | None) -> bool:
        """Whether frames of these steps may have been left out of the file since they were recorded."""
        return latest is not None and about["keep_every"] > 1 and until > about["dense_steps"] and since < latest - RECORDER

    def histograms(self, row: int, kind: str) -> dict[str, Any]:
        """All exponent histograms of one tensor: what the weights' sizes were, step by step."""
        found = self.reader.query("SELECT * FROM hist WHERE row = ? AND kind = ? ORDER BY step", (row, kind))
        kept = found[:: max(1, len(found) // 400)]
        return {"kind": kind, "row": row, "recorded": len(found), "columns": [
            {**{key: h[key] for key in ("step", "zero", "subnormal", "nan", "inf", "first")},
             "counts": np.frombuffer(h["data"], "<u4").reshape(2, -1).tolist()} for h in kept]}  # fmt: skip

    # -------------------------------------------------------------------------------------------- facts

    def events(self) -> list[dict[str, Any]]:
        """What the rules said, and what was noted."""
        read = lambda detail: json.loads(detail) if detail else None
        return [{**event, "detail": read(event["detail"])} for event in self.reader.events()]

    def step(self, step: int) -> dict[str, Any]:
        """The documents of one step's batch with their losses, worst first, and the worst tokens in their text."""
        losses, worst = self.reader.document_losses(step), self.reader.worst_tokens(step)
        return self.river.step(step, losses, worst, self.config)

    def samples(self) -> dict[str, Any]:
        """Texts the model wrote, and rows kept with the loss of each token."""
        rows = self.reader.samples()
        kept = rows[:: max(1, len(rows) // 12)][-12:] if rows else []
        return {"texts": self._texts(), "rows": [self.river.sample(row) for row in kept]}

    def preferences(self) -> dict[str, Any]:
        """Tokens and nearest sibling of each expert, from the newest checkpoint, read once for each; or {problem}."""
        dataset = self.river.dataset
        if dataset is None:
            return {"problem": self.river.problem}
        newest = max(saved_steps(self.directory / "checkpoints"), default=None)
        with self._preferring:
            if self._preferences[0] != newest or newest is None:
                size = self.manifest.get("parameters", {}).get("total", 0)
                try:
                    self._preferences = newest, preferences(self.directory, dataset, self.river.token_text, size)
                except UserError as error:  # most runs have no checkpoint for a while
                    return {"problem": str(error)}
        return self._preferences[1]

    def _texts(self) -> list[dict[str, Any]]:
        """At most TEXTS of them, evenly over the run: the first and the last among them."""
        found = self.reader.query("SELECT step, subject AS prompt, text FROM event WHERE rule = 'text_sample' ORDER BY id")
        return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(TEXTS, len(found))).round().astype(int))]


def pack(header: dict[str, Any], steps: np.ndarray, parts: np.ndarray) -> bytes:
    head = json.dumps(header).encode()
    head += b" " * (-(len(head) + 4) % 8)
    return b"".join([np.uint32(len(head)).tobytes(), head, steps.astype("<i4").tobytes(), b"\0" * (-4 * len(steps) % 8),
                     np.ascontiguousarray(parts, dtype="<f4").tobytes()])  # fmt: skip


def answer(feeds: Sequence[Feed], path: str, query: dict[str, str]) -> tuple[bytes, str]:
    """(body, media type) of one question of the page. Raises UserError with the sentence to show."""
    feed = feeds[_number(query, "run", len(feeds))]
    try:
        if path == "runs":
            return _json([feed.describe() for feed in feeds])
        if path == "window":
            bounds = {name: int(query[name]) for name in ("since", "until", "span", "newest") if name in query}
            return feed.window(query["stream"], query["stat"], **bounds), BINARY_TYPE
        if path == "events":
            return _json(feed.events())
        if path == "rules":
            config, told, looks = feed.config, ("name", "severity", "cause", "remedy", "source"), feed.looks_at_held_out
            judging = lambda rule: {"steps": steps_to_judge(rule, config, looks), "never": never_judges(rule, config, looks)}
            return _json([{name: getattr(rule, name) for name in told} | judging(rule) for rule in RULES])
        if path == "step":
            return _json(feed.step(int(query["step"])))
        if path == "histograms":
            return _json(feed.histograms(int(query["row"]), query["kind"]))
        if path == "samples":
            return _json(feed.samples())
        if path == "capsule":
            return _json(read_capsule(feed.directory, int(query["step"])))
        if path == "preferences":
            return _json(feed.preferences())
        if path == "plays":
            return _json(feed.plays.list(feed.pulse()["step"]))
        if path == "play":
            return _json(feed.plays.read(int(query["step"])))
        if path == "river":
            return _json(feed.river.describe(feed.open()))
        if path == "document":
            return _json(feed.river.document(query["split"], int(query["index"]), feed.config, feed.pulse()["step"]))
    except (KeyError, ValueError) as error:
        raise UserError(f"/api/{path}: cannot read the question ({error})") from None
    raise UserError(f"/api/{path}: no such question")


def _number(query: dict[str, str], name: str, size: int) -> int:
    text = query.get(name, "0")
    if not text.isdecimal() or int(text) >= size:
        raise UserError(f"{name}={text}: there are {size} runs, counted from 0")
    return int(text)


def _json(value: Any) -> tuple[bytes, str]:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False).encode(), JSON_TYPE


def _plain(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers become the strings "nan", "inf" and "-inf", which the page shows as such."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, bytes):
        return None
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def steps_to_judge(rule: Rule, config: dict[str, Any], looks: bool) -> int | None:
    """How many steps of this run it takes; the first evaluation comes before them all. None: see `never_judges`."""
    warmup, every = config.get("schedule", {}).get("warmup_steps", 0), config.get("training", {}).get("evaluate_every")
    if never_judges(rule, config, looks):
        return None
    return max(rule.steps + warmup * rule.after_warmup, (rule.evaluations - 1) * (every or 0))


def never_judges(rule: Rule, config: dict[str, Any], looks: bool) -> str | None:
    """Why a rule cannot judge this run in any number of steps, in words; None: it can. looks: see `Feed.looks_at_held_out`."""
    if rule.evaluations and config.get("training", {}).get("evaluate_every") == 0:
        return "this run looks at held-out text at its end alone (training.evaluate_every is 0)"
    if rule.evaluations and not looks:
        return "this run holds no text out"
    optimizer = config.get("optimizer", {}).get("name")
    if rule.adam and optimizer not in (None, "adam", "adamw", "muon"):  # Muon's embedding, norms and routers are AdamW's
        return f"{optimizer} keeps no averages as Adam does"
    return None
