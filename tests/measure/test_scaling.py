"""The fit of the scaling law on runs made from known constants, and against SciPy's own global optimum of them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pellucid.config import UserError
from pellucid.measure.scaling import scaling_outcome, shape
from pellucid.measure.scaling_law import DELTA, Law, bootstrap, constants, fit

CHINCHILLA = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # as refitted by Besiroglu et al. 2024, table 1
SMALL = Law(2.1, 40.0, 300.0, 0.42, 0.5)


def runs(law, N, D, noise=0.0, seed=0):
    N, D = (axis.ravel() for axis in np.meshgrid(N, D))
    return N, D, law.loss(N, D) * np.exp(np.random.default_rng(seed).normal(0, noise, N.shape))


@pytest.mark.parametrize(("law", "N", "D"), [
    (CHINCHILLA, np.geomspace(4e7, 1.6e10, 6), np.geomspace(1e9, 5e11, 6)),
    (SMALL, [2e4, 6e4, 2e5], [1e5, 4e5, 1.6e6])])  # fmt: skip
def test_known_constants_come_back(law, N, D):
    found = fit(*runs(law, np.array(N), np.array(D)))
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-4), name


def test_one_wild_run_is_outvoted():
    N, D, loss = runs(CHINCHILLA, np.geomspace(4e7, 1.6e10, 6), np.geomspace(1e9, 5e11, 6))
    loss[7] *= 1.5
    found = fit(N, D, loss)
    assert found.E == pytest.approx(CHINCHILLA.E, rel=0.01) and found.alpha == pytest.approx(CHINCHILLA.alpha, rel=0.05)


def test_no_other_law_fits_noisy_runs_better():
    from scipy.optimize import differential_evolution

    N, D, loss = runs(SMALL, np.geomspace(2e4, 2e5, 4), np.geomspace(1e5, 2e6, 4), noise=0.01, seed=1)

    def objective(law):
        error = np.abs(np.log(law.loss(N, D)) - np.log(loss))
        return np.where(error <= DELTA, 0.5 * error**2, DELTA * (error - 0.5 * DELTA)).sum() / DELTA**2

    bounds = [(0.05, 3.0), (1.0, 8.0), (1.0, 10.0), (0.05, 1.5), (0.05, 1.5)]
    other = differential_evolution(lambda v: objective(Law(v[0], np.exp(v[1]), np.exp(v[2]), v[3], v[4])), bounds, seed=0,
                                   maxiter=120, polish=False)  # fmt: skip
    assert objective(fit(N, D, loss)) <= other.fun * (1 + 1e-6)


def test_optimal_size_lies_on_the_budget_and_no_neighbour_is_better():
    for flops in (1e18, 5.76e23):
        N, D = CHINCHILLA.optimal(flops)
        assert 6 * N * D == pytest.approx(flops)
        best = CHINCHILLA.loss(N, D)
        assert all(CHINCHILLA.loss(N * f, D / f) > best for f in (0.9, 0.99, 1.01, 1.1))


def test_intervals_hold_the_truth():
    N, D, loss = runs(SMALL, np.geomspace(2e4, 4e5, 5), np.geomspace(1e5, 4e6, 5), noise=0.003, seed=3)
    law = fit(N, D, loss)
    table = constants(law, bootstrap(N, D, loss, law, draws=60, seed=0))
    for name in ("E", "alpha", "beta"):
        assert table[name]["low"] * 0.9 < getattr(SMALL, name) < table[name]["high"] * 1.1, name
        assert table[name]["low"] < table[name]["mean"] < table[name]["high"]


def test_an_E_of_nothing_is_as_unsure_as_the_runs_leave_it():
    """Losses of nine runs of 200 to 600 steps: the best law has no E, and other draws of them have one of more than two nats."""
    N, D = np.repeat([14480, 46880, 175344], 3), np.tile([3296, 6592, 9888], 3)
    loss = np.array([4.5352, 4.1815, 3.9746, 4.2485, 3.9030, 3.6267, 4.1320, 3.7040, 3.4435])
    results = {f"run-{i}": {"parameters": {"active": int(n)}, "tokens": int(d), "held_out": float(v)}
               for i, (n, d, v) in enumerate(zip(N, D, loss, strict=True))}
    trial = {"parameters": {"active": 448576}, "tokens": 13184, "held_out": 3.22}
    outcome = scaling_outcome({**results, "trial": trial}, draws=15)
    E = outcome.numbers["law"]["E"]
    assert E["mean"] < 1e-6 and E["low"] < 1e-6 and E["high"] > 1
    assert any("hardly fix E, A, alpha" in sentence for sentence in outcome.findings)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_the_fit_starts_no_threads_that_would_wait_for_each_other():
    code = ("import os; from pellucid.measure.scaling_law import _optimizer; threads = lambda: len(os.listdir('/proc/self/task'));"
            "before = threads(); _optimizer(); print(threads() - before)")  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout.strip() == "0"


def test_outcome_predicts_the_trial_run():
    N, D, _ = runs(SMALL, [2e4, 6e4, 2e5], [1e5, 4e5, 1.6e6])
    of = lambda n, d: {"parameters": {"active": int(n)}, "tokens": int(d), "held_out": float(SMALL.loss(n, d))}
    results = {f"run-{i}": of(n, d) for i, (n, d) in enumerate(zip(N, D, strict=True))}
    told = []
    outcome = scaling_outcome({**results, "trial": of(8e5, 6.4e6)}, draws=20, progress=lambda *call: told.append(call))
    assert told == [("fitting the law", n, 20) for n in range(1, 21)]
    trial = outcome.numbers["trial"]
    assert trial["predicted"] == pytest.approx(trial["loss"], rel=1e-4) and abs(trial["error"]) < 1e-4
    assert trial["error_of_no_gain"] > 0.01
    assert outcome.numbers["budgets"][0]["N"] == pytest.approx(SMALL.optimal(6 * 8e5 * 6.4e6)[0], rel=0.01)


@pytest.mark.parametrize(("N", "D"), [([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), ([1, 1, 1, 1, 2, 2, 2, 2], [1, 2, 3, 4] * 2)])
def test_runs_that_fix_no_law_are_refused(N, D):
    """Of two sizes any exponent is as good as another: E + A / N^alpha takes two values, and has three constants."""
    with pytest.raises(UserError, match=r"6 different runs.*three sizes and three amounts"):
        fit(N, D, np.ones(len(N)))


def test_shapes_of_the_ladder():
    from pellucid.config import make_config

    base = make_config({"model": {"preset": "tiny"}})
    assert shape("small", base) == {"preset": "small"}
    table = shape("48", base)
    assert (table["num_hidden_layers"], table["num_attention_heads"], table["num_experts"]) == (2, 3, 8)
    for bad in ("tine", "17", "0"):
        with pytest.raises(UserError, match="--sizes"):
            shape(bad, base)


def test_runs_too_short_for_a_power_law_are_told():
    """In the first hundred steps each doubling of the text gains more than the last; later, as in any law, less."""
    N, D, loss = runs(SMALL, [2e4, 6e4, 2e5], [1e5, 2e5, 4e5], noise=0.003)
    early = np.array([5.59, 5.30, 5.21, 5.21, 4.98, 4.71, 4.79, 4.38, 3.99])  # three sizes at three amounts
    for values, expected in ((loss, False), (early, True)):
        results = {f"run-{i}": {"parameters": {"active": int(n)}, "tokens": int(d), "held_out": float(v)}
                   for i, (n, d, v) in enumerate(zip(N, D, values, strict=True))}
        trial = {"parameters": {"active": 400_000}, "tokens": 800_000, "held_out": 3.0}
        outcome = scaling_outcome({**results, "trial": trial}, draws=5)
        assert outcome.numbers["still_falling"] is expected
        assert any("too short for a law" in sentence for sentence in outcome.findings) is expected
