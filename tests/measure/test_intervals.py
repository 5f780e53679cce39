"""Bootstrap intervals against the normal theory they must agree with, and their coverage."""

import numpy as np
import pytest
from scipy.stats import t as student_t

from pellucid.measure.intervals import crossed, ratio, share, student, student_point
from pellucid.measure.outcome import spread


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


@pytest.mark.parametrize("documents", [2, 3, 6, 12])
def test_few_documents_hold_the_truth_as_often_as_many(documents):
    """Documents of 1 to 400 tokens, 600 repetitions (standard error 0.9 %): unlike lengths cost some 2 %."""
    rng, inside = np.random.default_rng([6, documents]), 0
    for _ in range(600):
        counts = rng.integers(1, 400, documents) if documents > 2 else np.ones(2)
        found = ratio(rng.normal(3.0, 0.5, documents) * counts, counts, draws=300)
        inside += found["low"] <= 3.0 <= found["high"]
    assert inside >= 0.9 * 600


def test_of_one_document_nothing_follows_about_others():
    found = ratio(np.array([30.0]), np.array([10.0]))
    assert found == {"mean": 3.0, "low": -np.inf, "high": np.inf}
    assert share(np.array([3.0]), np.array([10.0])) == {"mean": 0.3, "low": 0.0, "high": 1.0}
    assert spread(found) == "3.000 (no interval from one document)"


def test_a_share_stays_one():
    found = share(np.array([0.0, 0.0, 9.0]), np.array([10.0, 10.0, 10.0]))
    assert found["mean"] == pytest.approx(0.3) and (found["low"], found["high"]) == (0.0, 1.0)


@pytest.mark.parametrize("documents", [5, 34, 400])
def test_documents_that_all_agree_leave_room_for_those_that_were_not_drawn(documents):
    """Clopper & Pearson: at the bound, such a sample comes one time in forty."""
    ones = np.ones(documents)
    none, every = share(0 * ones, 3 * ones), share(3 * ones, 3 * ones)
    assert (none["mean"], none["low"], every["mean"], every["high"]) == (0.0, 0.0, 1.0, 1.0)
    assert (1 - none["high"]) ** documents == pytest.approx(0.025) and every["low"] ** documents == pytest.approx(0.025)


def test_a_rare_thing_is_inside_as_often_as_a_frequent_one():
    """1 document in 33, 34 of them: in a third of the samples there is none."""
    rng = np.random.default_rng(7)
    found = [share((rng.random(34) < 0.03).astype(float), np.ones(34), draws=200) for _ in range(400)]
    assert sum(each["low"] <= 0.03 <= each["high"] for each in found) >= 0.92 * 400


def test_columns_share_their_draws():
    values = np.random.default_rng(3).normal(0, 1, (60, 1))
    found = ratio(np.hstack([values, values + 5]), np.ones((60, 2)))
    assert np.subtract(found["low"][1], found["low"][0]) == pytest.approx(5, abs=1e-9)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seed, of_document, of_both", [(1, 1, 1), (1, 0.1, 0.1), (0, 1, 0)])
def test_a_true_difference_of_zero_is_inside_nineteen_times_of_twenty(seeds, of_seed, of_document, of_both):
    """Seeds, documents, and both together vary. 400 repetitions give a standard error of 1.1 %: 92 % is three below."""
    rng, inside = np.random.default_rng([4, seeds]), 0
    for _ in range(400):
        sums = of_seed * rng.normal(0, 1, (seeds, 1)) + of_document * rng.normal(0, 1, 40)
        found = crossed(sums + of_both * rng.normal(0, 1, (seeds, 40)), np.ones(40), draws=300)
        inside += found["low"] <= 0 <= found["high"]
    assert inside >= 0.92 * 400


def test_crossed_is_students_interval_where_only_seeds_differ():
    """12.706 standard errors, by a table, for two seeds; the documents' 100 tokens and 300 tokens weigh as they are long."""
    found = crossed(np.array([[300.0, 900.0], [400.0, 1200.0]]), np.array([100.0, 300.0]))
    assert (found["low"], found["high"]) == pytest.approx((3.5 - 12.706 * 0.5, 3.5 + 12.706 * 0.5), abs=1e-3)


def test_student_intervals():
    for degrees in (*range(1, 30), 100):
        assert student_point(degrees) == pytest.approx(student_t.ppf(0.975, degrees), rel=1e-9)
    found = student(np.array([3.0, 4.0, 5.0]))
    assert found["high"] - found["mean"] == pytest.approx(4.302653 / 3**0.5)


def test_crossed_without_seeds_is_ratio():
    values = np.random.default_rng(5).normal(0, 1, 30)
    a, b = crossed(values[None], np.ones(30)), ratio(values, np.ones(30))
    assert (a["mean"], a["low"], a["high"]) == pytest.approx((b["mean"], b["low"], b["high"]))
