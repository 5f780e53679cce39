"""Picture 2, augment: words replaced by synonyms, and EDA's insertion of them (Wei & Zou 2019), behind gates.

A word is replaced only where the lexicon leaves little doubt what it means. Its gates, in order: not a function
word, not a name (a capital inside a sentence), a base form ("holding" and "jaws" are not); one part of speech has
at least `dominance` of its tagged uses; within it the first sense has as much; the synonym is one plain word, seen
in tagged text, whose own first sense is that same one; and it starts like the word it replaces, vowel or consonant,
so that a/an stay right.
"""

from __future__ import annotations

import numpy as np

from pellucid.data.augment.lexicons import Sense, SynonymSource
from pellucid.data.augment.outcome import Outcome, chosen, replaced, sentences, with_case_of, words
from pellucid.data.augment.seeding import pick

FUNCTION_WORDS = frozenset("""
a about above across after again against all along also although always am among an and another any anyone anything
are around as at away back be became because become been before behind being below between both but by can cannot
could did do does doing done down during each either else enough even ever every everyone everything few first for
from further get go got had has have having he hence her here hers herself him himself his how however i if in indeed
into is it its itself just last least less like made make many may me mere might mine more most much must my myself
neither never new next no nobody none nor not nothing now of off often on once one only onto or other others our ours
out over own per perhaps quite rather same see seem she should since so some someone something still such take than
that the their theirs them themselves then there therefore these they thing this those though three through thus till
to together too toward towards two under until up upon us very was we well were what whatever when where whether which
while who whole whom whose why will with within without would yes yet you your yours yourself
""".split())
VOWELS = frozenset("aeiou")


class Lookup:
    """The synonyms of a word that pass the gates; remembers what it has looked up."""

    def __init__(self, source: SynonymSource, dominance: float):
        self.source, self.dominance = source, dominance
        self._known: dict[str, tuple[tuple[str, ...], str]] = {}

    def __call__(self, word: str) -> tuple[tuple[str, ...], str]:
        """(synonyms, "") or ((), why not) of a lower-case word."""
        if word not in self._known:
            self._known[word] = self._find(word)
        return self._known[word]

    def _find(self, word: str) -> tuple[tuple[str, ...], str]:
        if len(word) < 3 or word in FUNCTION_WORDS:
            return (), "function word"
        if self.source.is_inflected(word) or any(self._is(part, stem) for part, stem in stems(word)):
            return (), "inflected"
        senses = self.source.senses(word)
        if not senses:
            return (), "unknown"
        sense, why = self._dominant(senses)
        if sense is None:
            return (), why
        fits = tuple(dict.fromkeys(s for s in sense.synonyms if self._fits(word, s, sense)))
        return fits, "" if fits else "no fitting synonym"

    def _is(self, part: str, word: str) -> bool:
        return any(sense.part == part for sense in self.source.senses(word))

    def _dominant(self, senses: list[Sense]) -> tuple[Sense | None, str]:
        """The sense that is nearly always meant, or why there is none."""
        uses: dict[str, int] = {}
        for sense in senses:
            uses[sense.part] = uses.get(sense.part, 0) + (sense.count or 0)
        total = sum(uses.values())
        part = max(uses, key=lambda p: uses[p])
        if len(uses) > 1 and (not total or uses[part] < self.dominance * total):
            return None, "part of speech uncertain"
        mine = [sense for sense in senses if sense.part == part]
        if len(mine) > 1 and (not uses[part] or (mine[0].count or 0) < self.dominance * uses[part]):
            return None, "sense uncertain"
        return mine[0], ""

    def _fits(self, word: str, synonym: str, sense: Sense) -> bool:
        if not (synonym.isalpha() and synonym.islower()) or (word[0] in VOWELS) != (synonym[0] in VOWELS):
            return False
        if len(synonym) < 3 or VOWELS.isdisjoint(synonym):  # an abbreviation
            return False
        own, _ = self._dominant(self.source.senses(synonym) or [Sense("?", ())])
        return own is not None and own.part == sense.part and own.count != 0 and (not sense.part or word in own.synonyms)


def stems(word: str) -> list[tuple[str, str]]:
    """(part of speech, base form) of what a word may be a regular inflection of: "holding" of the verb "hold"."""
    found = [("n", word[: -len(end)]) for end in ("s", "es") if word.endswith(end) and not word.endswith("ss")]
    if word.endswith("ies"):
        found.append(("n", word[:-3] + "y"))
    for end in ("ing", "ed"):
        if word.endswith(end) and len(word) > len(end) + 2:
            stem = word[: -len(end)]
            found += [("v", stem), ("v", stem + "e")] + ([("v", stem[:-1])] if stem[-1] == stem[-2] else [])
    return found


class Synonyms:
    """Replace words by synonyms: each with probability `rate`, where the gates allow."""

    def __init__(self, lookup: Lookup, rate: float):
        self.lookup, self.rate = lookup, rate

    def __call__(self, text: str, rng: np.random.Generator) -> Outcome:
        spans = words(text)
        starts = {start for start, _ in sentences(text)}
        edits: dict[tuple[int, int], str] = {}
        rejected: dict[str, int] = {}
        for number in chosen(rng, len(spans), self.rate):
            start, end = spans[number]
            place, word = rng.random(), text[start:end]
            if word[0].isupper() and start not in starts and not (len(word) > 3 and word.isupper()):
                found, why = (), "name"
            else:
                found, why = self.lookup(word.lower())
            if found:
                edits[start, end] = with_case_of(found[int(place * len(found))], word)
            else:
                rejected[why] = rejected.get(why, 0) + 1
        return Outcome(replaced(text, edits), len(edits), rejected)


class Insertion:
    """Random insertion (EDA): with probability `rate` per word, a synonym of some word of the sentence goes before it."""

    def __init__(self, lookup: Lookup, rate: float):
        self.lookup, self.rate = lookup, rate

    def __call__(self, text: str, rng: np.random.Generator) -> Outcome:
        edits: dict[tuple[int, int], str] = {}
        for first, last in sentences(text):
            spans = words(text[first:last])
            known = [found for start, end in spans if (found := self.lookup(text[first + start : first + end].lower())[0])]
            for number in chosen(rng, len(spans), self.rate):
                if known and number:
                    found = known[pick(rng, len(known))]
                    where = first + spans[number][0]
                    edits[where, where] = found[pick(rng, len(found))] + " "
        return Outcome(replaced(text, edits), len(edits))
