"""One document seen once for all filters: its words, lines, paragraphs and n-grams, computed when first asked for.

A word is a run of letters and digits with inner full stops and apostrophes ("don't", "3.11", "sys.path"), or one
ideograph or kana; every other visible character is a word of its own, a symbol. Words are looked up in a
vocabulary shared by all documents of the process, so that a word is taken apart and hashed once; counting and
comparing is then numpy on integers. Hashes are blake2b: the same in every process and on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{IDEOGRAPH}]|[^\W{IDEOGRAPH}]+(?:[.'’][^\W{IDEOGRAPH}]+)*|\.{{2,}}|-{{2,}}|\S")
LETTERS = re.compile(r"[^\W\d_]")
VOCABULARY = 1 << 18  # distinct words kept before starting afresh: bounds memory, see Vocabulary.full
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd; golden ratio


class Words(NamedTuple):
    """The words of one document, each array [words]."""

    hash: np.ndarray  # uint64
    length: np.ndarray  # int32, characters
    alphabetic: np.ndarray  # bool, holds a letter
    symbol: np.ndarray  # bool, holds neither letter nor digit
    number: np.ndarray  # int64, row of the vocabulary
    vocabulary: Vocabulary


class Vocabulary(dict):
    """Whitespace-separated tokens met so far; each is a row that says of which words, rows of other tables, it is made."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.new: list[tuple[int, int, int, bool, bool]] = []  # words to be appended to the tables
        self.new_pieces: list[int] = []
        self.new_counts: list[int] = []
        self.tokens = self.described = self.used = 0  # rows filled of the three kinds of tables
        self.characters = 0  # of all tokens
        self.pieces = np.empty(0, np.int64)  # word numbers, token after token
        self.start, self.count = np.empty(0, np.int64), np.empty(0, np.int32)  # of each token, in pieces
        self.hash, self.folded, self.length = np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int32)
        self.alphabetic, self.symbol = np.empty(0, bool), np.empty(0, bool)

    @property
    def full(self) -> bool:
        """Whether it holds as much as may outlive a document, many words or few long ones: some 60 MB."""
        return max(self.tokens, self.described, self.used // 2, self.characters // 16) > VOCABULARY

    def split(self, text: str) -> Words:
        """The words of a text; what is new is learned on the way."""
        tokens = text.split()
        numbers = np.fromiter(map(self.__getitem__, tokens), np.int64, len(tokens))
        if self.new_counts:
            self._settle()
        count = self.count[numbers]
        ends = np.cumsum(count, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        words = self.pieces[np.repeat(self.start[numbers] - ends + count, count) + np.arange(total)]
        return Words(self.hash[words], self.length[words], self.alphabetic[words], self.symbol[words], words, self)

    def __missing__(self, token: str) -> int:
        words, parts = self.words, _parts(token)
        self.characters += len(token)
        for word in parts:
            number = words.get(word)
            if number is None:
                number = words[word] = len(words)
                self.new.append(_describe(word))
            self.new_pieces.append(number)
        self.new_counts.append(len(parts))
        row = self[token] = len(self)
        return row

    def _settle(self) -> None:
        """Move what is new into the tables."""
        count = np.array(self.new_counts, np.int64)
        self.start = _appended(self.start, self.tokens, self.used + np.cumsum(count) - count)
        self.count = _appended(self.count, self.tokens, count)
        self.pieces = _appended(self.pieces, self.used, self.new_pieces)
        if self.new:
            for name, column in zip(("hash", "folded", "length", "alphabetic", "symbol"), zip(*self.new, strict=True), strict=True):
                setattr(self, name, _appended(getattr(self, name), self.described, column))
        self.tokens += len(count)
        self.used += len(self.new_pieces)
        self.described += len(self.new)
        self.new, self.new_pieces, self.new_counts = [], [], []


def _appended(table: np.ndarray, used: int, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The table with values from row `used` on, twice as long where they find no room."""
    end = used + len(values)
    if end > len(table):
        table = np.concatenate([table[:used], np.empty(max(end, 2 * len(table)) - used, table.dtype)])
    table[used:end] = np.asarray(values, table.dtype)
    return table


def _parts(token: str) -> Sequence[str]:
    """WORD.findall(token), at once for the usual shapes: a word, or one with a sign before or after it."""
    if token.isascii():
        if token.isalnum():
            return (token,)
        if token[:-1].isalnum() and token[-1] != "_":
            return token[:-1], token[-1]
        if token[1:].isalnum() and token[0] != "_":
            return token[0], token[1:]
    return WORD.findall(token)


def _describe(word: str) -> tuple[int, int, int, bool, bool]:
    """(hash, hash of lower case, characters, holds a letter, holds neither letter nor digit)."""
    folded, number = word.lower(), hash_text(word)
    lower = number if folded == word else hash_text(folded)
    letter = word.isalpha() or LETTERS.search(word) is not None
    return number, lower, len(word), letter, not (letter or any(map(str.isalnum, word)))


def hash_text(text: str) -> int:
    """64 bits of blake2b of the UTF-8 bytes; lone surrogates pass."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


_vocabulary = Vocabulary()


def _words(text: str) -> Words:
    global _vocabulary
    if _vocabulary.full:
        _vocabulary = Vocabulary()
    return _vocabulary.split(text)


class TextView:
    """One text and, each computed at most once, what filters ask of it."""

    def __init__(self, text: str):
        self.text = text
        self._grams: dict[tuple[int, bool], np.ndarray] = {}

    @cached_property
    def words(self) -> Words:
        return _words(self.text)

    @cached_property
    def real_words(self) -> int:
        """How many words are not symbols."""
        return len(self.words.symbol) - int(np.count_nonzero(self.words.symbol))

    @cached_property
    def folded(self) -> np.ndarray:
        """uint64 hashes of the words that are not symbols, in lower case: what deduplication compares."""
        words = self.words
        return words.vocabulary.folded[words.number[~words.symbol]]

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def filled_lines(self) -> list[str]:
        """Lines, cut at line feeds only, that hold something visible."""
        return [line for line in self.text.split("\n") if line and not line.isspace()]

    @cached_property
    def word_ends(self) -> np.ndarray:
        """int64 [words + 1]: characters in all words before each."""
        return np.concatenate([[0], np.cumsum(self.words.length, dtype=np.int64)])

    def grams(self, n: int, folded: bool = False) -> np.ndarray:
        """uint64 hashes of all runs of n words, of n folded words if so said; [max(0, words - n + 1)]."""
        key = (n, folded)
        if key not in self._grams:
            words = self.folded if folded else self.words.hash
            self._grams[key] = words if n == 1 else self.grams(n - 1, folded)[:-1] * MULTIPLIER + words[n - 1 :]
        return self._grams[key]


@lru_cache(maxsize=2)
def view(text: str) -> TextView:
    """The view of a text; stages that follow each other on the same text share it."""
    return TextView(text)


def mix(hashes: np.ndarray) -> np.ndarray:
    """Scatter uint64 hashes so that every bit depends on every bit (splitmix64's finalizer, Steele et al. 2014)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
