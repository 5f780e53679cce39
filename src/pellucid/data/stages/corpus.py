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
from pellucid.data.stages.sorted_rows import InTurn, SortedRows, distinct, with_group_heads
from pellucid.data.stages.textview import view

Documents = Callable[[], Iterable[tuple[Document, bytes]]]  # (document, hash of its text), afresh at each call
HALF = 1 << 63
EXACT, NEAR = 1, 2  # the smaller holds where both do
REASONS = ("", "exact duplicate", "near-duplicate")


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
    """Drops exact duplicates (case and whitespace aside) and near-duplicates (MinHash-LSH, linked by chains).

    On disk: 40 bytes a document for exact, 250 for near (14 bands); in memory nothing of any one document.
    """

    name = "deduplicate"

    def __init__(self, config: DeduplicateConfig, folder: Path):
        super().__init__(folder, config.model_dump(mode="json", exclude={"substring_words"}))
        self.exact, self.near = config.exact, config.near
        self.minhash = MinHash(config.bands, config.rows, config.ngram, config.seed)
        self.texts = SortedRows(folder, "exact", 5)  # two halves of the text's hash, identity, number
        self.bands = SortedRows(folder, "bands", 2)  # band key, number
        self.dropped = SortedRows(folder, "dropped", 2)  # number, place in REASONS
        self.identities = SortedRows(folder, "identities", 3)  # number, identity
        self._judged: InTurn | None = None

    def see(self, number: int, document: Document, content_hash: bytes) -> None:
        first, second = identity(document, content_hash)
        if self.exact:
            plain = " ".join(document.text.lower().split()).encode("utf-8", "surrogatepass")
            digest = blake2b(plain, digest_size=16).digest()
            self.texts.add(_number(digest[:8]), _number(digest[8:]), first, second, number)
        if self.near:
            self.identities.add(number, first, second)
            if (signature := self.minhash.signature(view(document.text))) is not None:
                self.bands.add(self.minhash.band_keys(signature), number)

    def settle(self) -> None:
        if self.near:
            members = self._members()
            for rows, heads in with_group_heads(members, 1):
                self.dropped.add(rows[rows[:, 3] != heads[:, 3], 3], NEAR)
            members.remove()
        for rows, heads in with_group_heads(self.texts, 2):
            self.dropped.add(rows[rows[:, 4] != heads[:, 4], 4], EXACT)
        self.texts.remove()
        self._judged = InTurn(self.dropped, 2)

    def apply(self, number: int, document: Document) -> Document | Dropped:
        found = self._judged.until(number + 1)
        return Dropped(REASONS[int(found[0, 1])]) if len(found) else document

    def close(self) -> None:
        self.dropped.remove()

    def _members(self) -> SortedRows:
        """Rows (component, identity, number) of all documents that are linked to another."""
        links = ((heads[:, 1:], rows[:, 1:]) for rows, heads in with_group_heads(self.bands, 1))
        label = components((np.concatenate(pair, axis=1) for pair in links), self.folder)
        self.bands.remove()
        members = SortedRows(self.folder, "members", 4)
        linked = InTurn(distinct(label), 2)
        for part in self.identities:
            number, component = linked.until(int(part[-1, 0]) + 1).T
            _, first, second = part[np.searchsorted(part[:, 0], number)].T
            members.add(component, first, second, number)
        self.identities.remove()
        label.remove()
        return members


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "big")
