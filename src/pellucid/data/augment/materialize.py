"""Picture 2, augment: training documents and their versions of every epoch, just before they become shards.

With `augment_originals` a document is followed by those of its versions that differ from it; without, its versions
stand in its place, also where nothing was changed, so that no document is lost. Held-out documents pass untouched.
An epoch of the loader goes through all that is stored: one original and augment_epochs versions of each document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pellucid.config import DataConfig
from pellucid.data.augment.identity import VERSION
from pellucid.data.augment.pipeline import Augmentation, Augmented
from pellucid.data.document import Document, StageRecord
from pellucid.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Item:
    """A document to be stored, with the version it is (None: as it was read) and ids if those were varied."""

    document: Document
    content_hash: bytes  # of the parent, for a version
    split: str
    version: Augmented | None = None

    @property
    def token_ids(self) -> list[int] | None:
        return self.version.token_ids if self.version else None

    @property
    def text_hash(self) -> bytes:
        """The content hash of what is stored."""
        if self.augmentation is None:
            return self.content_hash
        return hashlib.blake2b(self.document.text.encode(), digest_size=16).digest()

    @property
    def parent(self) -> bytes | None:
        """The content hash of the document this is a changed version of."""
        return self.content_hash if self.augmentation else None

    @property
    def augmentation(self) -> str | None:
        """How it was made, as JSON; None for an original, and for a version that came out equal."""
        return self.version.record if self.version and self.version.steps else None


class Materializer:
    """`expand` gives what to store for some documents; `record` is the manifest's entry so far (see `merged`)."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.augmentation = augmentation_of(config.model_dump_json())
        self.augmentation.forget()
        self._stage = StageRecord()

    def expand(self, batch: list[Item], tokenizer: Tokenizer) -> list[Item]:
        """What to store for some originals, in their order."""
        train = [(item.content_hash.hex(), item.document.text) for item in batch if item.split == "train"]
        epochs = range(1, self.config.augment_epochs + 1)
        versions = [iter(self.augmentation.versions(train, epoch, tokenizer)) for epoch in epochs]
        items = []
        for item in batch:
            if item.split != "train" or self.config.augment_originals:
                items.append(item)
            if item.split == "train":
                items += self._versions(item.document, item.content_hash, [next(version) for version in versions])
        return items

    def _versions(self, document: Document, content_hash: bytes, versions: list[Augmented]) -> Iterator[Item]:
        for version in versions:
            changed = replace(document, text=version.text, exact=document.exact and version.text == document.text)
            if version.steps or not self.config.augment_originals:
                self._stage.add(document, changed)
                yield Item(changed, content_hash, "train", version)
            else:
                self._stage.documents_in += 1
                self._stage.bytes_in += len(document.text.encode())
                self._stage.drop("unchanged")

    def record(self) -> dict[str, Any]:
        return {**self._stage.as_dict(), "augmenters": self.augmentation.describe()}


def merged(config: DataConfig, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's entry for the stage "augment", from the records of all parts in order."""
    total, augmenters = StageRecord(), []
    for record in records:
        total.merge(record)
        for number, mine in enumerate(record["augmenters"]):
            if number == len(augmenters):
                augmenters.append({**mine, "changed": 0, "rejected": {}})
            whole = augmenters[number]
            whole["changed"] += mine["changed"]
            for reason, count in mine["rejected"].items():
                whole["rejected"][reason] = whole["rejected"].get(reason, 0) + count
    settings = config.model_dump(mode="json", include={"augment", "augment_epochs", "augment_originals", "augment_seed"})
    return {"name": "augment", "version": VERSION, "settings": settings, **total.as_dict(), "augmenters": augmenters}


@lru_cache(maxsize=1)
def augmentation_of(settings: str) -> Augmentation:
    """Lexicons and models loaded once per process. `settings`: a DataConfig as JSON."""
    return Augmentation(DataConfig.model_validate_json(settings))
