"""One document followed through picture 2: read again from its file, led through the same stages, and compared.

Nothing of this was recorded: stages and augmenters are pure functions, so replaying them gives what the model was
trained on, and the content hash that the shards keep proves it.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

from pellucid.config import UserError
from pellucid.config.sources import SourceConfig
from pellucid.data.augment.pipeline import Augmentation
from pellucid.data.dataset import Dataset
from pellucid.data.document import Document, Dropped, SourceFile
from pellucid.data.pipeline import stages
from pellucid.data.sources import list_files, read_documents
from pellucid.data.splitting import Splitter

MOST_BYTES = 64 << 20  # of a source file read again for one document
EXCERPT = 4000  # characters of a document that the page shows


def journey(dataset: Dataset, split: str, origin: dict[str, Any]) -> dict[str, Any]:
    """{stations: [{name, text, characters, changed}], proven, problem}; text is the part around the first change.

    origin: the document's row of provenance. proven: the replayed text has the recorded hash; None if it was not replayed.
    """
    try:
        texts = _replay(dataset, split, origin)
    except UserError as error:
        return {"stations": [], "proven": None, "problem": str(error)}
    last = texts[-1][1]
    proven = last is not None and hashlib.blake2b(last.encode(), digest_size=16).digest() == origin["content_hash"]
    return {"stations": _stations(texts), "proven": proven, "problem": None}


def _replay(dataset: Dataset, split: str, origin: dict[str, Any]) -> list[tuple[str, str | None]]:
    """(stage, text after it); None where the stage drops it. Raises UserError where it cannot be replayed."""
    config = dataset.config
    if dataset.manifest["stages"][0]["name"] == "import":
        raise UserError("Taken in as tokens: there is no text to read again")
    document = _read_again(dataset, split, origin)
    texts: list[tuple[str, str | None]] = [("read", document.text)]
    for stage in stages(config):
        result = stage(document)
        if isinstance(result, Dropped):
            return [*texts, (stage.name, None)]
        texts.append((stage.name, result.text))
        document = result
    if origin["augmentation"]:
        augmentation = Augmentation(config)
        try:
            epoch = json.loads(origin["augmentation"])["epoch"]
            version = augmentation.versions([(origin["parent"].hex(), document.text)], epoch, dataset.tokenizer)[0]
        finally:
            augmentation.close()
        texts.append(("augment", version.text))
    return texts


def _read_again(dataset: Dataset, split: str, origin: dict[str, Any]) -> Document:
    config = dataset.config
    sources = config.validation if split == "validation" and config.validation else config.sources
    files = _files(sources[origin["source_index"]].model_dump_json())
    file = next((f for f in files if f.uri == origin["source"]), None)
    if file is None or file.remote or file.size > MOST_BYTES:
        raise UserError(f"{origin['source']}: not read again ({'it is gone' if file is None else 'remote or very large'})")
    splitter = Splitter(config, [])
    splitter.boundary = dataset.manifest["split"]["tail_starts_at_byte"]
    where = lambda d: (d.ordinal, d.byte_start, d.byte_end)
    for found in read_documents(file):
        for piece in splitter.cut(found) if isinstance(found, Document) else ():
            if where(piece) == (origin["ordinal"], origin["byte_start"], origin["byte_end"]):
                return piece
    raise UserError(f"{origin['source']}: has changed since, so the document is not there any more")


@lru_cache(maxsize=8)
def _files(source: str) -> list[SourceFile]:
    return list_files([SourceConfig.model_validate_json(source)], "this run's source")


def _stations(texts: list[tuple[str, str | None]]) -> list[dict[str, Any]]:
    """Each station with its text, or without where the stage changed nothing."""
    found, before = [], None
    for name, text in texts:
        changed = text != before
        start = 0 if before is None or text is None or not changed else _first_difference(before, text)
        start = text.rfind("\n", 0, max(0, start - 200)) + 1 if text else 0
        found.append({"name": name, "changed": changed, "dropped": text is None, "start": start,
                      "characters": None if text is None else len(text),
                      "before": before[start : start + EXCERPT] if changed and before is not None else None,
                      "text": text[start : start + EXCERPT] if changed and text is not None else None})  # fmt: skip
        before = text if text is not None else before
    return found


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
