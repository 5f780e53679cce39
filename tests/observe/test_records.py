"""What is recorded of a step equals what its own batch and weights give when they are computed again, plainly, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

import pellucid
from pellucid.data.dataset import Dataset
from pellucid.data.river import river
from pellucid.observe import observer as observing
from pellucid.observe.columns import INDEX
from pellucid.observe.noise import NoiseScale
from pellucid.observe.reader import Reader, is_missing
from pellucid.observe.replay import state_before
from pellucid.observe.web.river import River

STEP = 25  # a checkpoint stands before it


@pytest.fixture(scope="module")
def again(run_dir):
    """The step's batch, weights before it, loss of every token, and what each router computed."""
    replay = state_before(run_dir, STEP)
    weights = {name: w.detach().clone() for name, w in replay.model.named_parameters()}
    losses, routings, batches = [], [], replay.micro_batches()
    with torch.no_grad():
        for b in batches:
            seen = {"segment_ids": b.segment_ids_BT, "positions": b.positions_BT}
            logits = replay.model(b.tokens_BT, **seen).double()
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.targets_BT.flatten(), reduction="none",
                                                            ignore_index=-100).view(b.tokens_BT.shape))  # fmt: skip
            routings.append(replay.model.hidden_states(b.tokens_BT, **seen)[1])
    whole = lambda name: torch.cat([getattr(b, name) for b in batches])
    return {"losses": torch.cat(losses).numpy(), "real": (whole("targets_BT") >= 0).numpy(), "weights": weights,
            "positions": whole("positions_BT").numpy(), "tokens": whole("tokens_BT").numpy(),
            "targets": whole("targets_BT").numpy(), "routings": routings}  # fmt: skip


@pytest.fixture(scope="module")
def run(run_dir):
    with Reader(run_dir) as reader:
        yield reader


def recorded(run, stream, name):
    return run.frames(stream, STEP - 1, STEP)[1][0][:, INDEX[stream][name]].astype(np.float64)


def test_loss_by_position_is_that_of_the_positions_in_the_row_s_name(run, again):
    losses, tokens = recorded(run, "position", "loss"), recorded(run, "position", "tokens")
    for row in run.rows("position"):
        first, _, last = row["name"].partition("-")
        chosen = (again["positions"] >= int(first)) & (again["positions"] <= int(last or first)) & again["real"]
        assert tokens[row["id"]] == chosen.sum(), row["name"]
        if chosen.any():
            assert losses[row["id"]] == pytest.approx(again["losses"][chosen].mean(), rel=1e-5)
    assert tokens.sum() == again["real"].sum()


def test_worst_tokens_and_the_kept_row_are_those_of_the_batch(run, again):
    order = np.argsort(-np.where(again["real"], again["losses"], -1), axis=None, kind="stable")[:16]
    worst = run.worst_tokens(STEP)
    assert [w["loss"] for w in worst] == pytest.approx(again["losses"].ravel()[order].tolist(), rel=1e-5)
    place = worst[0]["row"], worst[0]["position"]
    assert (again["tokens"][place], again["targets"][place]) == (worst[0]["input"], worst[0]["target"])
    sample = next(s for s in run.samples() if s["step"] == STEP)
    np.testing.assert_array_equal(sample["tokens"], again["tokens"][0])
    np.testing.assert_array_equal(sample["targets"], again["targets"][0])
    np.testing.assert_allclose(sample["losses"], again["losses"][0], rtol=1e-4, atol=1e-6)


