"""The order of samples: permutations, exact shares, and nothing but (seed, sample number) behind them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from pellucid.data.order import permute, sample_rows


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permutations_are_uniform():
    """Each of 7 elements comes to each of 7 places equally often: chi-squared, 36 degrees of freedom."""
    keys = 20_000
    places = permute(np.tile(np.arange(7), keys), 7, np.repeat(np.arange(keys, dtype=np.uint64), 7)).reshape(keys, 7)
    counts = np.stack([np.bincount(places[:, i], minlength=7) for i in range(7)])
    statistic = ((counts - keys / 7) ** 2 / (keys / 7)).sum()
    assert chi2.sf(statistic, 36) > 1e-4


def test_neighbours_are_not_neighbours_afterwards():
    order = permute(np.arange(10_000), 10_000, 1)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert not np.array_equal(order, permute(np.arange(10_000), 10_000, 2))


def test_an_epoch_is_every_row_once_and_epochs_differ():
    rows, quotas = np.array([5, 0, 8]), np.array([5, 0, 8])
    epochs = sample_rows(np.arange(39), rows, quotas, seed=3).reshape(3, 13)
    assert (np.sort(epochs, axis=1) == np.arange(13)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_weights_give_exact_shares_and_no_row_twice_before_all_once():
    rows, quotas = np.array([10, 4]), np.array([5, 12])  # weights 0.5 and 3
    samples = sample_rows(np.arange(17 * 4), rows, quotas, seed=0)
    for epoch in samples.reshape(4, 17):
        assert ((epoch < 10).sum(), (epoch >= 10).sum()) == (5, 12)
    counts = np.bincount(samples, minlength=14)
    assert counts[:10].tolist() == [2] * 10 and counts[10:].tolist() == [12] * 4
    first_two_epochs = samples[:34]
    assert sorted(first_two_epochs[first_two_epochs < 10].tolist()) == list(range(10))  # each once in 2 * 0.5 passes


@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(0, 2**63))
def test_samples_do_not_depend_on_how_they_are_asked_for(start, count, seed):
    rows, quotas = np.array([100, 31]), np.array([150, 31])
    together = sample_rows(np.arange(start, start + count), rows, quotas, seed)
    alone = [int(sample_rows(np.array([k]), rows, quotas, seed)[0]) for k in range(start, start + count)]
    assert together.tolist() == alone


def test_the_order_is_pinned():
    """A change of these numbers changes what every existing run would see next."""
    samples = sample_rows(np.arange(10), np.array([100]), np.array([100]), seed=0)
    assert samples.tolist() == [17, 58, 39, 83, 32, 67, 92, 21, 8, 69]
