"""What experts do, on routings made so that the answer is known, and on a real run by another way of counting."""

import math
import shutil

import numpy as np
import pytest
import torch

from pellucid.config import UserError, make_config
from pellucid.measure.experts import (
    CLASSES,
    churn,
    information,
    measure_experts,
    redundancy,
    specialisation,
    token_classes,
)
from pellucid.measure.texts import token_streams
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.run import train

E = 4


def test_experts_that_follow_the_class_tell_all_of_it():
    classes = np.arange(4000) % E
    follow = specialisation(classes[None, :, None], classes, np.arange(4000) // 100, E)[0]
    assert follow["bits"]["mean"] == pytest.approx(2.0, abs=2e-3)
    assert follow["load"] == [0.25] * 4
    assert follow["lift"][0] == [4.0, 0.0, 0.0, 0.0] and follow["lift"][len(CLASSES) - 1] == [None] * 4


def test_experts_drawn_by_chance_tell_nothing():
    rng = np.random.default_rng(0)
    classes, chosen = rng.integers(0, 4, 20_000), rng.integers(0, E, (1, 20_000, 1))
    found = specialisation(chosen, classes, np.arange(20_000) // 200, E)[0]
    assert abs(found["bits"]["mean"]) < 1e-3, "standard error of some 2e-4 bits"


@pytest.mark.parametrize("preference", [0.0, 0.6])
def test_the_interval_of_the_information_holds_the_truth_also_where_documents_differ(preference):
    """100 experiments of 30 documents, each with its own classes and leaning to its own experts; 2.2 % is the standard error."""
    rng, inside, above = np.random.default_rng(1), 0, 0
    table = 0.25 * (preference * np.eye(4) + (1 - preference) * 0.25)  # shares of class and expert
    truth = information(table)
    for _ in range(100):
        owners, classes, chosen = np.arange(3000) // 100, np.zeros(3000, int), np.zeros(3000, int)
        for g in range(30):
            kinds, lean = rng.dirichlet(np.full(4, 3.0)), np.stack([rng.dirichlet(40 * 4 * row) for row in table])
            mine = rng.choice(16, 100, p=(kinds[:, None] * lean).ravel())
            classes[owners == g], chosen[owners == g] = mine // 4, mine % 4
        bits = specialisation(chosen[None, :, None], classes, owners, E)[0]["bits"]
        inside += bits["low"] <= truth <= bits["high"]
        above += bits["low"] > truth
        assert bits["low"] <= bits["mean"] <= bits["high"]
    assert inside >= 88 and above <= 8


def test_information_of_a_known_table():
    table = np.array([[30.0, 10.0], [10.0, 30.0]]) * 1e6
    assert information(table) == pytest.approx(1 + 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25), abs=1e-6)


def test_churn_counts_sets_not_orders():
    before = np.array([[[0, 1], [2, 3], [0, 2], [1, 3]]])
    after = np.array([[[1, 0], [2, 3], [0, 3], [1, 2]]])
    found = churn([(0, before), (10, after), (20, after)], np.array([0, 0, 1, 1]), E, 2)
    assert [row["layers"][0]["mean"] for row in found["steps"]] == [0.5, 0.0]
    assert [row["to_last"][0]["mean"] for row in found["steps"]] == [0.5, 0.0]
    assert found["chance"] == pytest.approx(5 / 6)
    assert churn([(0, before)], np.zeros(4, int), E, 2) is None


def small_model():
    tables = {"model": {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
                        "num_attention_heads": 2, "num_experts": E}}  # fmt: skip
    return initialize(Grok1(make_config(tables).model))


def test_copied_experts_are_found_in_weights_updates_and_outputs():
    model, start = small_model(), small_model()
    moe = model.layers[0].moe
    with torch.no_grad():
        moe.gate_up_proj[1], moe.down_proj[1] = moe.gate_up_proj[0], moe.down_proj[0]
        moe.down_proj[3] = -moe.down_proj[2]
        moe.gate_up_proj[3] = moe.gate_up_proj[2]
    pieces = [(0, np.arange(4, 30))]
    found = redundancy(model, start, pieces)[0]
    assert found["weights"][0][1] == pytest.approx(1.0) and abs(found["weights"][0][2]) < 0.2
    assert found["outputs"][0][1] == pytest.approx(1.0) and found["outputs"][2][3] == pytest.approx(-1.0)
    moved = small_model()
    with torch.no_grad():
        for e, way in enumerate((1.0, 1.0, -1.0, 0.5)):
            moved.layers[0].moe.down_proj[e] += way
    updates = np.array(redundancy(moved, start, pieces)[0]["updates"])
    assert updates == pytest.approx(np.outer([1, 1, -1, 1], [1, 1, -1, 1]), abs=1e-4), "fp32 sums"


def test_outputs_are_those_of_the_layer(tiny_run):
    """The mean of a layer's own mixture of two experts follows from what redundancy computes for one of them."""
    model, tokens = small_model(), np.arange(4, 30)
    moe = model.layers[0].moe
    with torch.no_grad():  # all experts equal: the mixture is the expert's output times the sum of the gates
        moe.gate_up_proj[:] = moe.gate_up_proj[:1].clone()
        moe.down_proj[:] = moe.down_proj[:1].clone()
    assert np.array(redundancy(model, None, [(0, tokens)])[0]["outputs"]) == pytest.approx(np.ones((E, E)))


def test_token_classes_of_bytes(tiny_run):
    _, tokenizer = tiny_run.load()
    classes = token_classes(tokenizer, tokenizer.vocab_size)
    of = lambda character: CLASSES[classes[tokenizer.encode(character)[0]]]
    assert [of(c) for c in "a7.\n "] == ["word part", "number", "punctuation", "space or line end", "space or line end"]


def test_experts_of_a_run(tiny_run):
    model, tokenizer = tiny_run.load()
    streams = token_streams(str(tiny_run.directory), None, tokenizer, 10**6)
    outcome = measure_experts(model, tokenizer, streams, context=32, run=tiny_run.directory)
    found = outcome.numbers
    assert [row["to"] for row in found["churn"]["steps"]][-1] == 12, "from the initial model to the last checkpoint"
    assert found["churn"]["steps"][0]["from"] == 0
    assert all(0 <= layer["mean"] <= 1 for row in found["churn"]["steps"] for layer in row["layers"])
    assert found["redundancy"][0]["updates"] is not None
    counts = np.zeros(4)
    for stream in streams:  # the load of the first layer, counted over again
        for start in range(0, len(stream) - 1, 32):
            _, routings = model.hidden_states(torch.from_numpy(stream[start : start + 32])[None])
            counts += np.bincount(routings[0].expert_index_Nk.flatten().numpy(), minlength=4)
    assert found["specialisation"][0]["load"] == pytest.approx((counts / counts.sum()).tolist())
    assert len(outcome.findings) == 4 and len(outcome.charts) == 4


def test_a_run_from_another_model_began_with_its_weights(tiny_run, tiny_tables, tmp_path):
    tables = tiny_tables(max_steps=3)
    tables["model"] = {"init_from": str(tiny_run.directory)}
    run = train({**tables, "data": {**tables["data"], "directory": str(tmp_path / "data")}}, run_dir=tmp_path / "run")
    model, tokenizer = run.load()
    streams = token_streams(str(run.directory), None, tokenizer, 10**6)
    measured = lambda: measure_experts(model, tokenizer, streams, context=32, run=run.directory).numbers
    before, _ = tiny_run.load()
    found = measured()
    expected = redundancy(model, before, [(g, s[i : i + 32]) for g, s in enumerate(streams) for i in range(0, len(s) - 1, 32)])
    assert found["redundancy"][0]["updates"] == pytest.approx(np.array(expected[0]["updates"]), abs=1e-6)
    assert found["churn"]["steps"][0]["from"] == 0
    shutil.rmtree(run.directory / "checkpoints" / "step-0")
    found = measured()
    assert found["redundancy"][0]["updates"] is None, "its beginning is not known any more"
    assert found["churn"] is None, "one snapshot"


def test_a_dense_model_has_nothing_to_compare(tiny_run):
    tables = {"model": {"vocab_size": 32, "hidden_size": 16, "num_experts": 1, "num_experts_per_tok": 1}}
    with pytest.raises(UserError, match="one expert"):
        measure_experts(Grok1(make_config(tables).model), None, [np.arange(9)], context=8)
