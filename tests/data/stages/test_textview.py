"""Words and n-grams of a document, against the plain regular expression and plain Python."""

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.data.stages import textview
from pellucid.data.stages.repetition import _lines, _paragraphs
from pellucid.data.stages.textview import WORD, TextView, Vocabulary

TEXT = st.text(st.sampled_from("aB1_ .,'’-\n\t\x1c\u2028\u00a0漢か…é\u0301#"), max_size=60) | st.text(max_size=40)


def test_what_a_word_is():
    words = WORD.findall("Don’t use sys.path 3.11, e.g. (漢字) ... -- a_b! x- 50%")
    assert words == ["Don’t", "use", "sys.path", "3.11", ",", "e.g", ".", "(", "漢", "字", ")", "...", "--", "a_b", "!",
                     "x", "-", "50", "%"]


@given(TEXT)
@settings(deadline=None)
def test_words_from_the_vocabulary_are_those_of_the_whole_text(text):
    words, expected = Vocabulary().split(text), WORD.findall(text)
    assert words.length.tolist() == [len(word) for word in expected]
    assert words.symbol.tolist() == [not any(c.isalnum() for c in word) for word in expected]
    assert words.alphabetic.tolist() == [any(re.match(r"[^\W\d_]", c) is not None for c in word) for word in expected]
    assert len(set(words.hash.tolist())) == len(set(expected))
    assert words.vocabulary.folded[words.number].tolist() == [textview.hash_text(word.lower()) for word in expected]


@given(st.lists(TEXT, max_size=6))
@settings(deadline=None)
def test_what_was_seen_before_changes_nothing(texts):
    vocabulary = Vocabulary()
    for text in texts:
        assert (vocabulary.split(text).hash == Vocabulary().split(text).hash).all()


def test_a_full_vocabulary_starts_afresh(monkeypatch):
    """Full of words, or of few long ones: what is kept is bounded by that and one document."""
    monkeypatch.setattr(textview, "VOCABULARY", 64)
    monkeypatch.setattr(textview, "_vocabulary", Vocabulary())
    for n in range(200):
        view = TextView(f"these are words number {n} " + "x" * 10 * n)
        assert view.words.length.tolist() == [5, 3, 5, 6, len(str(n))] + [10 * n] * (n > 0)
        kept = textview._vocabulary
        assert len(kept) <= 64 + 6 and sum(map(len, kept)) <= 16 * 64 + len(view.text) + 16


def test_a_long_document_leaves_no_large_tables(monkeypatch):
    monkeypatch.setattr(textview, "VOCABULARY", 64)
    monkeypatch.setattr(textview, "_vocabulary", Vocabulary())
    TextView(" ".join(map(str, range(5000)))).words  # noqa: B018
    TextView("a b").words  # noqa: B018
    assert len(textview._vocabulary) == len(textview._vocabulary.pieces) == 2


@given(st.lists(st.sampled_from(["a", "B", "b", ","]), max_size=30), st.integers(1, 6), st.booleans())
def test_equal_ngrams_have_equal_hashes_and_others_not(words, n, folded):
    grams = TextView(" ".join(words)).grams(n, folded)
    plain = [word.lower() for word in words if word != ","] if folded else words
    expected = [tuple(plain[i : i + n]) for i in range(len(plain) - n + 1)]
    assert len(grams) == len(expected)
    assert len(set(zip(grams.tolist(), expected, strict=True))) == len(set(expected)) == len(set(grams.tolist()))


@given(st.text("ab\n", max_size=30))
def test_lines_are_those_of_the_regular_expression(text):
    assert _lines(text) == re.split(r"\n+", text)
    assert _paragraphs(text.strip()) == re.split(r"\n{2,}", text.strip())


@given(st.text(st.sampled_from("aB1_.,'’-…é漢\x00("), min_size=1, max_size=6))
def test_tokens_of_usual_shapes_are_taken_apart_as_by_the_expression(token):
    assert list(textview._parts(token)) == WORD.findall(token)


def test_mixing_changes_half_of_the_bits():
    """One input bit flipped: 32 of 64 output bits on average. Over 2000 values its error is 4 / sqrt(2000) = 0.09."""
    values = np.arange(2000, dtype=np.uint64)
    for bit in range(0, 64, 7):
        flipped = np.bitwise_count(textview.mix(values) ^ textview.mix(values ^ np.uint64(1 << bit)))
        assert abs(flipped.mean() - 32) < 0.5
