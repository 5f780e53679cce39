"""Picture 2: the plan of a build. Files become parts, each read by one worker, whoever that is.

Small neighbours share a part; a large file that can be entered in the middle (plain text, jsonl, parquet; not
compressed) is cut into spans; any other file is one part, read from its start to its end, and so is a source with
a cap. The plan depends on the files alone, so documents come in one order with any number of workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pellucid.config import DataConfig
from pellucid.data.document import WHOLE, SourceFile, Span
from pellucid.data.readers import LOOKED_AT, PLAIN, no_text, plain_cuts
from pellucid.data.readers_tables import row_groups
from pellucid.data.sources import opened, sha256_of

FILES_PER_PART = 1024


@dataclass(frozen=True)
class Part:
    """What one worker reads in one go: (number, file) of some files, or a span of one."""

    files: tuple[tuple[int, SourceFile], ...]
    span: Span = WHOLE
    max_documents: int | None = None  # of those that all stages keep
    max_bytes: int | None = None  # of their text
    sha256: str | None = None  # of the file, where scanning it has told
    spans: int = 1  # that the file is cut into

    @cached_property
    def name(self) -> str:
        """The same for the same content to read, whatever its place in the plan."""
        files = [{**asdict(file), "path": str(file.path)} for _, file in self.files]
        content = json.dumps([files, asdict(self.span), self.max_documents, self.max_bytes], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()

    @property
    def stored_bytes(self) -> int:
        return sum(file.size for _, file in self.files) // self.spans


def plan_parts(config: DataConfig, files: list[SourceFile], block_bytes: int) -> list[Part]:
    """Every file in order: those of a capped source in one part, large and remote ones alone, small ones together."""
    parts: list[Part] = []
    for (split, index), group in groupby(enumerate(files), key=lambda item: (item[1].split, item[1].source_index)):
        source = (config.validation if split == "validation" else config.sources)[index]
        if source.max_documents is not None or source.max_bytes is not None:
            parts.append(Part(tuple(group), WHOLE, source.max_documents, source.max_bytes))
            continue
        together: list[tuple[int, SourceFile]] = []
        size = 0
        for number, file in group:
            if together and (size + file.size > block_bytes or file.remote or len(together) == FILES_PER_PART):
                parts.append(Part(tuple(together)))
                together, size = [], 0
            together.append((number, file))
            size += file.size
        parts.append(Part(tuple(together)))
    return parts


def worth_scanning(part: Part, block_bytes: int) -> bool:
    """Whether a part is one large file that may be entered in the middle."""
    file = part.files[0][1]
    enterable = (file.format in (*PLAIN, "jsonl", "ndjson") and not file.remote) or file.format == "parquet"
    return (len(part.files) == 1 and enterable and not file.compression and file.size >= 2 * block_bytes
            and part.max_documents is None and part.max_bytes is None)


def scan(part: Part, block_bytes: int) -> list[Part]:
    """A large file's parts of about block_bytes each, and its sha256 (of files on this machine)."""
    file = part.files[0][1]
    sha256 = None if file.remote else sha256_of(file.path)
    if sha256 is None and not file.remote:
        return [part]  # reading it says what is wrong
    with opened(file) as (_, stream):
        if file.format != "parquet" and no_text(stream.peek(LOOKED_AT)[:LOOKED_AT], file):
            starts = iter([(0, 0)])  # whole: reading it says so, once
        elif file.format in PLAIN:
            starts = _plain_starts(stream, block_bytes)
        elif file.format == "parquet":
            starts = _row_starts(stream, block_bytes)
        else:
            starts = _line_starts(stream, block_bytes)
        bounds = list(starts)
    stops: list[int | None] = [start for start, _ in bounds[1:]] + [None]
    spans = [Span(start, stop, ordinal) for (start, ordinal), stop in zip(bounds, stops, strict=True)]
    return [Part(part.files, span, sha256=sha256, spans=len(spans)) for span in spans]


def _plain_starts(stream: Any, block_bytes: int) -> Iterator[tuple[int, int]]:
    yield 0, 0
    position = begun = 0
    for ordinal, block in enumerate(plain_cuts(stream)):
        if position - begun >= block_bytes:
            begun = position
            yield position, ordinal
        position += len(block)


def _line_starts(stream: Any, block_bytes: int) -> Iterator[tuple[int, int]]:
    """(byte, lines before) of the first line start after every block_bytes."""
    yield 0, 0
    position, lines, target, pending = 0, 0, block_bytes, None
    while block := stream.read(1 << 20):
        if pending is not None:  # a start is one only if something follows
            yield pending
            pending = None
        at = 0
        while position + len(block) >= target and (cut := block.find(b"\n", max(at, target - position - 1))) >= 0:
            lines += block.count(b"\n", at, cut + 1)
            at = cut + 1
            target = position + at + block_bytes
            if at < len(block):
                yield position + at, lines
            else:
                pending = (position + at, lines)
        lines += block.count(b"\n", at)
        position += len(block)


def _row_starts(stream: Any, block_bytes: int) -> Iterator[tuple[int, int]]:
    try:
        table = pq.ParquetFile(stream)
        sizes = [table.metadata.row_group(number).total_byte_size for number in range(table.num_row_groups)]
        rows = row_groups(table)
    except (pa.ArrowException, OSError):
        sizes, rows = [], []  # reading it says what is wrong
    yield 0, 0
    size = 0
    for number, row in enumerate(rows):
        if size >= block_bytes:
            yield row, 0
            size = 0
        size += sizes[number]
