"""Picture 2, filter: Gopher's limits on repeated text (Rae et al. 2021, arXiv 2112.11446, table A1).

Four limits on repeated lines and paragraphs, three on the most frequent n-gram, six on n-grams that came before.
The sequential count of the last six is made only where a cheap upper bound does not already settle the verdict:
characters under any repeated 5-gram bound the repeated characters of every n >= 5.
"""

from __future__ import annotations

import numpy as np

from pellucid.config import GopherRepetitionFilter
from pellucid.data.stages.textview import TextView


def gopher_repetition(view: TextView, limits: GopherRepetitionFilter) -> str | None:
    """Why the document repeats itself too much, or None. All shares are of the text's characters or parts."""
    text = view.text
    if not text:
        return "empty"
    for name, parts, most_parts, most_characters in (
        ("paragraph", _paragraphs(text.strip()), limits.duplicate_paragraphs, limits.duplicate_paragraph_characters),
        ("line", _lines(text), limits.duplicate_lines, limits.duplicate_line_characters),
    ):
        repeated, characters = duplicates(parts)
        if repeated / len(parts) > most_parts:
            return f"repeated {name}s"
        if characters / len(text) > most_characters:
            return f"characters in repeated {name}s"
    most_often = len(view.words.length)  # what holds a frequent n-gram holds its parts as often: counts fall with n
    for n, most in sorted(limits.top_ngrams.items()):
        characters, most_often = top_ngram(view, n, at_least=most * len(text), at_most_times=most_often)
        if characters / len(text) > most:
            return f"most frequent {n}-gram"
    return _repeated_ngrams(view, limits)


def _paragraphs(text: str) -> list[str]:
    """re.split(r"\\n{2,}", text) of a stripped text, several times as fast."""
    parts = text.split("\n\n")
    return [part.lstrip("\n") for part in parts if part] if "\n\n\n" in text else parts


def _lines(text: str) -> list[str]:
    """re.split(r"\\n+", text), five times as fast."""
    return [""] * text.startswith("\n") + list(filter(None, text.split("\n"))) + [""] * text.endswith("\n") or [""]


def duplicates(parts: list[str]) -> tuple[int, int]:
    """How many of the parts are copies of an earlier one, and their characters."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0, 0
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


def top_ngram(view: TextView, n: int, at_least: float = 0.0, at_most_times: int = 1 << 62) -> tuple[int, int]:
    """(occurrences times characters, occurrences) of the most frequent n-gram, the first of equals.

    Characters count single spaces between words. The first number may be 0 where it cannot exceed `at_least`; then the
    second is an upper bound. `at_most_times` is such a bound, known beforehand.
    """
    grams = view.grams(n)
    if not len(grams):
        return 0, 0
    ends = view.word_ends
    characters = ends[n:] - ends[:-n] + (n - 1)
    longest = int(characters.max())
    if at_most_times * longest <= at_least:
        return 0, at_most_times
    ordered = np.sort(grams)
    starts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts = np.concatenate([[0], starts, [len(ordered)]])
    counts = starts[1:] - starts[:-1]
    most = int(counts.max())
    if most * longest <= at_least:
        return 0, most
    candidates = ordered[starts[:-1][counts == most]]
    among = grams == candidates[0] if len(candidates) == 1 else np.isin(grams, candidates)
    first = int(np.argmax(among))
    return most * int(characters[first]), most


def _repeated_ngrams(view: TextView, limits: GopherRepetitionFilter) -> str | None:
    size = len(view.text)
    wanted = sorted(limits.duplicate_ngrams.items())
    bound = None
    for n, most in wanted:
        if bound is None or bound / size > most:  # what repeats n words also repeats fewer: the bound falls with n
            bound = covered_characters(view, n, at_least=most * size)
            if bound / size > most and repeated_characters(view, n) / size > most:
                return f"repeated {n}-grams"
    return None


def covered_characters(view: TextView, n: int, at_least: float = 0.0) -> int:
    """Characters of words that lie in any n-gram equal to an earlier one: at least `repeated_characters`.

    Where they cannot exceed `at_least`, an upper bound that does not either.
    """
    grams = view.grams(n)
    ordered = np.sort(grams)
    repeats = int(np.count_nonzero(ordered[1:] == ordered[:-1]))
    if not repeats:
        return 0
    most = repeats * int((view.word_ends[n:] - view.word_ends[:-n]).max())
    if most <= at_least:
        return most
    order = np.argsort(grams)
    ordered = grams[order]
    same = ordered[1:] == ordered[:-1]
    several = np.append(same, False) | np.append(False, same)
    places, values = order[several], ordered[several]
    first = np.minimum.reduceat(places, np.flatnonzero(np.append(True, values[1:] != values[:-1])))
    change = np.zeros(len(grams) + n, np.int32)
    for step, begins in ((1, places), (-1, first)):  # all but the first of equals
        change[begins] += step
        change[begins + n] -= step
    return int(view.words.length[np.cumsum(change)[: len(view.words.length)] > 0].sum())


def repeated_characters(view: TextView, n: int) -> int:
    """Characters in n-grams that came before, counted from left to right without overlap."""
    grams, ends = view.grams(n).tolist(), view.word_ends
    seen: set[int] = set()
    characters = position = 0
    while position < len(grams):
        gram = grams[position]
        if gram in seen:
            characters += int(ends[position + n] - ends[position])
            position += n
        else:
            seen.add(gram)
            position += 1
    return characters
