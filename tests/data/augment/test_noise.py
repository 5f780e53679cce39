"""Noise: what it may and may not touch, and how much, for any text."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.data.augment import noise
from pellucid.data.augment.outcome import sentences, words

ALL = [noise.swap, noise.deletion, noise.spelling, noise.keyboard, noise.characters]
TEXT = "".join(f"The {n}th committee will announce its final decision about the budget soon.\n" for n in range(300))


def stream(seed=0):
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize("augment", ALL)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=200), seed=st.integers(0, 2**32))
def test_rate_zero_is_identity_and_everything_but_letters_and_spaces_stays(augment, text, seed):
    assert augment(text, stream(seed), 0.0).text == text
    after = augment(text, stream(seed), 0.5).text
    keep = lambda t: re.findall(r"[\W\d_]", re.sub("[ '’]", "", t))
    assert keep(after) == keep(text)
    assert augment(text, stream(seed), 0.5).text == after


def test_swap_and_keyboard_keep_what_they_promise():
    swapped = noise.swap(TEXT, stream(), 0.2)
    assert [sorted(s.split()) for s in TEXT.splitlines()] != [s.split() for s in swapped.text.splitlines()]
    for before, after in zip(TEXT.splitlines(), swapped.text.splitlines(), strict=True):
        assert sorted(before[w] for w in map(lambda s: slice(*s), words(before))) \
            == sorted(after[w] for w in map(lambda s: slice(*s), words(after)))
    hit = noise.keyboard(TEXT, stream(), 0.1)
    assert len(hit.text) == len(TEXT)
    for before, after in zip(TEXT, hit.text, strict=True):
        assert before == after or (after.lower() in noise.NEIGHBOURS[before.lower()] and before.isupper() == after.isupper())


def test_neighbouring_keys_are_those_of_qwerty():
    assert set(noise.NEIGHBOURS["g"]) == set("tyfhvb")
    assert set(noise.NEIGHBOURS["a"]) == set("qwsz")
    assert set(noise.NEIGHBOURS["p"]) == set("ol")
    assert all(a in noise.NEIGHBOURS[b] for a, near in noise.NEIGHBOURS.items() for b in near)


@pytest.mark.parametrize("augment, units", [(noise.deletion, 3300), (noise.keyboard, 19500)])
def test_the_rate_is_the_share_of_units_touched(augment, units):
    units = len(words(TEXT)) if augment is noise.deletion else sum(c.isascii() and c.isalpha() for c in TEXT)
    changed = augment(TEXT, stream(3), 0.1).changed
    assert abs(changed - 0.1 * units) < 4 * (0.09 * units) ** 0.5  # four standard deviations of a binomial


def test_deletion_never_empties_a_sentence():
    after = noise.deletion("Gone now. All of it.", stream(), 1.0)
    assert len(words(after.text)) == 2


def test_misspellings_are_the_usual_ones():
    assert "beleive" in noise._misspelt("believe")
    assert "acomodate" not in noise._misspelt("accommodate") and "accomodate" not in noise._misspelt("cat")
    assert {"its"} <= set(noise._misspelt("it's")) and {"there"} <= set(noise._misspelt("their"))
    assert "independant" in noise._misspelt("independent")


def test_sentences_end_where_a_reader_says():
    text = 'Dr. A. Smith said: "It is so." Is it?  Yes!\nIt goes on\nhere. e.g. this.\n\n# Title\n\n- one\n- two'
    assert [text[a:b] for a, b in sentences(text)] == [
        'Dr. A. Smith said: "It is so."', "Is it?", "Yes!", "It goes on\nhere.", "e.g. this.", "# Title", "- one", "- two"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab .!?\n\"'-()1\t", max_size=80))
def test_sentences_lie_in_order_and_lose_only_white_space(text):
    spans = sentences(text)
    inside = "".join(text[a:b] for a, b in spans)
    assert "".join(inside.split()) == "".join(text.split())
    assert all(a < b for a, b in spans) and all(b <= c for (_, b), (c, _) in pairwise(spans))
