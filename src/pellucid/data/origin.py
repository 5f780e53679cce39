"""Picture 2 asked backwards: where one token, or one document, of prepared data came from and what was done to it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from pellucid.config import UserError
from pellucid.data.dataset import Dataset, Split

AROUND = 40  # tokens shown on either side


def origin(dataset: Dataset, split_name: str, *, token: int | None = None, document: int | None = None) -> dict[str, Any]:
    """The origin of token number `token` of a split (as its shards hold them), or of document number `document`.

    split, document, source, ordinal, byte_start and byte_end (of the token where `exact`, else of the document),
    decisions {stage: "changed" | "as it was"}, parent and augmentation (of a version), rows; before, text and after.
    For a token also token {number, id, position in the document}. Raises UserError for a number that is not there.
    """
    if token is not None and document is not None:
        raise UserError(f"{dataset.directory}: give a token or a document, not both")
    split = dataset.split(split_name)
    reader = split.reader
    number, count, what = (document, len(reader.ends), "document") if token is None else (token, int(reader.ends[-1]), "token")
    if number is None or not 0 <= number < count:
        raise UserError(f"{dataset.directory}: the {split_name} split has {what}s 0 to {count - 1}, not {number}")
    index = number if token is None else int(np.searchsorted(reader.ends, token, side="right"))
    first, last = int(reader.starts[index]), int(reader.ends[index]) - 1
    start, stop = (0, last - first) if token is None else (token - first, token - first + 1)
    found = reader.provenance([index])[0]
    ids = reader.tokens(np.arange(first, last + 1)).tolist()
    decode = split.tokenizer.decode
    result = {
        "split": split_name, "document": index, "source": found["source"], "ordinal": found["ordinal"],
        **split.byte_range(index, start, stop, found), "decisions": _decisions(dataset, found["changed_by"]),
        "content_hash": found["content_hash"].hex(), "parent": _parent(split, found["parent"]),
        "augmentation": json.loads(found["augmentation"]) if found["augmentation"] else None,
        "rows": sorted(split.rows_of_document(index, [(start, stop)])), "tokens": len(ids),
        "before": decode(ids[max(0, start - AROUND) : start]), "text": decode(ids[start:stop]),
        "after": decode(ids[stop : stop + AROUND]),
    }
    return result if token is None else result | {"token": {"number": token, "id": ids[start], "position": start}}


def _decisions(dataset: Dataset, changed_by: str) -> dict[str, str]:
    """What each stage that saw a kept document did with it; the first, reading, and augmentation are none of them."""
    changed = changed_by.split(", ")
    names = [stage["name"] for stage in dataset.manifest["stages"] if stage["name"] not in ("read", "augment")]
    return {name: "changed" if name in changed else "as it was" for name in names}


def _parent(split: Split, content_hash: bytes | None) -> dict[str, Any] | None:
    """The document a version was made from; its number is None where originals are not kept."""
    if content_hash is None:
        return None
    hashes = split.reader.columns(["content_hash"]).column(0).to_pylist()
    return {"content_hash": content_hash.hex(), "document": hashes.index(content_hash) if content_hash in hashes else None}