def test_router_statistics_are_those_of_the_router_s_scores(run, again):
    real = again["real"].reshape(-1)
    for layer in range(2):
        logits = torch.cat([r[layer].logits_NE for r in again["routings"]]).double().numpy()[real]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        order = np.sort(p, 1)[:, ::-1]
        chosen = np.argsort(-p, 1, kind="stable")[:, :2]
        tokens = np.array([(chosen == e).sum() for e in range(4)])
        gates = np.array([p[(chosen == e).any(1), e].sum() for e in range(4)])
        share = tokens / tokens.sum()
        expected = {
            "max_violation": share.max() * 4 - 1, "idle_experts": (tokens == 0).sum(),
            "token_entropy": (-(p * np.log(p)).sum(1) / math.log(4)).mean(),
            "load_entropy": math.exp(-sum(s * math.log(s) for s in share if s)) / 4,
            "top_mass": order[:, :2].sum(1).mean(), "margin": (order[:, 1] - order[:, 2]).mean(),
            "logit_max": logits.max(), "logit_min": logits.min(), "router_z": (np.log(np.exp(logits).sum(1)) ** 2).mean(),
        }  # fmt: skip
        for name, value in expected.items():
            assert recorded(run, "layer", name)[layer] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        mine = slice(4 * layer, 4 * layer + 4)
        assert recorded(run, "router", "tokens")[mine].tolist() == tokens.tolist()
        np.testing.assert_allclose(recorded(run, "router", "probability")[mine], p.mean(0), rtol=1e-5)
        np.testing.assert_allclose(recorded(run, "router", "gate_mass")[mine], gates / len(p), rtol=1e-5)
        np.testing.assert_allclose(recorded(run, "router", "mean_gate")[mine], gates / tokens, rtol=1e-5)


def test_exponent_histograms_in_the_file_are_those_of_the_weights(run, again):
    found = run.query("SELECT DISTINCT row FROM hist WHERE step = ? AND kind = 'weight'", (STEP,))
    assert found, "each step one tensor has its turn"
    for (row,) in (tuple(f.values()) for f in found):
        name, _, expert = run.rows("param")[row]["name"].partition("[")
        values = again["weights"][name]
        values = (values[int(expert[:-1])] if expert else values).numpy().ravel()
        hist = run.histogram(row, "weight", STEP)
        assert (hist["zero"], hist["nan"], hist["inf"]) == ((values == 0).sum(), 0, 0)
        exponents = np.frexp(values)[1] + 126  # IEEE's biased exponent
        for sign, counts in zip((values > 0, values < 0), hist["data"], strict=True):
            expected = np.bincount(exponents[sign], minlength=256)
            got = np.zeros(256, int)
            got[hist["first"] : hist["first"] + len(counts)] = counts
            np.testing.assert_array_equal(got, expected)


def test_share_of_zero_gradients_is_that_of_embedding_rows_without_a_token(run):
    """Tied embeddings have gradient everywhere: the output's. Norms' gradients have no zeros either."""
    names = [row["name"] for row in run.rows("param")]
    zero = recorded(run, "param", "gradient_zero")
    assert zero[names.index("final_norm.weight")] == 0 and 0 <= zero[names.index("embedding.weight")] < 0.5


def test_gap_is_held_out_loss_minus_the_mean_of_the_last_training_losses(run):
    steps, frames = run.frames("evaluation")
    _, losses = run.series("run", "loss", stream="run")
    for step, frame in zip(steps.tolist(), frames[:, 0], strict=True):
        gap = frame[INDEX["evaluation"]["gap"]]
        if step < 0:
            assert is_missing(gap[None]).all(), "before training there is nothing to compare with"
            continue
        mean = losses[max(0, step - 31) : step + 1].astype(np.float64).mean()
        assert gap == pytest.approx(frame[0] - mean, rel=1e-4, abs=1e-5)


def test_the_data_river_goes_from_the_data_s_manifest_to_the_rows(run, run_dir):
    stages = run.stages()
    dataset = pellucid.Run(run_dir).dataset()
    assert [s["name"] for s in stages] == ["read", "normalize", "split", "tokenize", "pack"]
    for stage, known in zip(stages, dataset.manifest["stages"], strict=False):
        assert known.items() <= stage["detail"].items()
    assert stages[0]["documents_in"] == 121 and all(s["documents_out"] <= s["documents_in"] for s in stages)
    assert all("samples" in s["detail"] and "dropped" in s["detail"] for s in stages)
    splits = dataset.manifest["splits"].values()
    tokens = sum(split["tokens"] for split in splits)
    assert [(s["tokens_in"], s["tokens_out"]) for s in stages] == [(None, None)] * 3 + [(None, tokens), (tokens, tokens)]
    assert stages[-1]["detail"]["rows"] == sum(split["packing"]["rows"] for split in splits)
    assert stages[-1]["detail"]["rows_per_epoch"] == dataset.train.rows_per_epoch


