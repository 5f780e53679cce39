"""Learning rate schedules against their closed forms."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.config import ScheduleConfig
from pellucid.training.schedules import learning_rate_factor

NAMES = ["constant", "linear", "cosine", "inverse_sqrt", "wsd"]


def config(name, **fields):
    return ScheduleConfig(**{"name": name, "warmup_steps": 10, "final_factor": 0.1} | fields)


@pytest.mark.parametrize("name", NAMES)
def test_warmup_starts_above_zero_and_reaches_the_peak_in_its_last_step(name):
    factors = [learning_rate_factor(config(name), step, 100) for step in range(10)]
    assert factors == [(step + 1) / 10 for step in range(10)]


@pytest.mark.parametrize("name", NAMES)
def test_no_warmup_starts_at_the_peak(name):
    assert learning_rate_factor(config(name, warmup_steps=0), 0, 100) == 1.0


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("constant", 99, 1.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.55),
        ("linear", 100, 0.1),
        ("cosine", 10, 1.0),
        ("cosine", 40, 0.1 + 0.9 * 0.75),  # a third of the way: (1 + cos 60°) / 2
        ("cosine", 55, 0.55),
        ("cosine", 100, 0.1),
        ("inverse_sqrt", 39, 0.5),
        ("inverse_sqrt", 999, 0.1),
        ("wsd", 79, 1.0),
        ("wsd", 80, 1.0),
        ("wsd", 85, 0.1 + 0.9 * 0.5),  # a quarter of the decay: 1 - sqrt(1/4)
        ("wsd", 100, 0.1),
    ],
)
def test_closed_forms(name, step, expected):
    assert math.isclose(learning_rate_factor(config(name), step, 100), expected, rel_tol=1e-12)


@given(
    st.sampled_from(NAMES),
    st.integers(0, 60),
    st.integers(1, 200),
    st.floats(0, 1),
    st.floats(0.01, 1),
)
def test_factors_stay_in_range_and_never_rise_after_warmup(name, warmup, max_steps, final, fraction):
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, final_factor=final, decay_fraction=fraction)
    factors = [learning_rate_factor(schedule, step, max_steps) for step in range(max_steps + 20)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(factor > 0 for factor in factors[:max_steps])  # no step is spent at zero
    after = factors[warmup:]
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(after))
