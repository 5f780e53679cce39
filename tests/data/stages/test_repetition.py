"""Gopher's limits on repetition: at their thresholds, and against the paper's counts made the slow way."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.config import GopherRepetitionFilter
from pellucid.data.stages.repetition import (
    covered_characters,
    duplicates,
    gopher_repetition,
    repeated_characters,
    top_ngram,
)
from pellucid.data.stages.textview import WORD, TextView

LIMITS = GopherRepetitionFilter()
ONLY = {"duplicate_lines": 9, "duplicate_line_characters": 9, "duplicate_paragraphs": 9,
        "duplicate_paragraph_characters": 9, "top_ngrams": {}, "duplicate_ngrams": {}}


def only(**limits) -> GopherRepetitionFilter:
    return GopherRepetitionFilter(**ONLY | limits)


def plain_top(words: list[str], n: int) -> int:
    grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    return max((len(gram) * count for gram, count in grams.most_common(1)), default=0)


def plain_repeated(words: list[str], n: int) -> int:
    seen, characters, i = set(), 0, 0
    while i + n <= len(words):
        gram = tuple(words[i : i + n])
        if gram in seen:
            characters, i = characters + sum(map(len, gram)), i + n
        else:
            seen.add(gram)
            i += 1
    return characters


REPETITIVE = st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=60) | st.lists(
    st.sampled_from(["one two three four five six seven eight nine ten eleven", "and", "so", "it", "went on"]), max_size=20)


@given(REPETITIVE, st.integers(2, 10))
@settings(deadline=None)
def test_counts_are_those_made_the_slow_way(parts, n):
    text = " ".join(parts)
    view, words = TextView(text), WORD.findall(text)
    assert top_ngram(view, n)[0] == plain_top(words, n)
    assert repeated_characters(view, n) == plain_repeated(words, n) <= covered_characters(view, n)
    assert covered_characters(view, n) >= covered_characters(view, n + 1)
    for limit in (1, 10, 40):
        exact, bound = covered_characters(view, n), covered_characters(view, n, at_least=limit)
        assert bound == exact or exact < bound <= limit


@given(REPETITIVE, st.floats(0, 0.5), st.floats(0, 0.5))
@settings(deadline=None)
def test_short_cuts_do_not_change_the_verdict(parts, top, repeated):
    text = " ".join(parts)
    limits = only(top_ngrams={n: top for n in (2, 3, 4)}, duplicate_ngrams={n: repeated for n in range(5, 11)})
    words = WORD.findall(text)
    expected = "empty" if not text else next((
        *(f"most frequent {n}-gram" for n in (2, 3, 4) if plain_top(words, n) / len(text) > top),
        *(f"repeated {n}-grams" for n in range(5, 11) if plain_repeated(words, n) / len(text) > repeated)).__iter__(), None)
    assert gopher_repetition(TextView(text), limits) == expected


def test_lines_and_paragraphs_at_their_thresholds():
    ten = [f"line {n} here" for n in range(7)]
    at, over = "\n".join([*ten, *ten[:1] * 3]), "\n".join([*ten[:6], *ten[:1] * 4])
    assert gopher_repetition(TextView(at), only(duplicate_lines=0.3)) is None
    assert gopher_repetition(TextView(over), only(duplicate_lines=0.3)) == "repeated lines"
    paragraphs, more = at.replace("\n", "\n\n"), over.replace("\n", "\n\n\n")
    assert gopher_repetition(TextView(paragraphs), only(duplicate_paragraphs=0.3)) is None
    assert gopher_repetition(TextView(more), only(duplicate_paragraphs=0.3)) == "repeated paragraphs"
    text = "abcd\nefgh\nabcd\nijklmno"  # 4 of 22 characters are repeated
    assert gopher_repetition(TextView(text), only(duplicate_line_characters=4 / 22)) is None
    assert gopher_repetition(TextView(text), only(duplicate_line_characters=0.18)) == "characters in repeated lines"
    text = text.replace("\n", "\n\n")  # 4 of 25
    assert gopher_repetition(TextView(text), only(duplicate_paragraph_characters=0.16)) is None
    verdict = gopher_repetition(TextView(text), only(duplicate_paragraph_characters=0.15))
    assert verdict == "characters in repeated paragraphs"


def test_top_ngrams_by_hand():
    text = "in the house in the garden in the street"  # "in the" three times: 18 of 40 characters
    assert top_ngram(TextView(text), 2) == (18, 3)
    assert gopher_repetition(TextView(text), only(top_ngrams={2: 18 / 40})) is None
    assert gopher_repetition(TextView(text), only(top_ngrams={2: 0.44})) == "most frequent 2-gram"


def test_duplicates_by_hand():
    assert duplicates(["aa", "b", "aa", "aa", "c"]) == (2, 4)
    assert duplicates([]) == duplicates(["x"]) == (0, 0)


def test_ordinary_prose_passes():
    text = ("It was late when the last of them came down from the hill. Nobody had thought to bring a lamp, so they felt "
            "their way along the wall, laughing at first, later in silence. Far below, a dog barked twice.")
    assert gopher_repetition(TextView(text), LIMITS) is None
