"""Every view of diversity on texts whose answer is known in closed form."""

import math
import random

import numpy as np
import pytest

from pellucid.config import UserError
from pellucid.data.stages.textview import TextView
from pellucid.measure.diversity import (
    compression,
    contamination,
    entropy,
    hashed_features,
    heaps,
    measure_diversity,
    mixture,
    near_duplicates,
    vendi,
)
from pellucid.measure.texts import Texts


def words(rng, count, vocabulary, prefix="w"):
    return " ".join(f"{prefix}{rng.randrange(vocabulary)}" for _ in range(count))


def test_entropies_of_independent_uniform_words():
    rng = random.Random(0)
    views = [TextView(words(rng, 5000, 16)) for _ in range(8)]
    for n in (1, 2, 3):
        found = entropy(views, n)
        assert found["bits"] == pytest.approx(n * math.log2(16), abs=0.01), "40,000 words: error of some 1e-3 bits"
        assert found["conditional_bits"] == pytest.approx(4.0, abs=0.01)


def test_a_cycle_of_words_has_log2_of_its_length_and_no_surprise():
    view = TextView(" ".join(["one", "two", "three", "four"] * 1000))
    assert entropy([view], 1)["bits"] == pytest.approx(2.0, abs=2e-3)
    assert entropy([view], 2)["conditional_bits"] == pytest.approx(0.0, abs=2e-3)
    assert entropy([view], 2)["distinct"] == pytest.approx(4 / 3999)


def test_ngrams_do_not_cross_documents():
    assert entropy([TextView("a b"), TextView("c d")], 2)["count"] == 2


def test_random_hexadecimal_needs_four_bits_a_byte_and_copies_nothing():
    rng = random.Random(1)
    text = "".join(rng.choices("0123456789abcdef", k=40_000))
    once, twice = compression([text]), compression([text, text])
    assert 4.0 <= once["bits_per_byte"] < 4.5
    assert twice["ratio"] == pytest.approx(2 * once["ratio"], rel=0.02)


@pytest.mark.parametrize("beta", [0.4, 0.7, 1.0])
def test_heaps_exponent_of_a_sequence_built_to_have_it(beta):
    """Word n is new when floor(n ** beta) has just grown, else the first word again."""
    n = np.arange(1, 60_001, dtype=float)
    new = np.diff(np.floor(n**beta), prepend=0) > 0
    stream = np.where(new, np.cumsum(new), 1).astype(np.uint64)
    found = heaps([stream])
    assert found["beta"]["mean"] == pytest.approx(beta, abs=0.02)
    assert found["types"][-1] == len(np.unique(stream))


def test_near_duplicate_rate_is_the_share_of_planted_copies():
    rng = random.Random(2)
    own = [words(rng, 120, 5000) for _ in range(40)]
    copies = []
    for text in own[:10]:  # one word of 120 changed: Jaccard of 5-grams is 111 / 121
        parts = text.split()
        parts[60] = "changed"
        copies.append(" ".join(parts))
    found = near_duplicates([TextView(text) for text in own + copies + ["too short"]])
    assert found["documents"] == 10 and found["judged"] == 50
    assert found["rate"]["mean"] == pytest.approx(10 / 50), "of those that could be judged"
    assert near_duplicates([TextView(text) for text in own])["documents"] == 0
    assert near_duplicates([TextView(own[0])] * 7)["documents"] == 6, "seven copies are one and six more"


def test_mixture_entropy():
    shares = [1, 1, 2, 4]
    blend = mixture(Texts([f"{'x' * 100 * share}" for share in shares], list("abcd")))
    assert blend["bits"] == pytest.approx(1.75) and blend["effective_sources"] == pytest.approx(2**1.75)
    assert mixture(Texts(["x"], ["a"])) == {"bits": 0.0, "effective_sources": 1.0, "shares": {"a": 1.0}}


def test_vendi_score_counts_what_differs():
    assert vendi(np.eye(12)) == pytest.approx(12)
    assert vendi(np.ones((12, 3))) == pytest.approx(1)
    groups = np.eye(3)[[0] * 6 + [1] * 3 + [2] * 3]  # shares 1/2, 1/4, 1/4
    assert vendi(groups) == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert vendi(np.zeros((4, 2))) == pytest.approx(4), "nothing in common with anything"


def test_hashed_features_of_equal_and_of_unlike_texts():
    rng = random.Random(3)
    same, unlike = "a few words that are the same", [words(rng, 5, 10**9, f"{n}x") for n in range(10)]
    assert vendi(hashed_features([TextView(same)] * 10)) == pytest.approx(1)
    assert vendi(hashed_features([TextView(text) for text in unlike])) > 9.5, "but for collisions in 4,096 slots"


def test_overlap_is_the_share_of_copied_runs():
    rng = random.Random(4)
    train, fresh = words(rng, 400, 10**6), words(rng, 400, 10**6, "held")
    shared = " ".join(train.split()[100:150])
    held_out = [fresh, f"{shared} {words(rng, 50, 10**6, 'new')}", "short"]
    found = contamination([TextView(train)], held_out, 13)
    assert found["judged"] == 2
    assert found["touched"]["mean"] == 0.5
    assert found["overlap"]["mean"] == pytest.approx((50 - 12) / (400 - 12 + 100 - 12))


def test_documents_too_short_to_be_judged_are_told():
    short, long = ["one of four words"] * 300, ["six words are enough for it"] * 2
    says = lambda texts, held_out=None: measure_diversity(Texts(texts, ["a"] * len(texts)), held_out).findings
    assert "Near-duplicates cannot be told: every document has under five words." in says(short)
    found = says(short + long, Texts(["a few"], ["b"]))
    assert "50.0% of 2 documents (1) are near-duplicates of another; 300 of under five words cannot be judged." in found
    assert "Held-out text: none of its 1 documents has 13 words, so none can be judged." in found
    assert "50.0% of 2 documents (1) are near-duplicates of another." in says([word * 1000 for word in ("a b c d e ", "a b c d e ")])


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match="1,000"):
        measure_diversity(Texts(["three small words"], ["a"]))
