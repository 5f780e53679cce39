"""What flows through picture 2: documents, and the stages that keep, change or drop them.

A stage is a pure function from a document to a document or to the reason why it was dropped; the list
of stages is all the pipeline there is. Filters, deduplication and augmentation are further stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from.

    `source` is the uri of its file, `source_index` the entry of `data.sources` (or `data.validation`) that named
    the file, `ordinal` its number within the file. `byte_start` and `byte_end` bound it in the decompressed file;
    for jsonl they bound its line, for parquet they are its row number and the next. `exact` says that those very
    bytes are the text. `split` is "train", "validation", or None while undecided. `changed_by` names the stages that
    changed its text, in order.
    """

    text: str
    source: str
    source_index: int
    ordinal: int
    byte_start: int
    byte_end: int
    exact: bool = False
    split: str | None = None
    label: str | None = None  # as labels.py writes it; None: plain text
    changed_by: str = ""

    def marked(self, before: Document, stage: str) -> Document:
        """What a stage made of `before`, with its name on it if it changed the text."""
        if self is before:
            return self
        return replace(self, changed_by=f"{before.changed_by}, {stage}" if before.changed_by else stage)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A stage's refusal; manifests count the reasons."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Input that gave no document: a short `reason` to count, and one sentence for the user."""

    reason: str
    message: str

    @property
    def message_for_options(self) -> str:
        """Where settings are given as options of the command."""
        return self.message.replace("data.label_field", "--label-field").replace("(set text_field)", "(set --text-field)")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of one source: how to name, open and read it.

    `path` is where it is on this machine, or its url, or the name of a Hugging Face dataset. `size` (bytes as
    stored; 0 if unknown) and `version` (time of change, or the storage's tag) are those seen when it was listed.
    """

    uri: str
    path: Path | str
    source_index: int
    text_field: str
    format: str
    compression: str
    named: bool  # the user wrote this very name (so it being empty is a mistake)
    split: str | None
    size: int = 0
    version: str = ""
    options: tuple[tuple[str, Any], ...] = ()  # for the storage's file system
    label_fields: tuple[str, ...] = ()  # where each document's label is; none: plain text
    label_type: str = "category"  # or "number"

    @property
    def remote(self) -> bool:
        return isinstance(self.path, str)


@dataclass(frozen=True, slots=True)
class Span:
    """Part of a file: from `start` to before `stop` (bytes; rows of tables); `ordinal`: lines or documents before."""

    start: int = 0
    stop: int | None = None
    ordinal: int = 0


WHOLE = Span()


def kind_of(value: Any) -> str:
    """What a value of a record is, in words: "an integer"."""
    known = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return "null" if value is None else known.get(type(value), f"a value of the type {type(value).__name__}")


def unreadable_field(where: str, field: str, present: list[str], setting: str = "text_field") -> Unreadable:
    """A record or table without the field that should hold its text (or its label)."""
    names = ", ".join(map(repr, present[:12])) or "none"
    return Unreadable("wrong field", f"{where}: no field '{field}'; the fields are {names} (set {setting})")


def repeated_column(file: SourceFile, present: list[str]) -> Unreadable | None:
    """What is wrong with a table of which two columns bear the name of the text's, or of a label's."""
    for name in (file.text_field, *file.label_fields):
        if (count := present.count(name)) > 1:
            return Unreadable("wrong field", f"{file.uri}: {count} columns are called '{name}'; rename all but one")
    return None


def half_surrogate(text: str, where: str) -> Unreadable | None:
    """What is wrong with a text that cannot be written in UTF-8, as JSON's escapes allow."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Unreadable("wrong encoding", f"{where} holds half of a surrogate pair (U+{ord(text[error.start]):04X})")
    return None


@dataclass
class Stage:
    """A named, versioned pure function, with what it was set to and what it has done so far."""

    name: str
    version: int
    settings: dict[str, Any]
    apply: Callable[[Document], Document | Dropped]
    record: StageRecord = field(default_factory=lambda: StageRecord())

    def __call__(self, document: Document) -> Document | Dropped:
        result = self.apply(document)
        self.record.add(document, result)
        return result if isinstance(result, Dropped) else result.marked(document, self.name)

    def describe(self) -> dict[str, Any]:
        """The manifest's entry for this stage."""
        return {"name": self.name, "version": self.version, "settings": self.settings, **self.record.as_dict()}


def utf8_size(text: str) -> int:
    """Bytes of the text in UTF-8; ASCII is known to be so without looking."""
    return len(text) if text.isascii() else len(text.encode())


@dataclass
class StageRecord:
    """Counts of what went in and came out, and the first few documents that were changed or dropped."""

    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, before: Document, after: Document | Dropped) -> None:
        size = utf8_size(before.text)
        self.documents_in += 1
        self.bytes_in += size
        if isinstance(after, Dropped):
            self.drop(after.reason)
            self._sample(before, None, after.reason)
            return
        changed = after.text != before.text
        self.documents_out += 1
        self.bytes_out += utf8_size(after.text) if changed else size
        if changed:
            self._sample(before, after.text, None)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def _sample(self, before: Document, after: str | None, reason: str | None, most: int = 3, width: int = 160) -> None:
        """Keep a window around the first difference, for at most `most` documents of each outcome."""
        if sum(sample["reason"] == reason for sample in self.samples) >= most:
            return
        start = 0
        if after is not None:
            same = (i for i, (a, b) in enumerate(zip(before.text, after, strict=False)) if a != b)
            start = max(0, next(same, min(len(before.text), len(after))) - width // 4)
        shown = None if after is None else after[start : start + width]
        self.samples.append({
            "source": before.source, "ordinal": before.ordinal, "reason": reason,
            "before": before.text[start : start + width], "after": shown,
        })

    def merge(self, other: dict[str, Any], most: int = 3) -> None:
        """Add what another record counted (its as_dict()), as if its documents had come after these."""
        for name in ("documents_in", "documents_out", "bytes_in", "bytes_out"):
            setattr(self, name, getattr(self, name) + other[name])
        for reason, count in other["dropped"].items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        for sample in other["samples"]:
            kind = "message" if "message" in sample else sample["reason"]
            if sum(("message" if "message" in old else old["reason"]) == kind for old in self.samples) < most:
                self.samples.append(sample)

    def as_dict(self) -> dict[str, Any]:
        return {
            "documents_in": self.documents_in, "documents_out": self.documents_out,
            "bytes_in": self.bytes_in, "bytes_out": self.bytes_out,
            "dropped": dict(sorted(self.dropped.items())), "samples": self.samples,
        }
