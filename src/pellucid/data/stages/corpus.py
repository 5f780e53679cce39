"""Picture 2, deduplicate: the passes that need to have seen all documents before they judge one.

How a build uses them: each pass first sees every document (`see`, `sweeps` times, `settle` after each sweep),
then says of each what becomes of it (`apply`, in the same order). A document is known by `identity`, made of its
text and its place; of equals the one with the smallest identity stays, so that neither the order of documents nor
the number of workers that made the rows decides. Held-out documents have the smallest identities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.config import DeduplicateConfig
from pellucid.data.document import Document, Dropped, StageRecord
from pellucid.data.stages.components import components
from pellucid.data.stages.minhash import MinHash
from pellucid.data.stages.sorted_rows import SortedRows, with_group_heads
from pellucid.data.stages.textview import view

Documents = Callable[[], Iterable[tuple[Document, bytes]]]  # (document, hash of its text), afresh at each call
HALF = 1 << 63


def identity(document: Document, content_hash: bytes) -> tuple[int, int]:
    """Two uint64 that order documents: held-out ones first, then by text, then by place."""
    text = int.from_bytes(content_hash[:8], "big") >> 1
    place = f"{document.source}\0{document.ordinal}\0{document.byte_start}".encode("utf-8", "surrogatepass")
    return text + (0 if document.split == "validation" else HALF), _number(blake2b(place, digest_size=8).digest())


class CorpusPass:
    """One stage over the whole corpus. Subclasses set name, version, settings and, if need be, sweeps."""

    name: str
    version: int = 1
    sweeps: int = 1

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings, self.record = folder, settings, StageRecord()

    def see(self, number: int, document: Document, content_hash: bytes) -> None:
        """Look at a document; number counts from 0 in every sweep."""
        raise NotImplementedError

    def settle(self) -> None:
        """End of a sweep."""

    def apply(self, number: int, document: Document) -> Document | Dropped:
        """What becomes of a document, in the order of the sweeps. Pure, once settled."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what `apply` needed."""

    def describe(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {"name": self.name, "version": self.version, "settings": self.settings, **self.record.as_dict()}


def run_pass(stage: CorpusPass, documents: Documents, seen: bool = False) -> Iterator[Document]:
    """The documents that one pass leaves, counted in its record; `seen` skips the first sweep's `see`."""
    for sweep in range(stage.sweeps):
        if sweep or not seen:
            for number, (document, content_hash) in enumerate(documents()):
                stage.see(number, document, content_hash)
        stage.settle()
    for number, (document, _) in enumerate(documents()):
        result = stage.apply(number, document)
        stage.record.add(document, result)
        if not isinstance(result, Dropped):
            yield result
    stage.close()


class Deduplicate(CorpusPass):
    """Drops exact duplicates (case and whitespace aside) and near-duplicates (MinHash-LSH, linked by chains)."""

    name = "deduplicate"

    def __init__(self, config: DeduplicateConfig, folder: Path):
        super().__init__(folder, config.model_dump(mode="json", exclude={"substring_words"}))
        self.exact, self.near = config.exact, config.near
        self.minhash = MinHash(config.bands, config.rows, config.ngram, config.seed)
        self.identities = _Column(2)
        self.texts = SortedRows(folder, "exact", 5)  # two halves of the text's hash, identity, number
        self.bands = SortedRows(folder, "bands", 2)  # band key, number
        self.reasons = np.zeros(0, np.uint8)

    def see(self, number: int, document: Document, content_hash: bytes) -> None:
        first, second = identity(document, content_hash)
        if self.exact:
            plain = " ".join(document.text.lower().split()).encode("utf-8", "surrogatepass")
            digest = blake2b(plain, digest_size=16).digest()
            self.texts.add(_number(digest[:8]), _number(digest[8:]), first, second, number)
        if self.near and (signature := self.minhash.signature(view(document.text))) is not None:
            self.bands.add(self.minhash.band_keys(signature), number)
        self.identities.append(first, second)

    def settle(self) -> None:
        self.reasons = np.zeros(self.identities.rows, np.uint8)
        if self.near:
            for rows, heads in with_group_heads(iter(self._members()), 1):
                self.reasons[_index(rows[rows[:, 3] != heads[:, 3], 3])] = 2
        for rows, heads in with_group_heads(iter(self.texts), 2):
            self.reasons[_index(rows[rows[:, 4] != heads[:, 4], 4])] = 1
        self.texts.remove()

    def apply(self, number: int, document: Document) -> Document | Dropped:
        reason = self.reasons[number]
        return Dropped(("", "exact duplicate", "near-duplicate")[reason]) if reason else document

    def _members(self) -> SortedRows:
        """Rows (component, identity, number) of all documents that are linked to another."""
        links = self.folder / "links.rows"
        with open(links, "wb") as file:
            for rows, heads in with_group_heads(iter(self.bands), 1):
                linked = rows[:, 1] != heads[:, 1]
                np.stack([heads[linked, 1], rows[linked, 1]], axis=1).tofile(file)
        self.bands.remove()
        label = components(self.identities.rows, lambda: _pairs(links))
        links.unlink()
        linked = np.zeros(len(label), bool)
        moved = np.flatnonzero(label != np.arange(len(label)))
        linked[moved] = linked[label[moved]] = True
        numbers = np.flatnonzero(linked)
        members = SortedRows(self.folder, "members", 4)
        identities = self.identities.take(numbers)
        members.add(label[numbers].astype(np.uint64), identities[:, 0], identities[:, 1], numbers.astype(np.uint64))
        return members


class _Column:
    """uint64 rows that grow."""

    def __init__(self, columns: int):
        self.rows, self._array = 0, np.empty((1024, columns), np.uint64)

    def append(self, *values: int) -> None:
        if self.rows == len(self._array):
            self._array = np.concatenate([self._array, np.empty_like(self._array)])
        self._array[self.rows] = values
        self.rows += 1

    def take(self, numbers: np.ndarray) -> np.ndarray:
        return self._array[numbers]


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "big")


def _index(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.int64)


def _pairs(path: Path, rows: int = 1 << 20) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while len(part := np.fromfile(file, np.uint64, 2 * rows)):
            yield part.reshape(-1, 2)
