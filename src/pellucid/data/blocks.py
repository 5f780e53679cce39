"""Picture 2: the ledger of a build. A block is some megabytes of documents on disk, between the two passes.

A block is two files: NAME.docs (documents, compressed) and NAME.json (its facts), the second renamed into place
when both are on the disk. So what is finished is what the folder lists, a killed build loses at most the blocks
being written, and no other record has to be kept in step.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import zstandard

from pellucid.data.document import Document

BLOCK_BYTES = 1 << 23  # of text in a block; what a killed build has to do again, per worker
BLOCK_DOCUMENTS = 1 << 16
HEADER = struct.Struct("<IQ16s")  # bytes of the provenance (JSON), bytes of the text, content hash
FIELDS = [name for name in Document.__slots__ if name != "text"]


@dataclass(frozen=True)
class Block:
    """A finished block: iterate for (document, content hash). `facts` holds its counts and what its maker added."""

    folder: Path
    name: str
    facts: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.docs"

    def __iter__(self) -> Iterator[tuple[Document, bytes]]:
        with zstandard.open(self.path, "rb") as reader:
            blank = Document("", "", 0, 0, 0, 0)
            while header := reader.read(HEADER.size):
                provenance_size, text_size, content_hash = HEADER.unpack(header)
                fields = dict(zip(FIELDS, json.loads(reader.read(provenance_size)), strict=True))
                yield replace(blank, text=reader.read(text_size).decode(), **fields), content_hash


class BlockWriter:
    """Append documents, then `finish`. Nothing has the block's name before that."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.facts: dict[str, Any] = {"documents": 0, "held_out": 0, "text_bytes": 0, "least": None, "most": None}
        self._path = folder / f".{name}.{os.getpid()}.tmp"
        self._file = open(self._path, "wb")
        self._writer = zstandard.ZstdCompressor(level=1).stream_writer(self._file, closefd=False)

    def add(self, document: Document, text: bytes, content_hash: bytes) -> None:
        """Append one document; `text` is its text in UTF-8, `content_hash` 16 bytes."""
        provenance = json.dumps([getattr(document, name) for name in FIELDS]).encode()
        self._writer.write(HEADER.pack(len(provenance), len(text), content_hash) + provenance + text)
        facts, number = self.facts, hash_number(content_hash)
        facts["documents"] += 1
        facts["held_out"] += document.split == "validation"
        facts["text_bytes"] += len(text)
        facts["least"] = number if facts["least"] is None else min(number, facts["least"])
        facts["most"] = number if facts["most"] is None else max(number, facts["most"])

    def finish(self, **facts: Any) -> Block:
        """Make the block exist, with further facts (JSON values)."""
        self._writer.close()
        _to_disk(self._file)
        block = Block(self.folder, self.name, {**self.facts, **facts, "size": self._file.tell()})
        self._file.close()
        os.rename(self._path, block.path)
        commit(self.folder / f"{self.name}.json", block.facts)
        return block

    def abandon(self) -> None:
        """Leave nothing, if not finished."""
        with contextlib.suppress(OSError):
            self._file.close()
            self._path.unlink()


def hash_number(content_hash: bytes) -> int:
    """The first 64 bits of a content hash."""
    return int.from_bytes(content_hash[:8], "little")


def finished_block(folder: Path, name: str) -> Block | None:
    """The block of a name, if it is finished and its file has the size it should."""
    facts = read_record(folder / f"{name}.json")
    block = Block(folder, name, facts or {})
    if facts is None or not block.path.is_file() or block.path.stat().st_size != facts["size"]:
        return None
    return block


def commit(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON record so that it is there whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(record, file, ensure_ascii=False)
        _to_disk(file)
    os.rename(temporary, path)


def read_record(path: Path) -> dict[str, Any] | None:
    """A record that `commit` wrote, or None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
