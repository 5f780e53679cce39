"""Picture 2, augment: the same text in another order, so that a left-to-right model learns to fill gaps.

fill_in_the_middle   Bavarian et al. 2022: two cuts at random characters make prefix, middle, suffix.
    PSM  <|fim_prefix|>prefix<|fim_suffix|>suffix<|fim_middle|>middle
    SPM  <|fim_prefix|><|fim_suffix|>suffix<|fim_middle|>prefix+middle   (their "variant 2", which shares with PSM)
span_masking         causal masking (Aghajanyan et al. 2022, CM3), in T5's form (Raffel et al. 2020): spans of words
    leave a sentinel behind and follow at the end, each after its sentinel. Everything is still predicted once, left
    to right; masking without moving would ask a causal model for nothing new.
Sentinels are plain text here, never special tokens: the tokenizer spells them with its ordinary tokens. A text
that already holds one is left alone and counted, so that no text can forge a boundary.
"""

from __future__ import annotations

import numpy as np

from pellucid.data.augment.outcome import Outcome, words


def fill_in_the_middle(text: str, rng: np.random.Generator, rate: float, spm: float = 0.5,
                       sentinels: tuple[str, str, str] = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")) -> Outcome:
    """With probability `rate` the text is rearranged: as SPM with probability `spm`, else as PSM."""
    draw, order, one, two = rng.random(4)
    if draw >= rate or not text:
        return Outcome(text)
    prefix_mark, suffix_mark, middle_mark = sentinels
    if any(mark in text for mark in sentinels):
        return Outcome(text, 0, {"holds a sentinel": 1})
    first, last = sorted(int(x * (len(text) + 1)) for x in (one, two))
    prefix, middle, suffix = text[:first], text[first:last], text[last:]
    if order < spm:
        return Outcome(f"{prefix_mark}{suffix_mark}{suffix}{middle_mark}{prefix}{middle}", 1)
    return Outcome(f"{prefix_mark}{prefix}{suffix_mark}{suffix}{middle_mark}{middle}", 1)


def span_masking(text: str, rng: np.random.Generator, rate: float, mean_length: float = 3.0,
                 sentinel: str = "<|mask_{}|>") -> Outcome:
    """About `rate` of the words, in spans of `mean_length` on average, move to the end behind numbered sentinels.

    A span starts at a word outside spans with probability rate / (mean_length * (1 - rate)) and goes on with
    probability 1 - 1 / mean_length: lengths are geometric. At least one word lies between two spans.
    """
    if sentinel.partition("{}")[0] in text:
        return Outcome(text, 0, {"holds a sentinel": 1})
    places = words(text)
    begin = min(1.0, rate / (mean_length * (1 - rate)))
    spans, inside = [], False
    for number, draw in enumerate(rng.random(len(places))):
        if inside and draw < 1 - 1 / mean_length:
            spans[-1][1] = places[number][1]
            continue
        ended, inside = inside, False
        if not ended and draw < begin:
            spans.append(list(places[number]))
            inside = True
    kept, moved, position = [], [], 0
    for number, (start, end) in enumerate(spans):
        mark = sentinel.format(number)
        kept += [text[position:start], mark]
        moved += [mark, text[start:end]]
        position = end
    return Outcome("".join([*kept, text[position:], *moved]), len(spans))
