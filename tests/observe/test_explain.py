"""An explanation is proven: replay = record, terms = change, gradient = chain rule = finite difference."""

import dataclasses
import shutil
import sqlite3

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import small_config, write_corpus
from rich.console import Console

import pellucid
from pellucid.config import UserError
from pellucid.model.kernels import native
from pellucid.observe import explain as explaining
from pellucid.observe.columns import INDEX
from pellucid.observe.explain import explain, term_words
from pellucid.observe.explain_text import explain_text
from pellucid.observe.explain_view import render
from pellucid.observe.proofs import independent_tokens
from pellucid.observe.replay import capsule_path, state_before
from pellucid.observe.theatre import theatre_path
from pellucid.training import checkpoint
from pellucid.training.optimizers.sgd import sgd

NAMES = (
    "layers.0.moe.gate_up_proj", "layers.1.moe.down_proj", "layers.0.attention.q_proj.weight",
    "layers.1.attention.o_proj.weight", "layers.1.moe.router.weight", "layers.0.post_moe_norm.weight", "embedding.weight",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_parameter_is_explained_with_all_proofs(run_dir, name):
    e = explain(run_dir, 30, name)
    failed = [proof for proof in e.proofs if proof.holds is False]
    assert not failed, failed
    assert e.proofs[0].holds and "bit for bit" in e.proofs[0].detail
    assert all(p.holds for p in e.proofs), e.proofs
    assert sum(e.terms.values()) == pytest.approx(e.change, rel=1e-12)
    assert e.weight_before + e.change == e.weight_after
    lines = dict(e.lines)
    assert lines["after clipping"] == pytest.approx(lines["gradient, before clipping"] * e.clip_factor)


def test_a_step_is_found_from_the_beginning_as_well_as_from_a_checkpoint(run_dir):
    """Steps 20 and 25: before the first checkpoint, and at it."""
    for step in (20, 25):
        e = explain(run_dir, step, "layers.0.moe.down_proj", (1, 2, 3))
        assert e.proofs[0].holds, e.proofs[0]
        assert e.index == [1, 2, 3]


def test_a_term_left_out_and_a_replay_that_went_another_way_are_not_proven(run_dir, monkeypatch):
    honest = explaining.explain_update

    def without_momentum(*arguments, **more):
        update = honest(*arguments, **more)
        del update.terms["momentum"]
        return update

    monkeypatch.setattr(explaining, "explain_update", without_momentum)
    e = explain(run_dir, 30, "layers.0.moe.down_proj")
    assert [p.claim for p in e.proofs if p.holds is False] == ["terms + rounding = weight after - weight before"]
    monkeypatch.undo()
    with sqlite3.connect(run_dir / "run.sqlite") as file:
        (blob,) = file.execute("SELECT data FROM frame WHERE stream = 'run' AND step = 31").fetchone()
        values = np.frombuffer(blob, "<f4").copy()
        values[INDEX["run"]["gradient_norm"]] *= 1 + 1e-6
        file.execute("UPDATE frame SET data = ? WHERE stream = 'run' AND step = 31", (values.tobytes(),))
    assert explain(run_dir, 31).proofs[0].holds is False
    monkeypatch.setattr(explaining, "other_kernels", lambda recorded: f"not the kernels called {recorded}")
    assert explain(run_dir, 31).proofs[0].detail.endswith(f"; not the kernels called {native.serving()}")
    with sqlite3.connect(run_dir / "run.sqlite") as file:
        file.execute("UPDATE frame SET data = ? WHERE stream = 'run' AND step = 31", (blob,))


def test_where_a_checkpoint_follows_the_weight_is_compared_with_it(run_dir):
    """Checkpoints at 50 and 60."""
    said = lambda step: [p for p in explain(run_dir, step, "layers.1.moe.down_proj").proofs if "checkpoint" in p.claim]
    (proof,) = said(49)
    assert said(30) == [] and proof.holds and "bit for bit" in proof.detail
    file = checkpoint.saved_steps(run_dir / "checkpoints")[50] / "model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:1000])
        (proof,) = said(49)
    finally:
        file.write_bytes(content)
    assert proof.holds is None and "cannot be read" in proof.detail


def test_a_difference_quotient_too_unsure_to_tell_proves_nothing():
    agreement = explaining._agreement
    assert agreement("", 1.04, 1.0, 0.045).holds and agreement("", 1.04, 1.0, 0.01).holds is False
    unsure = agreement("", 1.6, 1.0, 1.5)
    assert unsure.holds is None and "too unsure" in unsure.detail


def test_the_difference_quotient_of_a_text_that_repeats_itself_claims_no_more_than_it_knows(run_dir):
    """All tokens round alike: as if there were but one of each."""
    replay = state_before(run_dir, 30)
    (ordinary, *_) = replay.micro_batches()
    assert 10 < independent_tokens([ordinary], 256) < 256
    same = replay.dataset.tokenizer.encode("ab" * 32)
    tokens = torch.tensor([same] * 4)
    repetitive = dataclasses.replace(ordinary, tokens_BT=tokens, targets_BT=tokens.roll(-1, dims=1))
    assert independent_tokens([repetitive], 256) == pytest.approx(2)
    labelled = dataclasses.replace(repetitive, labels_BTK=torch.zeros(4, 64, 1))
    assert independent_tokens([labelled], 4) == 4


def test_of_a_bf16_run_the_steps_own_gradient_stands_beside_the_one_that_is_proven(tmp_path):
    write_corpus(tmp_path / "corpus")
    config = small_config(tmp_path, precision="bf16", max_steps=8)
    folder = pellucid.train(config, run_dir=tmp_path / "run").directory
    e = explain(folder, 5, "layers.1.moe.router.weight")
    lines = dict(e.lines)
    own, exact = lines["gradient, before clipping"], lines["the same made in fp32"]
    assert own != exact and own == pytest.approx(exact, rel=0.3)
    assert e.proofs[0].holds and sum("in fp32" in p.claim for p in e.proofs) == 3
    beside = next(p for p in e.proofs if "the step's gradient" in p.claim)
    assert beside.holds is None and f"{own:.7g} and {exact:.7g}" in beside.detail


def test_replaying_to_the_end_gives_the_final_checkpoint_bit_for_bit(run_dir):
    saved = checkpoint.saved_steps(run_dir / "checkpoints")
    last = max(saved)
    replay = state_before(run_dir, last - 3)
    while replay.step < last:
        replay.advance()
    for name, tensor in checkpoint.load(saved[last]).tensors["model"].items():
        assert torch.equal(replay.model.state_dict()[name], tensor), name


def test_the_capsule_holds_the_tensors_of_the_explanation(run_dir):
    name = "layers.1.attention.k_proj.weight"
    e = explain(run_dir, 31, name)
    tensors = safetensors.torch.load_file(capsule_path(run_dir, 31))
    place = tuple(e.index)
    assert tensors[f"before.{name}"][place].item() == e.weight_before
    assert tensors[f"after.{name}"][place].item() == e.weight_after
    assert tensors["tokens"].shape == (8, 64)


def test_a_run_that_cannot_be_written_to_is_explained_all_the_same(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("capsules"))
    (tmp_path / "run" / "capsules").touch()  # where the folder would stand: root may write anywhere else
    assert explain(tmp_path / "run", 31).as_dict() == explain(run_dir, 31).as_dict()


def test_a_sentence_is_better_predicted_after_one_step_on_it(run_dir):
    e = explain_text(run_dir, "the cat sees a dog.")
    assert all(proof.holds is not False for proof in e.proofs), e.proofs
    assert e.loss_after < e.loss and len(e.predictions) == len("the cat sees a dog.") + 1
    assert e.predictions[-1].token == "(end)"
    mean = lambda values: sum(values) / len(e.predictions)
    assert mean(p.after for p in e.predictions) > mean(p.before for p in e.predictions)
    assert checkpoint.newest_good(run_dir / "checkpoints") is not None, "the run itself is as it was"


def test_the_explanation_is_told_before_its_play_is_made_and_where_that_takes_long_there_is_none(run_dir, monkeypatch):
    there = []
    explain(run_dir, 33, on_explained=lambda e: there.append((e.step, theatre_path(run_dir, 33).is_file())))
    assert there == [(33, False)] and theatre_path(run_dir, 33).is_file()
    monkeypatch.setitem(explaining.PLAYED_FLOPS, "cpu", 1e6)
    explain(run_dir, 34)
    monkeypatch.undo()
    monkeypatch.setattr(explaining, "MOST_PLAYED", 1)
    explain(run_dir, 35)
    assert not theatre_path(run_dir, 34).exists() and not theatre_path(run_dir, 35).exists()


def test_after_a_schedule_that_ended_at_zero_a_sentence_is_learnt_at_the_peak_rate_and_that_is_said(run_dir, tmp_path):
    ended = shutil.copytree(run_dir, tmp_path / "ended")
    settings = (ended / "config.toml").read_text()
    assert "final_factor = 0.1" in settings
    (ended / "config.toml").write_text(settings.replace("final_factor = 0.1", "final_factor = 0.0"))
    e = explain_text(ended, "the cat sees a dog.")
    assert e.change != 0 and e.loss_after < e.loss and e.settings["learning_rate"] == 3e-3
    assert "learning rate 0.003: the run's peak (its schedule has 0 for step 60)" == e.note


def test_rendering_shows_numbers_and_proofs(run_dir):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    e = explain_text(run_dir, "a dog")
    console.print(render(e))
    shown = console.export_text()
    e.predictions[0].expected_before, e.predictions[0].expected_after = " ", "a"
    console.print(render(e))
    assert "' ' -> 'a'" in console.export_text()
    assert f"{e.weight_after:.9g}" in shown and "proven" in shown and "first choice" in shown


def test_mistakes_are_one_sentence(run_dir):
    with pytest.raises(UserError, match=r"did you mean 'layers.0.moe.router.weight'"):
        explain(run_dir, 3, "layers.0.router.weight")
    with pytest.raises(UserError, match=r"has the shape \[4, 32\]"):
        explain(run_dir, 3, "layers.0.moe.router.weight", (9, 9))
    with pytest.raises(UserError, match="there is no step 100000: the run has done the steps 0 to 59"):
        explain(run_dir, 100000)
    with pytest.raises(UserError, match="give between"):
        explain_text(run_dir, "")


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, True)])
def test_the_decay_of_sgd_is_told_by_the_formula_that_gives_its_number(momentum, nesterov):
    settings = {"learning_rate": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.3}
    weight = torch.tensor([2.0])
    decay = sgd(weight, torch.ones(1), {}, **settings).terms["decay"].item()
    said = term_words("decay", "sgd", settings).removeprefix("decay: ")
    assert eval(said, settings | {"lr": 0.1, "w": 2.0}) == pytest.approx(decay)
