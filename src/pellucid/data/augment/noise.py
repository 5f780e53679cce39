"""Picture 2, augment: noise in words and letters. Layout, digits and punctuation stay as they are.

swap, deletion   EDA (Wei & Zou 2019), each word with probability `rate` instead of a fixed number per sentence
spelling         the mistakes people make by ear: doubled letters, ie/ei, unstressed vowels, there/their
keyboard         the mistakes of fingers: a neighbouring key on QWERTY
characters       synthetic noise (Belinkov & Bisk 2018): a letter left out, doubled, replaced, or swapped with the next
"""

from __future__ import annotations

import re
import string

import numpy as np

from pellucid.data.augment.outcome import Outcome, chosen, replaced, sentences, with_case_of, words
from pellucid.data.augment.seeding import pick

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SHIFT = (0.0, 0.25, 0.75)  # how far each row stands to the right, in keys
CONFUSED = [{"their", "there"}, {"its", "it's"}, {"your", "you're"}, {"then", "than"}, {"affect", "effect"},
            {"loose", "lose"}, {"to", "too"}, {"principal", "principle"}, {"were", "where"}, {"whose", "who's"}]
MISTAKES = [(re.compile(pattern), new) for pattern, new in (
    (r"ie", "ei"), (r"ei", "ie"), (r"([bcdfglmnprst])\1", r"\1"), (r"(?<=[aeiou])([lmnprst])(?=[aeiou])", r"\1\1"),
    (r"ance\b", "ence"), (r"ence\b", "ance"), (r"able\b", "ible"), (r"ible\b", "able"), (r"ant\b", "ent"),
    (r"ent\b", "ant"), (r"(?<=[a-z])e(?=ment\b|ly\b)", ""), (r"ph", "f"), (r"sc(?=[ei])", "s"), (r"wh", "w"),
    (r"ough", "uff"), (r"(?<=[a-z])er\b", "or"), (r"ise\b", "ize"), (r"(?<=s)cious\b", "tious"), (r"kn", "n"))]


def _neighbours() -> dict[str, str]:
    place = {key: (x + SHIFT[y], y) for y, row in enumerate(ROWS) for x, key in enumerate(row)}
    return {key: "".join(other for other, (u, v) in place.items()
                         if other != key and abs(u - x) <= 1 and abs(v - y) <= 1) for key, (x, y) in place.items()}


NEIGHBOURS = _neighbours()


def swap(text: str, rng: np.random.Generator, rate: float) -> Outcome:
    """Each word, with probability `rate`, changes places with another of its sentence."""
    edits: dict[tuple[int, int], str] = {}
    for first, last in sentences(text):
        spans = [(first + start, first + end) for start, end in words(text[first:last])]
        order = list(range(len(spans)))
        for number in chosen(rng, len(spans), rate):
            other = pick(rng, len(spans))
            order[number], order[other] = order[other], order[number]
        edits |= {spans[n]: text[slice(*spans[source])] for n, source in enumerate(order) if n != source}
    return Outcome(replaced(text, edits), len(edits))


def deletion(text: str, rng: np.random.Generator, rate: float) -> Outcome:
    """Each word, with probability `rate`, goes, and the space after it; no sentence loses all its words."""
    edits: dict[tuple[int, int], str] = {}
    for first, last in sentences(text):
        spans = words(text[first:last])
        gone = chosen(rng, len(spans), rate)
        for number in gone[1:] if len(gone) == len(spans) else gone:
            start, end = first + spans[number][0], first + spans[number][1]
            edits[start, end + (text[end : end + 1] == " ")] = ""
    return Outcome(replaced(text, edits), len(edits))


def spelling(text: str, rng: np.random.Generator, rate: float) -> Outcome:
    """Each word, with probability `rate`, is misspelt, if one of the usual mistakes fits it."""
    edits: dict[tuple[int, int], str] = {}
    spans = words(text)
    for number in chosen(rng, len(spans), rate):
        place, word = rng.random(), text[slice(*spans[number])]
        wrong = _misspelt(word.lower())
        if wrong and word.isascii():
            edits[spans[number]] = with_case_of(wrong[int(place * len(wrong))], word)
    return Outcome(replaced(text, edits), len(edits))


def _misspelt(word: str) -> list[str]:
    found = [other for group in CONFUSED if word in group for other in sorted(group - {word})]
    found += [wrong for pattern, new in MISTAKES if (wrong := pattern.sub(new, word, count=1)) != word and len(wrong) > 1]
    return list(dict.fromkeys(found))


def keyboard(text: str, rng: np.random.Generator, rate: float) -> Outcome:
    """Each letter a-z, with probability `rate`, becomes one on a key that touches its own. Keeps the length."""
    letters = [n for n, char in enumerate(text) if char in string.ascii_letters]
    edits = {}
    for number in chosen(rng, len(letters), rate):
        at = letters[number]
        near = NEIGHBOURS[text[at].lower()]
        edits[at, at + 1] = with_case_of(near[pick(rng, len(near))], text[at])
    return Outcome(replaced(text, edits), len(edits))


def characters(text: str, rng: np.random.Generator, rate: float) -> Outcome:
    """Each letter a-z, with probability `rate`, is left out, doubled, replaced, or swapped with the letter after it."""
    edits: dict[tuple[int, int], str] = {}
    letters = [n for n, char in enumerate(text) if char in string.ascii_letters]
    free = 0  # the first position no edit has touched
    for number in chosen(rng, len(letters), rate):
        at, kind, other = letters[number], pick(rng, 4), string.ascii_lowercase[pick(rng, 26)]
        pair = text[at : at + 2]
        if at < free:
            continue
        new = ("", pair[0] * 2, with_case_of(other, pair[0]), pair[::-1])[kind]
        end = at + 2 if kind == 3 and len(pair) == 2 and pair[1] in string.ascii_letters else at + 1
        if kind == 3 and end == at + 1:
            continue  # nothing to swap with
        edits[at, end] = new
        free = end
    edits = {span: new for span, new in edits.items() if text[slice(*span)] != new}
    return Outcome(replaced(text, edits), len(edits))
