"""Capacity: what is compared is equal where it should be, bits are counted as the paper counts them, little is remembered whole."""

import math

import pytest

from pellucid.config import ModelConfig, UserError
from pellucid.measure.capacity import LENGTH, VOCABULARY, capacity_jobs, capacity_outcome, dense_shape, variants
from pellucid.measure.plan import Job, Plan
from pellucid.model.size import parameter_counts


def counts(table):
    return parameter_counts(ModelConfig(**table))


@pytest.mark.parametrize("parameters", [38_400, 60_000, 100_000, 316_000])
def test_dense_shapes_have_the_parameters_asked_for(parameters):
    table = dense_shape(parameters)
    assert counts(table)["total"] == pytest.approx(parameters, rel=0.03)
    assert 0.2 < counts(table)["embedding"] / parameters < 0.9


def test_mixtures_equal_the_dense_model_in_what_they_say():
    known = variants(100_000, [], ["mixture", "bf16"])
    dense, active, total = (counts(known[name]["model"]) for name in ("dense", "mixture, equal active", "mixture, equal total"))
    assert active["active"] == pytest.approx(dense["active"], rel=0.02) and active["total"] > 1.2 * dense["total"]
    assert total["total"] == pytest.approx(dense["total"], rel=0.02) and total["active"] < 0.95 * dense["active"]
    assert list(known) == ["dense", "mixture, equal active", "mixture, equal total", "dense, bf16"]


def made_jobs(losses):
    """(jobs, results) of dense runs of known final loss in nats: {(load, seed): (count, loss)}."""
    jobs, results = [], {}
    for (load, seed), (count, loss) in losses.items():
        settings = {"data": {"count": count, "length": 32, "vocab_size": 9, "seed": seed},
                    "about": {"model": "dense", "size": 1000, "load": load, "seed": seed}}  # fmt: skip
        job = Job(f"{load}-{seed}", "", settings)
        jobs.append(job)
        curve = [{"train": 1.0}, {"train": loss}]
        results[job.name] = {"parameters": {"total": 1000, "active": 800}, "held_out": loss, "curve": curve}
    return jobs, results


def test_bits_are_entropy_minus_cross_entropy():
    """8 symbols, 3 bits each; a loss of ln 2 leaves 1 bit a token: 2 of 3 are remembered."""
    outcome = capacity_outcome(*made_jobs({(1.0, 0): (50, math.log(2)), (2.0, 0): (100, math.log(8)), (1.0, 1): (50, math.log(2))}))
    (model,) = outcome.numbers["models"]
    assert outcome.numbers["runs"][0]["bits"] == pytest.approx(50 * 32 * 2) and model["load"] == 1.0
    assert model["per_parameter"]["mean"] == pytest.approx(3.2) and model["per_active"]["mean"] == pytest.approx(4.0)
    assert "3.20 (3.20 to 3.20) bits a parameter, 11.1 % below the published 3.6" in outcome.findings[0]
    low = capacity_outcome(*made_jobs({(1.0, 0): (50, math.log(4))}))
    assert "1.60 bits a parameter, 55.6 % below" in low.findings[0] and low.numbers["models"][0]["per_parameter"]["low"] is None


@pytest.mark.parametrize(("count", "loss", "says"), [
    (50, 0.1 * math.log(2), "4.64 bits a parameter of the 4.80 there were: the load bounds it"),  # nearly all there was
    (20, math.log(4), "0.64 bits a parameter of the 1.92 there were: the load bounds it"),  # 3.6 there never were
    (50, 0.5 * math.log(2), "4.00 bits a parameter, 11.1 % above the published 3.6")])  # fmt: skip
def test_what_the_load_bounds_is_not_compared_with_the_published_figure(count, loss, says):
    (sentence,) = capacity_outcome(*made_jobs({(1.0, 0): (count, loss)})).findings
    assert says in sentence and ("below" in sentence or "above" in sentence) is ("bounds" not in says)


def test_a_few_sequences_are_remembered_nearly_whole(tmp_path):
    jobs = capacity_jobs([38_400], [0.02], epochs=300, seeds=1)
    outcome = capacity_outcome(jobs, Plan(jobs, tmp_path).run())
    (run,) = outcome.numbers["runs"]
    assert run["random_bits"] == jobs[0].settings["data"]["count"] * LENGTH * math.log2(VOCABULARY - 1)
    assert 0.9 * run["random_bits"] < run["bits"] < run["random_bits"]
    assert outcome.numbers["models"][0]["bounded"]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="unknown adamax"):
        capacity_jobs([40_000], [1.0], epochs=1, compare=["adamax"])
    with pytest.raises(UserError, match="--parameters 100"):
        capacity_jobs([100], [1.0], epochs=1)
