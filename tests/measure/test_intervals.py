"""Bootstrap intervals against the normal theory they must agree with, and their coverage."""

import numpy as np
import pytest

from pellucid.measure.intervals import crossed, ratio


def test_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = ratio(values, np.ones(400))
    half = 1.96 * values.std() / 20  # bootstrap variance is that of the sample, divided by n
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-12)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half), "2,000 draws place an end within 10 %"
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_documents_are_drawn_and_not_tokens():
    rng = np.random.default_rng(2)
    level, counts = rng.normal(0, 1, 50), np.full(50, 1000.0)  # all tokens of a document are alike
    found = ratio(level * counts, counts)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * level.std() / 50**0.5, rel=0.15)


def test_columns_share_their_draws():
    values = np.random.default_rng(3).normal(0, 1, (60, 1))
    found = ratio(np.hstack([values, values + 5]), np.ones((60, 2)))
    assert np.subtract(found["low"][1], found["low"][0]) == pytest.approx(5, abs=1e-9)


def test_a_true_difference_of_zero_is_inside_nineteen_times_of_twenty():
    """Seeds and documents both vary; 200 repetitions give a standard error of 1.5 %, and 3 seeds are coarse."""
    rng, inside = np.random.default_rng(4), 0
    for repetition in range(200):
        sums = rng.normal(0, 1, (4, 1)) + rng.normal(0, 1, 40) + rng.normal(0, 1, (4, 40))
        found = crossed(sums, np.ones(40), draws=300, seed=repetition)
        inside += found["low"] <= 0 <= found["high"]
    assert inside >= 170


def test_crossed_without_seeds_is_ratio():
    values = np.random.default_rng(5).normal(0, 1, 30)
    a, b = crossed(values[None], np.ones(30)), ratio(values, np.ones(30))
    assert (a["mean"], a["low"], a["high"]) == pytest.approx((b["mean"], b["low"], b["high"]))
