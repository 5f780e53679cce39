"""Picture 2, augment: sentences translated to another language and back (Sennrich et al. 2016), behind gates.

Only prose is tried: a sentence of 4 to 100 words that ends like one. The way back is kept if its chrF against the
original lies in a band (below: the meaning is likely lost; above: nothing was gained), its length is alike, and
numbers, names, marked-up words and the count of negations are the same. Else the sentence stays as it was.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from pellucid.data.augment.chrf import chrf
from pellucid.data.augment.outcome import Outcome, chosen, replaced, sentences
from pellucid.data.augment.seeding import pick
from pellucid.data.augment.translators import Translator

NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
MARKED = re.compile(r"\S*[_@/\\<>{}=#*`|]\S*")
NAME = re.compile(r"(?<=[\w,;:’'\")] )(?:[A-Z][\w’'-]*)")
NEGATION = re.compile(r"\b(?:not|no|never|none|nobody|nothing|nowhere|neither|nor|without|cannot)\b|n['’]t\b", re.IGNORECASE)


@dataclass(frozen=True)
class Gates:
    """What a round trip must satisfy."""

    chrf_low: float = 0.3
    chrf_high: float = 0.95
    length_ratio: float = 1.5

    def refuse(self, original: str, trip: str) -> str | None:
        """The first gate a round trip fails, or None."""
        if not trip:
            return "empty"
        ratio = len(trip) / len(original)
        if not 1 / self.length_ratio <= ratio <= self.length_ratio:
            return "length"
        if Counter(NUMBER.findall(original)) != Counter(NUMBER.findall(trip)):
            return "numbers"
        if any(name not in trip for name in NAME.findall(original) if name not in ("I", "I'm")):
            return "names"
        if Counter(MARKED.findall(original)) != Counter(MARKED.findall(trip)):
            return "markup"
        if len(NEGATION.findall(original)) != len(NEGATION.findall(trip)):
            return "negation"
        score = chrf(trip, original)
        return "score too low" if score < self.chrf_low else "score too high" if score > self.chrf_high else None


class BackTranslation:
    """Each sentence, with probability `rate`, goes there and back. `batch` translates those of many texts at once."""

    def __init__(self, translator: Translator, language: str, pivot: str, rate: float, gates: Gates):
        self.translator, self.language, self.pivot, self.rate, self.gates = translator, language, pivot, rate, gates

    def __call__(self, text: str, rng: np.random.Generator) -> Outcome:
        return self.batch([text], [rng])[0]

    def batch(self, texts: list[str], generators: list[np.random.Generator]) -> list[Outcome]:
        asked = []  # per text: the spans of its sentences to translate
        seeds = []
        for text, rng in zip(texts, generators, strict=True):
            spans = [span for span in sentences(text) if is_prose(text[slice(*span)])]
            asked.append([spans[n] for n in chosen(rng, len(spans), self.rate)])
            seeds.append(pick(rng, 2**31) if self.translator.sampling else 0)
        flat = [[" ".join(text[slice(*span)].split()) for span in spans] for text, spans in zip(texts, asked, strict=True)]
        trips = self._round_trips(flat, seeds)
        return [self._outcome(text, spans, trip) for text, spans, trip in zip(texts, asked, trips, strict=True)]

    def _round_trips(self, texts: list[list[str]], seeds: list[int]) -> list[list[str]]:
        """There and back: all at once where one seed serves all, else document by document."""
        results: list[list[str]] = [[] for _ in texts]
        for seed in dict.fromkeys(seeds):
            mine = [n for n, s in enumerate(seeds) if s == seed]
            there = self.translator.translate([t for n in mine for t in texts[n]], self.language, self.pivot, seed=seed)
            back = iter(self.translator.translate(there, self.pivot, self.language, seed=seed))
            for n in mine:
                results[n] = [tidy(next(back)) for _ in texts[n]]
        return results

    def _outcome(self, text: str, spans: list[tuple[int, int]], trips: list[str]) -> Outcome:
        edits, rejected = {}, {}
        for (start, end), trip in zip(spans, trips, strict=True):
            original = text[start:end]
            why = self.gates.refuse(" ".join(original.split()), trip)
            if why:
                rejected[why] = rejected.get(why, 0) + 1
            else:
                edits[start, end] = rewrap(original, trip)
        return Outcome(replaced(text, edits), len(edits), rejected)


def is_prose(sentence: str) -> bool:
    """Whether a sentence is worth translating: 4 to 100 words, a full stop or the like, mostly letters."""
    count = len(sentence.split())
    letters = sum(char.isalpha() or char.isspace() for char in sentence)
    return 4 <= count <= 100 and sentence.rstrip("\"'”’)]")[-1:] in tuple(".!?") and letters >= 0.8 * len(sentence)


def tidy(text: str) -> str:
    """Without the spaces that engines leave before punctuation and inside quotation marks."""
    text = re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split()))
    return re.sub(r'"\s*([^"]*?)\s*"', r'"\1"', text)


def rewrap(original: str, new: str) -> str:
    """`new` with line ends where `original` had its own, as near as words allow; indents come along."""
    breaks = [(match.start() / len(original), match.group()) for match in re.finditer(r"[ \t]*\n[ \t]*", original)]
    if not breaks:
        return new
    spaces = [match.start() for match in re.finditer(" ", new)]
    result, position = [], 0
    for share, end in breaks:
        after = [at for at in spaces if at >= position]
        if not after:
            break
        at = min(after, key=lambda place: abs(place - share * len(new)))
        result += [new[position:at], end]
        position = at + 1
    return "".join([*result, new[position:]])
