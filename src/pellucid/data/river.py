"""Picture 2 as one list: every stage from the files to the rows, with the documents, bytes and tokens in and out of it.

Reading and cleaning are told by the manifest as they were counted. Holding out, tokenizing and packing leave their
numbers in its `splits`; here they become stages like the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pellucid.data.dataset import Dataset

COUNTS = ("documents_in", "documents_out", "bytes_in", "bytes_out", "tokens_in", "tokens_out")
SAMPLES, SAMPLE_TOKENS = 3, 40


def river(dataset: Dataset) -> list[dict[str, Any]]:
    """Entries like those of the manifest's `stages`, in the order in which the text flows, with all of COUNTS.

    A count is None where there is nothing of its kind: tokens of text, bytes of tokens. `split` (held out or not),
    `tokenize` and `pack` come after the cleaning, `augment` between the first two; they count both splits together, and
    have each one's numbers in `splits`. Data imported as tokens has no `tokenize`.
    """
    manifest = dataset.manifest
    stages = [{**dict.fromkeys(COUNTS), **stage} for stage in manifest["stages"]]
    cleaning, augment = ([stage for stage in stages if (stage["name"] == "augment") == which] for which in (False, True))
    splits = {name: {key: value for key, value in split.items() if key != "shards"} for name, split in manifest["splits"].items()}
    texts = {name: {key: split[key] for key in ("documents", "text_bytes", "tokens")} for name, split in splits.items()}
    held = _held_out(manifest["split"], texts, cleaning[-1])
    if cleaning[0]["name"] == "import":
        tokens = _sum(texts, "tokens")
        cleaning[0] |= {"tokens_in": tokens - cleaning[0]["settings"]["closing_eos_added"], "tokens_out": tokens}
        return [*cleaning, held | {"tokens_in": tokens, "tokens_out": tokens}, _pack(dataset, splits)]
    return [*cleaning, held, *augment, _tokenize(dataset, texts), _pack(dataset, splits)]


def _held_out(settings: dict[str, Any], texts: dict[str, Any], cleaned: dict[str, Any]) -> dict[str, Any]:
    """No version of an augmented document is held out, so what is not held out of the cleaned text was left to train on."""
    documents, size = cleaned["documents_out"], cleaned["bytes_out"]
    splits = {name: {key: text[key] for key in ("documents", "text_bytes")} for name, text in texts.items() if name != "train"}
    train = {"documents": documents - _sum(splits, "documents"), "text_bytes": size - _sum(splits, "text_bytes")}
    return _stage("split", settings, {"train": train, **splits},
                  documents_in=documents, documents_out=documents, bytes_in=size, bytes_out=size)


def _tokenize(dataset: Dataset, texts: dict[str, Any]) -> dict[str, Any]:
    """tokens_out counts the eos that closes each document; a sample's `after` is the texts of its tokens."""
    documents, size, tokens = (_sum(texts, key) for key in ("documents", "text_bytes", "tokens"))
    counts = {"documents_in": documents, "documents_out": documents, "bytes_in": size, "tokens_out": tokens}
    return _stage("tokenize", dataset.manifest["tokenizer"], texts, **counts) | {"samples": _tokenized(dataset)}


def _pack(dataset: Dataset, splits: dict[str, Any]) -> dict[str, Any]:
    """tokens_out is what the rows predict: less than came in where labelled documents are cut to a row.

    rows_per_epoch counts the training rows of an epoch of this run: where sources have weights, not its different rows.
    """
    config, packing = dataset.config, [split["packing"] for split in splits.values()]
    length, rows = config.sequence_length, sum(counts["rows"] for counts in packing)
    used = sum(round(counts["utilization"] * counts["rows"] * length) for counts in packing)
    documents, tokens = _sum(splits, "documents"), _sum(splits, "tokens")
    settings = {"packing": config.packing, "sequence_length": length, "cross_document_attention": config.cross_document_attention}
    counts = {"documents_in": documents, "documents_out": documents, "tokens_in": tokens, "tokens_out": used}
    said = {"rows": rows, "positions": rows * length, "rows_per_epoch": dataset.train.rows_per_epoch}
    return _stage("pack", settings, splits, **counts) | said


def _stage(name: str, settings: dict[str, Any], splits: dict[str, Any], **counts: int) -> dict[str, Any]:
    return {"name": name, "settings": settings, **dict.fromkeys(COUNTS), **counts, "dropped": {}, "samples": [], "splits": splits}


def _sum(splits: dict[str, Any], key: str) -> int:
    return sum(split[key] for split in splits.values())


def _tokenized(dataset: Dataset) -> list[dict[str, Any]]:
    """The beginning of the first training documents, as text and as the texts of its tokens."""
    split, tokenizer, samples = dataset.train, dataset.tokenizer, []
    for index in range(min(SAMPLES, len(split.reader.starts))):
        first, last = int(split.reader.starts[index]), int(split.reader.ends[index]) - 1  # without its closing eos
        ids = split.reader.tokens(np.arange(first, min(last, first + SAMPLE_TOKENS))).tolist()
        origin = split.reader.provenance([index])[0]
        samples.append({
            "source": origin["source"], "ordinal": origin["ordinal"], "reason": None, "before": tokenizer.decode(ids),
            "after": [tokenizer.token_bytes(token).decode("utf-8", errors="replace") for token in ids], "ids": ids})
    return samples
