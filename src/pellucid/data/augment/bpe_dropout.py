"""Picture 2, augment: BPE-dropout (Provilkov et al. 2020), so that a model sees a word in more than one spelling.

Their algorithm 1: at every step each possible merge is left out with probability p, and the best of the others is
made; a word is done when none is left. The libraries' own dropout cannot be seeded per document, so the merges are
replayed here, for byte-level BPE (tokenizer.json) and SentencePiece BPE (tokenizer.model). With p = 0 it must give
the tokenizer's own ids; that is tried on probe texts before use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import tokenizers

from pellucid.config import UserError
from pellucid.data.sentencepiece_json import sentencepiece_to_json
from pellucid.data.tokenizer import Tokenizer

SPACE = "\u2581"  # SentencePiece's mark for a space
WORDS = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")  # its pieces have the mark in front only
REFUSAL = ("data.augment: bpe_dropout cannot follow this tokenizer's merges; leave it out, or train a tokenizer of kind "
           "'bpe' or 'sentencepiece'")
PROBES = ("The quick brown fox, 12345 times!\n\n\tdef f(x):  return 'naïve café' # — 日本語 😀\n", "", " ", "a",
          "  two  spaces   three\n\n\n", "ﬁnal\u00a0word")


class BpeDropout:
    """Encodes with dropout. Raises UserError for a tokenizer without merges, or whose steps cannot be replayed."""

    def __init__(self, tokenizer: Tokenizer, rate: float):
        content = _as_json(tokenizer)
        settings = json.loads(content)["model"]
        if settings.get("type") != "BPE" or not settings.get("merges"):
            raise UserError(REFUSAL)
        self._backend = tokenizers.Tokenizer.from_buffer(content)
        self._ids: dict[str, int] = settings["vocab"]
        unknown = self._ids.get(settings.get("unk_token"), 0)
        self._bytes = [self._ids.get(f"<0x{byte:02X}>", unknown) for byte in range(256)]
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in settings["merges"])
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        made = {left + right for left, right in self._ranks}
        self._whole = set(self._ids) - made if settings.get("ignore_merges") else set()
        self.rate = 0.0
        silent = np.random.Generator(np.random.Philox(0))
        if any(self.encode(text, silent) != tokenizer.encode(text) for text in PROBES):
            raise UserError(REFUSAL)
        self.rate = rate

    def encode(self, text: str, rng: np.random.Generator) -> list[int]:
        """The ids of a text; they decode to the same text whatever was dropped."""
        ids: list[int] = []
        for symbols in self._words(text):
            for symbol in self._merge(symbols, rng):
                token_id = self._ids.get(symbol)
                ids += [token_id] if token_id is not None else [self._bytes[byte] for byte in symbol.encode()]
        return ids

    def _merge(self, symbols: list[str], rng: np.random.Generator) -> list[str]:
        ranks = self._ranks.get
        while len(symbols) > 1:
            possible = [(rank, at) for at in range(len(symbols) - 1)
                        if (rank := ranks((symbols[at], symbols[at + 1]))) is not None]
            if self.rate and possible:
                kept = rng.random(len(possible)) >= self.rate
                possible = [merge for merge, keep in zip(possible, kept, strict=True) if keep]
            if not possible:
                break
            _, at = min(possible)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return symbols

    def _words(self, text: str) -> Iterator[list[str]]:
        """The symbols of each stretch that no merge can leave; user-defined pieces whole."""
        backend = self._backend
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        for part in parts:
            if part in self._whole:
                yield [part]
            else:
                yield from (list(word) for word in (WORDS.findall(part) if SPACE in part else [part]))


def spelled_otherwise(ids: list[int], usual: list[int], tokenizer: Tokenizer) -> int:
    """How many of the ids that spell a text stand for other bytes of it than each of its usual ids."""
    places = lambda ids: set(pairwise([0, *np.cumsum(tokenizer.byte_lengths[ids]).tolist()]))
    return len(places(ids) - places(usual))


def _as_json(tokenizer: Tokenizer) -> bytes:
    """The tokenizer.json, converted where it is a SentencePiece model."""
    engine = tokenizer.engine
    content = engine.content if engine.file_name == "tokenizer.json" else sentencepiece_to_json(engine.content)
    if content is None:
        raise UserError(REFUSAL)
    return content
