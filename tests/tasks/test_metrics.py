"""Measures of labelled documents against scikit-learn and SciPy."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as peer

from pellucid.training import metrics

classes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@given(classes)
def test_classification_measures_are_scikit_learns(pairs):
    true, predicted = np.array(pairs).T
    table = metrics.confusion_matrix(true, predicted, 5)
    assert np.array_equal(table, peer.confusion_matrix(true, predicted, labels=range(5)))
    assert metrics.accuracy(table) == pytest.approx(peer.accuracy_score(true, predicted))
    assert metrics.macro_f1(table) == pytest.approx(peer.f1_score(true, predicted, average="macro"))


def test_regression_measures_are_those_of_the_peers():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, (50, 3)).astype(float)  # many ties
    predicted = np.round(true + rng.normal(0, 2, true.shape))
    assert metrics.rmse(true, predicted) == pytest.approx(
        peer.root_mean_squared_error(true, predicted, multioutput="raw_values"))
    assert metrics.r2(true, predicted) == pytest.approx(peer.r2_score(true, predicted, multioutput="raw_values"))
    expected = [scipy.stats.spearmanr(true[:, k], predicted[:, k]).statistic for k in range(3)]
    assert metrics.spearman(true, predicted) == pytest.approx(expected)


def test_what_is_undefined_is_nan():
    constant, other = np.ones((4, 1)), np.arange(4.0)[:, None]
    assert np.isnan(metrics.r2(constant, other)).all() and np.isnan(metrics.spearman(constant, other)).all()
    assert np.isnan(metrics.f1_scores(metrics.confusion_matrix(np.array([0]), np.array([0]), 2))[1])