def test_the_page_draws_the_recorded_stages_between_the_source_and_the_batch(run, run_dir):
    manifest = pellucid.Run(run_dir).manifest
    drawn = River(run_dir, manifest).describe(run)["stages"]
    assert [s["name"] for s in drawn] == ["source", *(s["name"] for s in run.stages()), "batch"]
    assert all(before["out"] == after["into"] for before, after in itertools.pairwise(drawn[:-1])), "as wide here as there"
    elsewhere = River(run_dir, {"data": manifest["data"] | {"directory": "/not/on/this/machine", "from_run": "nor here"}})
    assert elsewhere.describe(run)["stages"] == drawn[1:] and "is not on this machine" in elsewhere.problem


def test_the_documents_of_a_step_are_told_without_reading_them_whole(run, run_dir, monkeypatch):
    known = pellucid.Run(run_dir)
    split, eos = known.dataset().split("train", 0), known.dataset().tokenizer.eos_token_id
    whole = {piece["document"]: split.document(piece["document"])["token_ids"] for piece in split.trace(STEP, 8)}
    monkeypatch.setattr(type(split), "document", None)
    pieces = River(run_dir, known.manifest).step(STEP, [], [], {"training": {"batch_size": 8}})["pieces"][:12]
    for piece in pieces:
        ids = whole[piece["document"]][piece["token_start"] : piece["token_start"] + min(piece["length"], 80)]
        assert piece["excerpt"] == split.tokenizer.decode([i for i in ids if i != eos])


def test_an_epoch_has_as_many_rows_as_the_weights_of_the_sources_make_of_it(run, run_dir):
    known = pellucid.Run(run_dir)
    wanted = known.config.data.model_copy(deep=True)
    for source in wanted.sources:
        source.weight = 2.0
    doubled = Dataset(known.dataset().directory, run=wanted)
    stages = river(doubled)
    assert stages[-1]["rows_per_epoch"] == 2 * len(doubled.train) == doubled.train.rows_per_epoch
    assert River(run_dir, known.manifest).describe(Recorded(stages))["rows_per_epoch"] == doubled.train.rows_per_epoch
    stages[-1].pop("rows_per_epoch")
    assert River(run_dir, known.manifest).describe(Recorded(stages))["rows_per_epoch"] == len(doubled.train), "a run that recorded none"


def test_a_file_cut_to_hold_out_its_end_says_so(run_dir):
    size = {"settings": {}, "bytes_in": 9, "bytes_out": 9}
    counted = [{"name": name, "documents_in": n, "documents_out": n, **size} for name, n in (("read", 1), ("normalize", 2))]
    stages = River(run_dir, {}).describe(Recorded(counted))["stages"]
    assert [(stage["title"], stage.get("cut")) for stage in stages] == [("read", 2), ("normalize", None)]


class Recorded:
    """What a reader has of a run's data."""

    def __init__(self, stages):
        self.found = stages

    def stages(self):
        return [{"detail": dict(stage)} for stage in self.found]


def test_noise_scale_finds_the_variance_of_known_gradients():
    """Per-token gradients G + noise of covariance s^2 I in 200 dimensions: tr / |G|^2 = 200 s^2 / |G|^2."""
    rng = np.random.default_rng(0)
    signal, spread = rng.standard_normal(200), 3.0
    scale = NoiseScale()
    for _ in range(400):
        small = signal + spread / math.sqrt(64) * rng.standard_normal(200)
        rest = signal + spread / math.sqrt(192) * rng.standard_normal(200)
        whole = 0.25 * small + 0.75 * rest
        found = scale.update(np.linalg.norm(0.25 * small), 64, np.linalg.norm(whole), 256)
    assert found == pytest.approx(200 * spread**2 / (signal @ signal), rel=0.25)  # a moving average of 20 steps
    assert scale.update(1.0, 64, 1.0, 64) is None, "one micro-batch tells nothing"


