"""The loop: budgets, clean stops, resuming bit for bit, steps that are skipped, damage and changed settings."""

import copy
import json
import math
import os
import re
import shutil
import signal

import pytest
import torch

import pellucid.run as runs
from pellucid.config import UserError, make_config
from pellucid.observe.observer import SilentObserver
from pellucid.observe.reader import Reader
from pellucid.run import train
from pellucid.run_files import Run
from pellucid.training import checkpoint
from pellucid.training.evaluate import Evaluation
from pellucid.training.loop import Loop, budget_in_steps
from pellucid.training.schedules import learning_rate_factor


class Recorder(SilentObserver):
    """Hears what every step did; can send a signal, or poison a gradient, at chosen steps."""

    def __init__(self, model=None, signal_at=None, number=signal.SIGTERM, poison=()):
        self.model, self.signal_at, self.number, self.poison = model, signal_at, number, poison
        self.losses, self.rates, self.held_out, self.skipped, self.now = {}, {}, {}, [], None

    def begin_step(self, step):
        self.now = step
        if step == self.signal_at:
            os.kill(os.getpid(), self.number)

    def after_backward(self, batch):
        if self.now in self.poison:
            self.model.embedding.weight.grad[5] = math.nan

    def end_step(self, step, result):
        self.losses[step], self.rates[step] = result.loss, result.learning_rate
        if not result.applied:
            self.skipped.append(step)

    def evaluation(self, step, result):
        self.held_out[step] = (result.loss, result.tokens)


@pytest.fixture
def recorded(monkeypatch):
    """A function: train with a Recorder in the observer's place; returns (run, recorder)."""

    def go(tables, folder, resume=False, **recorder):
        heard = Recorder(**recorder)

        def open_recorder(run_dir, model, optimizer, config, dataset):
            heard.model = model
            return heard

        monkeypatch.setattr(runs, "open_observer", open_recorder)
        try:
            return train(tables, run_dir=folder, resume=resume), heard
        finally:
            go.heard = heard

    return go


# ------------------------------------------------------------------------------------------ budgets


def budget(**training):
    tables = {"model": {"hidden_size": 16}, "data": {"sequence_length": 32}, "training": {"batch_size": 4, **training}}

    class Rows:
        rows_per_epoch = 10
        steps_in_all = staticmethod(lambda batch_size: None)

    return budget_in_steps(make_config(tables), Rows)


def test_budgets_in_steps_tokens_and_epochs_round_up_to_whole_steps():
    assert budget(max_steps=7) == 7
    assert budget(max_tokens=4 * 32 * 5) == 5 and budget(max_tokens=4 * 32 * 5 + 1) == 6
    assert budget(max_epochs=2) == 5 and budget(max_epochs=0.5) == 2


def test_epochs_see_every_row_that_often(tiny_tables, tmp_path, recorded):
    tables = tiny_tables(max_steps=None, max_epochs=2)
    run, heard = recorded(tables, tmp_path / "run")
    split = run.dataset().train
    assert len(heard.losses) == math.ceil(2 * split.rows_per_epoch / 4)
    seen = [int(i) for step in range(len(heard.losses)) for i in split.batch(step, 4).sample_ids_B]
    assert sorted(seen[: 2 * len(split)]) == sorted([*range(len(split))] * 2)


def test_learning_rate_of_every_step_is_the_schedules(tiny_tables, tmp_path, recorded):
    tables = tiny_tables()
    _, heard = recorded(tables, tmp_path / "run")
    config = make_config(tables)
    peak = config.optimizer.muon_learning_rate
    assert heard.rates == {s: pytest.approx(peak * learning_rate_factor(config.schedule, s, 12)) for s in range(12)}


def test_training_lowers_the_held_out_loss(tiny_tables, tmp_path, recorded):
    _, heard = recorded(tiny_tables(max_steps=60, evaluate_every=0), tmp_path / "run")
    first, last = heard.held_out[0][0], heard.held_out[60][0]
    assert first == pytest.approx(math.log(260), rel=0.02)
    assert last < first - 1
    assert sorted(heard.held_out) == [0, 60]


