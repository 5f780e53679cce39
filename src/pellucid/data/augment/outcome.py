"""Picture 2, augment: what an augmenter gives back, and the cutting of a text into words that keeps its layout."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
Augmenter = Callable[[str, np.random.Generator], "Outcome"]  # pure: the same text and stream give the same outcome


@dataclass(frozen=True, slots=True)
class Outcome:
    """A text after one augmenter: how many units it changed (words, characters, sentences, documents), and
    how many changes its gates refused, by reason."""

    text: str
    changed: int = 0
    rejected: dict[str, int] = field(default_factory=dict)


def words(text: str) -> list[tuple[int, int]]:
    """(start, end) of every run of letters, inner apostrophes included."""
    return [match.span() for match in WORD.finditer(text)]


def chosen(rng: np.random.Generator, count: int, rate: float) -> list[int]:
    """Which of `count` units are touched when each is with probability `rate`. Always draws `count` numbers."""
    return np.flatnonzero(rng.random(count) < rate).tolist()


def replaced(text: str, edits: dict[tuple[int, int], str]) -> str:
    """The text with some spans replaced; spans do not overlap; all else stays as it is, byte for byte."""
    parts, position = [], 0
    for (start, end), new in sorted(edits.items()):
        parts += [text[position:start], new]
        position = end
    return "".join([*parts, text[position:]])


def with_case_of(new: str, old: str) -> str:
    """`new` in the capitals of `old`: ALL, First, or as it is."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|e\.g|i\.e|cf|Fig|No|Vol|pp|Inc|Ltd|Co|approx)|\b[A-Z])\.$")
BREAK = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|[ \t]*\n(?:[ \t]*\n)+\s*|\n(?=[ \t]*(?:[-*+•#>|]|\d+[.)]\s|    |\t))")


def sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of the sentences, white space around them left out.

    A sentence ends at . ! ? (not after a common abbreviation or an initial), at a blank line, and before a list
    item, quotation, table row or indented line; a single line end inside a paragraph does not end it.
    """
    cuts = [(0, 0)]
    for match in BREAK.finditer(text):
        quote = len(match.group()) - len(match.group().lstrip("\"'”’)]"))
        if text[match.start() - 1 : match.start()] == "." and "\n\n" not in match.group() \
                and ABBREVIATION.search(text, max(0, match.start() - 10), match.start()):
            continue
        cuts.append((match.start() + quote, match.end()))
    cuts.append((len(text), len(text)))
    spans = []
    for (_, start), (end, _) in pairwise(cuts):
        inner = text[start:end]
        start += len(inner) - len(inner.lstrip())
        end = start + len(inner.strip())
        if start < end:
            spans.append((start, end))
    return spans