def test_ghost_and_missing_updates_are_told_from_tokens_and_changes():
    probe = observing.RoutingProbe(1, 4, 2)
    param = np.zeros((8, len(INDEX["param"])), np.float32)
    rows = np.arange(8).reshape(1, 4, 2)  # two stacked tensors
    param[rows[0], INDEX["param"]["update_norm"]] = [[3, 4], [0, 0], [0, 1], [0, 0]]
    found = probe._moved(np.array([[5, 7, 0, 0]]), param, rows)
    assert found["update_norm"].tolist() == [[5, 0, 1, 0]]
    assert found["ghost"].tolist() == [[False, False, True, False]], "it moved without a token"
    assert found["frozen"].tolist() == [[False, True, False, False]], "it had tokens and did not move"


def test_the_ghost_share_is_the_part_of_an_expert_s_way_that_it_went_without_tokens():
    """By hand: ways of 5, 3 and 2, of which the second without a token; each step back counts 1 % less."""
    probe = observing.RoutingProbe(1, 2, 1)
    rows = np.arange(2).reshape(1, 2, 1)
    for way, tokens in ((5, 4), (3, 0), (2, 1)):
        param = np.zeros((2, len(INDEX["param"])), np.float32)
        param[0, INDEX["param"]["update_norm"]] = way
        with np.errstate(all="ignore"):
            found = probe._moved(np.array([[tokens, 0]]), param, rows)
    assert found["ghost_share"][0, 0] == pytest.approx(3 * 0.99 / (5 * 0.99**2 + 3 * 0.99 + 2))
    assert is_missing(np.float32(found["ghost_share"][0, 1])), "it never moved"


def test_the_only_expert_of_a_layer_has_the_gradient_and_the_update_of_its_two_tensors(tiny_tables, tmp_path):
    tables = tiny_tables(max_steps=24)  # more than there are tensors: each has its turn to be compared whole
    tables["model"] |= {"num_experts": 1, "num_experts_per_tok": 1}
    tables["observe"] |= {"budget": 1.0}
    folder = pellucid.train(tables, run_dir=tmp_path / "run").directory
    with Reader(folder) as run:
        router = run.frames("router")[1]
        for stat in ("gradient_norm", "update_norm"):
            for layer in range(2):
                parts = [run.series(f"layers.{layer}.moe.{name}", stat)[1].astype(np.float64) for name in ("gate_up_proj", "down_proj")]
                assert np.isfinite(parts).any()
                np.testing.assert_allclose(router[:, layer, INDEX["router"][stat]], np.hypot(*parts), rtol=1e-6)  # float32
        row = next(row for row in run.rows("param") if row["name"] == "layers.1.moe.down_proj[0]")
        assert (row["layer"], row["expert"], row["role"], row["numel"]) == (1, 0, "down_proj", 16 * 16)
        assert run.histogram(row["name"], "weight")["data"].sum() == row["numel"], "of the expert, as where there are several"


def test_times_and_mfu_are_those_of_the_step(tiny_tables, tmp_path, monkeypatch):
    monkeypatch.setattr(observing, "peak_flops", lambda device: 1e12)
    folder = pellucid.train(tiny_tables(max_steps=5), run_dir=tmp_path / "run").directory
    with Reader(folder) as run:
        value = lambda name: run.series("run", name, stream="run")[1].astype(np.float64)
        flops = run.meta["flops_per_token"]
        np.testing.assert_allclose(value("mfu"), value("tokens") * flops / value("step_seconds") / 1e12, rtol=1e-5)
        saving = value("checkpoint_seconds")
        assert saving[3] > 0 and saving[[0, 1, 2, 4]].tolist() == [0, 0, 0, 0], "one checkpoint, before step 3"
        assert (saving <= value("between_seconds")).all()
        assert (value("host_memory") > 5e7).all() and is_missing(run.frames("run")[1][:, 0, INDEX["run"]["device_memory"]]).all()