def test_last_evaluation_takes_every_held_out_row(tiny_tables, tmp_path, recorded):
    run, heard = recorded(tiny_tables(evaluate_rows=1), tmp_path / "run")
    split = run.dataset().validation
    assert heard.held_out[12][1] == int((split.rows(0, len(split)).targets_BT != -100).sum())
    assert heard.held_out[5][1] == int((split.rows(0, 1).targets_BT != -100).sum())


def test_without_held_out_text_nothing_is_evaluated(tiny_tables, tmp_path, recorded):
    tables = tiny_tables()
    tables["data"]["validation_fraction"] = 0.0
    run, heard = recorded(tables, tmp_path / "run")
    assert heard.held_out == {} and (run.directory / "model" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------- resuming bit for bit


VARIANTS = {
    "fp32-muon": {},
    "bf16-adamw": {"precision": "bf16"},
    "fp32-bias": {"balance_bias_rate": 0.01, "balance_loss": "none", "z_loss": 1e-4, "micro_batch_size": 1},
    "bf16-adafactor": {"precision": "bf16", "router_z_loss": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_unbroken_run_bit_for_bit(variant, tiny_tables, tmp_path, recorded, final_state):
    tables = tiny_tables(**VARIANTS[variant])
    tables["optimizer"]["name"] = variant.split("-")[1].replace("bias", "sgd")
    unbroken, whole = recorded(tables, tmp_path / "unbroken")
    assert unbroken.stopped_by is None

    broken, first = recorded(tables, tmp_path / "broken", signal_at=4)
    assert broken.stopped_by == "SIGTERM"
    assert list(first.losses) == [0, 1, 2, 3, 4], "the step in progress is finished"
    assert checkpoint.exists(broken.directory / "checkpoints", 5) and not (broken.directory / "model").exists()
    broken, second = recorded(None, tmp_path / "broken", resume=True, signal_at=8, number=signal.SIGINT)
    assert broken.stopped_by == "SIGINT" and list(second.losses) == [5, 6, 7, 8]
    broken, third = recorded(tables, tmp_path / "broken", resume=True)
    assert broken.stopped_by is None

    assert {**first.losses, **second.losses, **third.losses} == whole.losses, "every loss, to the last bit"
    assert {**first.held_out, **second.held_out, **third.held_out} == whole.held_out
    assert final_state(broken.directory) == final_state(unbroken.directory)
    states = [checkpoint.newest_good(r.directory / "checkpoints").state for r in (broken, unbroken)]
    assert states[0] == states[1]


def test_recorded_losses_of_a_resumed_run_equal_those_of_an_unbroken_one(tiny_tables, tmp_path, monkeypatch):
    """The same through run.sqlite, as any reader sees it."""
    tables, keep = tiny_tables(), runs.open_observer

    def stops_at_4(run_dir, model, optimizer, config, dataset):
        observer = keep(run_dir, model, optimizer, config, dataset)
        begin = observer.begin_step
        observer.begin_step = lambda step: (begin(step), os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None)
        return observer

    train(tables, run_dir=tmp_path / "unbroken")
    monkeypatch.setattr(runs, "open_observer", stops_at_4)
    train(tables, run_dir=tmp_path / "broken")
    monkeypatch.setattr(runs, "open_observer", keep)
    train(tables, run_dir=tmp_path / "broken", resume=True)
    whole, broken = (losses_in_store(tmp_path / name) for name in ("unbroken", "broken"))
    assert [step for step, _ in whole] == list(range(12))
    assert broken == whole


def test_a_run_that_goes_on_unobserved_shows_no_step_that_was_done_again(tiny_run, tiny_tables, tmp_path):
    shutil.copytree(tiny_run.directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-12")
    last = max(checkpoint.saved_steps(tmp_path / "run" / "checkpoints"))
    tables = tiny_tables()
    tables["observe"] = {"enabled": False}
    train(tables, run_dir=tmp_path / "run", resume=True)
    assert [step for step, _ in losses_in_store(tmp_path / "run")] == list(range(last))


def losses_in_store(run_dir):
    with Reader(run_dir) as reader:
        steps, losses = reader.series("run", "loss", stream="run")
    return list(zip(steps.tolist(), losses.tolist(), strict=True))


def test_checkpoint_holds_what_the_fresh_process_needs_and_nothing_is_random(tiny_tables, tmp_path, recorded, final_state):
    """The global generator may be in any state: it decides nothing."""
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        recorded(tiny_tables(), tmp_path / name)
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


def test_seed_changes_the_run(tiny_tables, tmp_path, recorded, tiny_run, final_state):
    recorded(tiny_tables(seed=1), tmp_path / "run")
    assert set(final_state(tmp_path / "run").values()).isdisjoint(final_state(tiny_run.directory).values())


# ------------------------------------------------------------------------------- non-finite steps


def test_bad_steps_are_skipped_counted_and_training_goes_on(tiny_tables, tmp_path, recorded):
    run, heard = recorded(tiny_tables(max_nonfinite_steps=3), tmp_path / "run", poison=(3, 4, 8))
    assert heard.skipped == [3, 4, 8] and len(heard.losses) == 12
    counters = checkpoint.newest_good(run.directory / "checkpoints").state["counters"]
    assert (counters["skipped"], counters["skipped_in_a_row"], counters["step"]) == (3, 0, 12)


def test_too_many_bad_steps_stop_and_the_run_goes_on_from_before_them(tiny_tables, tmp_path, recorded, tiny_run, final_state):
    folder = tmp_path / "a run"
    with pytest.raises(UserError, match="not finite 2 times in a row, and none of them was applied") as stopped:
        recorded(tiny_tables(max_nonfinite_steps=2), folder, poison=(7, 8))
    lower = "optimizer.learning_rate=0.0003 optimizer.muon_learning_rate=0.002"  # a tenth of what they are
    for command in (f"(pellucid trace '{folder}' --step 7)", f" from step 6: pellucid train {lower} --run-dir '{folder}' --resume"):
        assert command in str(stopped.value)
    assert max(checkpoint.saved_steps(folder / "checkpoints")) == 6 and not (folder / "model").exists()
    _, heard = recorded(None, folder, resume=True)
    assert list(heard.losses) == list(range(6, 12)) and final_state(folder) == final_state(tiny_run.directory)


def test_a_rate_that_blows_the_weights_up_costs_no_checkpoint_from_before(tiny_tables, tmp_path, recorded, final_state):
    """The first update at this rate leaves finite weights at which every gradient is NaN, at whatever rate."""
    def tables(rate, **training):
        settings = tiny_tables(max_steps=30, max_nonfinite_steps=4, evaluate_every=0, **training)
        return settings | {"optimizer": {"name": "sgd", "learning_rate": rate}, "checkpoint": {"every_steps": 2, "keep_last": 2}}

    recorded(tables(0.1), tmp_path / "good")
    folder = tmp_path / "run"
    recorded(tables(0.1), folder, signal_at=6)
    for _ in range(3):
        with pytest.raises(UserError, match="not finite 4 times in a row") as stopped:
            recorded(tables(1e30), folder, resume=True)
        assert 7 in checkpoint.saved_steps(folder / "checkpoints")
    assert "from step 7, after removing" in str(stopped.value), stopped.value
    for name in re.findall(r"step-\d+", str(stopped.value)):
        shutil.rmtree(folder / "checkpoints" / name)
    _, heard = recorded(tables(0.1), folder, resume=True)
    assert list(heard.losses) == list(range(7, 30)) and not heard.skipped
    assert final_state(folder) == final_state(tmp_path / "good")
    assert len(checkpoint.saved_steps(folder / "checkpoints")) == 2, "what is from before good steps goes again"


# --------------------------------------------------------------------- damage, changes, second thoughts


@pytest.fixture(scope="module")
def stopped(tiny_tables, tmp_path_factory):
    """A run stopped after step 7, with checkpoints of steps 5 (best), 6 and 7. Copy it before use."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    before = runs.open_observer
    runs.open_observer = lambda *arguments: Recorder(signal_at=6)
    try:
        train(tiny_tables(), run_dir=folder)
    finally:
        runs.open_observer = before
    assert {6, 7} <= checkpoint.saved_steps(folder / "checkpoints").keys()
    return folder


@pytest.fixture
def copied(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_corrupted_newest_checkpoint_is_named_and_the_one_before_used(
    file, copied, recorded, monkeypatch, tiny_run, final_state
):
    path = copied / "checkpoints" / "step-7" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = []
    monkeypatch.setattr(runs.Quiet, "say", lambda self, text: said.append(text))
    _, heard = recorded(None, copied, resume=True)
    assert any(str(path) in text and "damaged" in text for text in said), said
    assert list(heard.losses) == list(range(6, 12))
    assert final_state(copied) == final_state(tiny_run.directory)


def test_with_every_checkpoint_damaged_resuming_refuses(copied, recorded):
    for path in copied.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is intact"):
        recorded(None, copied, resume=True)


def test_run_without_any_checkpoint_starts_over(copied, recorded, tiny_run, final_state):
    shutil.rmtree(copied / "checkpoints")
    _, heard = recorded(None, copied, resume=True)
    assert list(heard.losses) == list(range(12)) and final_state(copied) == final_state(tiny_run.directory)


CHANGES = {
    "model.num_experts_per_tok": ("model", {"num_experts_per_tok": 1}),
    "model.max_attn_value": ("model", {"max_attn_value": 20.0}),
    "data.sequence_length": ("data", {"sequence_length": 16}),
    "data.tokenizer.kind": ("data", {"tokenizer": {"kind": "bpe", "vocab_size": 300}}),
    "training.seed": ("training", {"seed": 5}),
    "training.batch_size": ("training", {"batch_size": 2}),
    "optimizer.name": ("optimizer", {"name": "sgd"}),
    "training.precision": ("training", {"precision": "bf16"}),
}


@pytest.mark.parametrize("key", CHANGES)
def test_changed_settings_refuse_to_resume_and_are_named(key, copied, tiny_tables, recorded):
    section, values = CHANGES[key]
    tables = copy.deepcopy(tiny_tables())
    tables[section] |= values
    before = (copied / "config.toml").read_text()
    with pytest.raises(UserError, match=rf"cannot resume.*{key} was .*, is "):
        recorded(tables, copied, resume=True)
    assert (copied / "config.toml").read_text() == before


def test_changed_text_refuses_to_resume(tiny_folder, tiny_tables, tmp_path, recorded):
    shutil.copytree(tiny_folder / "corpus", tmp_path / "corpus")
    tables = tiny_tables()
    tables["data"] |= {"sources": [str(tmp_path / "corpus")], "directory": str(tmp_path / "data")}
    recorded(tables, tmp_path / "run")
    with open(tmp_path / "corpus" / "03.txt", "a") as file:
        file.write("one more line\n")
    with pytest.raises(UserError, match=r"cannot resume, its data have changed since .* put the sources back"):
        recorded(tables, tmp_path / "run", resume=True)


def test_longer_budget_continues_is_written_down_and_lasts(copied, tiny_tables, recorded):
    run, heard = recorded(tiny_tables(max_steps=20), copied, resume=True, signal_at=9)
    assert run.stopped_by and list(heard.losses) == [7, 8, 9]
    run, heard = recorded(None, copied, resume=True)
    assert list(heard.losses) == list(range(10, 20)), "the longer budget was remembered"
    (change,) = json.loads((copied / "manifest.json").read_text())["changes"]
    assert (change["step"], change["settings"]) == (7, ["training.max_steps was 12, is 20"])
    assert change["before"]["training"]["max_steps"] == 12


def test_a_budget_below_what_is_done_is_refused_and_not_written_down(copied, tiny_tables, recorded):
    before = {path: path.read_bytes() for path in (copied / "config.toml", copied / "manifest.json")}
    with pytest.raises(UserError, match="has done 7 steps already, more than the 6 that are asked for"):
        recorded(tiny_tables(max_steps=6), copied, resume=True)
    assert {path: path.read_bytes() for path in before} == before
    recorded(tiny_tables(max_steps=7), copied, resume=True)
    assert (copied / "model").is_dir()


def test_finished_run_resumes_to_itself(tiny_run, tmp_path, recorded, final_state):
    shutil.copytree(tiny_run.directory, tmp_path / "run")
    run, heard = recorded(None, tmp_path / "run", resume=True)
    assert heard.losses == {} and run.stopped_by is None
    assert final_state(tmp_path / "run") == final_state(tiny_run.directory)


def test_a_finished_run_that_goes_on_has_no_model_until_it_ends_again(tiny_run, tiny_tables, tmp_path, recorded):
    shutil.copytree(tiny_run.directory, tmp_path / "run")
    run, _ = recorded(tiny_tables(max_steps=20), tmp_path / "run", resume=True, signal_at=14)
    assert run.stopped_by and not (run.directory / "model").exists(), "the one of 12 steps would be taken for the run's"
    recorded(None, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "model").is_dir()


def test_a_damaged_last_checkpoint_is_written_again(tiny_run, tmp_path, recorded, final_state):
    shutil.copytree(tiny_run.directory, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-12" / "model.safetensors").write_bytes(b"")
    recorded(None, tmp_path / "run", resume=True)
    checkpoint.verify(tmp_path / "run" / "checkpoints" / "step-12")
    assert final_state(tmp_path / "run") == final_state(tiny_run.directory)


def test_signal_during_the_last_step_saves_and_resuming_only_finishes(
    tiny_tables, tmp_path, recorded, tiny_run, final_state
):
    run, _ = recorded(tiny_tables(), tmp_path / "run", signal_at=11)
    assert run.stopped_by == "SIGTERM" and not (run.directory / "model").exists()
    run, heard = recorded(None, tmp_path / "run", resume=True)
    assert heard.losses == {} and final_state(run.directory) == final_state(tiny_run.directory)


def test_second_interrupt_stops_at_once(tiny_tables, tmp_path, recorded):
    class Impatient(Recorder):
        def after_backward(self, batch):
            if self.now == 4:
                os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    before = runs.open_observer
    runs.open_observer = lambda *arguments: Impatient(signal_at=4, number=signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny_tables(), run_dir=tmp_path / "run")
    finally:
        runs.open_observer = before
    assert signal.getsignal(signal.SIGINT) is handler, "the old handlers are back"
    assert max(checkpoint.saved_steps(tmp_path / "run" / "checkpoints")) == 3


def test_run_describes_itself(tiny_run):
    run = Run(tiny_run.directory)
    assert run.manifest["data"]["fingerprint"] == run.dataset().fingerprint
    assert run.manifest["parameters"]["total"] == sum(p.numel() for p in run.load()[0].parameters())
    assert str(tiny_run.directory) in repr(run)


@pytest.mark.parametrize(("losses", "best"), [
    ((3.0, 1.0, 2.0), 20), ((1.0, 2.0, 3.0), 10), ((math.nan, 3.0, 2.0), 30), ((3.0, math.nan, 2.0), 30), ((0.0, 1.0, 2.0), 10)])
def test_best_checkpoint_is_kept_beside_the_newest(losses, best, tiny_tables, tmp_path, recorded, monkeypatch):
    def evaluate(loop, rows):
        loss = losses[loop.counters.step // 10 - 1] if loop.counters.step in (10, 20, 30) else 9.0
        return Evaluation(nats=loss, tokens=1)

    monkeypatch.setattr(Loop, "evaluate", evaluate)
    tables = tiny_tables(max_steps=34, evaluate_every=10)
    tables["checkpoint"] = {"every_steps": 4, "keep_last": 1}
    run, _ = recorded(tables, tmp_path / "run")
    steps = checkpoint.saved_steps(run.directory / "checkpoints")
    assert set(steps) == {best, 34}
    assert checkpoint.verify(steps[best])["best"] and not checkpoint.verify(steps[34])["best"]


def test_tokens_are_counted_without_padding_also_over_a_resume(copied, tiny_run, recorded):
    recorded(None, copied, resume=True)
    split = tiny_run.dataset().train
    expected = sum(int((split.batch(step, 4).targets_BT != -100).sum()) for step in range(12))
    for folder in (copied, tiny_run.directory):
        assert checkpoint.newest_good(folder / "checkpoints").state["counters"]["tokens"] == expected
