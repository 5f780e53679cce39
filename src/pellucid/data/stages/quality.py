"""Picture 2, filter: is this ordinary prose? Length, Gopher's quality rules, and FineWeb's.

Sources: Rae et al. 2021 (arXiv 2112.11446, appendix A1.1); Penedo et al. 2024 (arXiv 2406.17557, section 3.6).
Each function returns the reason to drop a document, or None. A value equal to its threshold passes.
"""

from __future__ import annotations

import re

import numpy as np

from pellucid.config import FineWebFilter, GopherQualityFilter, LengthFilter
from pellucid.data.stages.repetition import duplicates
from pellucid.data.stages.textview import TextView

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
# Unicode 17, property Sentence_Terminal: ranges of hexadecimal code points.
SENTENCE_TERMINAL = """
21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d5 1803 1809
1944-1945 1aa8-1aab 1b4e-1b4f 1b5a-1b5b 1b5e-1b5f 1b7d-1b7f 1c3b-1c3c 1c7e-1c7f 2024 203c-203d 2047-2049 2cf9-2cfb 2e2e
2e3c 2e53-2e54 2e60-2e61 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe12
fe15-fe16 fe52 fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143
111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c 112a9 113d4-113d5 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642
1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 16b44
16d6e-16d6f 16e98 1bc9f 1da88"""


def _characters(ranges: str) -> frozenset[str]:
    bounds = (item.partition("-") for item in ranges.split())
    return frozenset(chr(code) for low, _, high in bounds for code in range(int(low, 16), int(high or low, 16) + 1))


ENDS = _characters(SENTENCE_TERMINAL)


def length(view: TextView, limits: LengthFilter) -> str | None:
    """Characters within bounds."""
    if len(view.text) < limits.min_characters:
        return "too short"
    return "too long" if len(view.text) > limits.max_characters else None


def gopher_quality(view: TextView, limits: GopherQualityFilter) -> str | None:
    """Gopher's quality rules. Symbols count as words in ratios, but neither in the number nor the length of words."""
    text, words, count = view.text, view.words, view.real_words
    total = max(1, len(words.length))
    if count < limits.min_words:
        return "too few words"
    if count > limits.max_words:
        return "too many words"
    if count:
        mean = int(words.length.sum(where=~words.symbol)) / count
        if mean < limits.min_mean_word_length:
            return "words too short"
        if mean > limits.max_mean_word_length:
            return "words too long"
    if text.count("#") / total > limits.max_symbol_ratio:
        return "too many hash signs"
    ellipses = text.count("...") + text.count("…")
    if ellipses / total > limits.max_symbol_ratio:
        return "too many ellipses"
    lines = view.lines
    some = lambda most: most * max(1, len(lines))  # fewer signs in the whole text than that: no need to look at its lines
    if text.count("-") + text.count("•") > some(limits.max_bullet_lines):
        if sum(line.lstrip()[:1] in ("•", "-") for line in lines) > some(limits.max_bullet_lines):
            return "too many bullets"
    if ellipses > some(limits.max_ellipsis_lines):
        if sum(line.rstrip().endswith(("...", "…")) for line in lines) > some(limits.max_ellipsis_lines):
            return "too many lines that end in an ellipsis"
    if int(np.count_nonzero(words.alphabetic)) / total < limits.min_alphabetic_words:
        return "too few words with letters"
    return "too few stop words" if _stop_words(text, limits.min_stop_words) < limits.min_stop_words else None


STOP_WORD = [re.compile(rf"(?<![\w.'’]){word}(?!['’.]?\w)") for word in STOP_WORDS]


def _stop_words(text: str, enough: int) -> int:
    """How many of the stop words the text holds as words; counting ends when there are enough."""
    found = 0
    for word in STOP_WORD:
        if found >= enough:
            break
        found += word.search(text) is not None
    return found


def fineweb(view: TextView, limits: FineWebFilter) -> str | None:
    """FineWeb's four rules: punctuated lines, short lines, characters in repeated lines, line breaks per word."""
    lines = view.filled_lines
    if not lines:
        return "empty"
    if sum(line[-1] in ENDS for line in lines) / len(lines) < limits.min_punctuated_lines:
        return "too few lines end a sentence"
    if sum(len(line) <= limits.short_line for line in lines) / len(lines) > limits.max_short_lines:
        return "too many short lines"
    breaks = view.text.count("\n")
    if duplicates(lines)[1] / (len(view.text) - breaks) > limits.max_duplicate_characters:
        return "characters in repeated lines"
    if breaks / max(1, len(view.words.length)) > limits.max_newlines_per_word:
        return "too many line breaks"
    return None
