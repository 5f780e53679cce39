"""A step is replayed with the settings and threads it was done with, whatever the run was continued with since."""

import json

import pytest
import torch

from pellucid.config import UserError
from pellucid.observe.explain import explain
from pellucid.observe.replay import capsule_path, settings_of_step, state_before
from pellucid.run import train
from pellucid.run_files import Run


@pytest.fixture(scope="module")
def continued(tiny_tables, tmp_path_factory):
    """12 steps at one learning rate, then 12 more at a quarter of it; step 8 and step 11 explained in between."""
    folder = tmp_path_factory.mktemp("continued") / "run"
    tables = tiny_tables()
    tables["optimizer"]["name"] = "adamw"
    train(tables, run_dir=folder)
    explain(folder, 8, "layers.0.moe.gate_up_proj")
    explain(folder, 11, "layers.0.moe.gate_up_proj")
    tables["training"]["max_steps"] = 24
    tables["optimizer"]["learning_rate"] = tables["optimizer"]["learning_rate"] / 4
    train(tables, run_dir=folder, resume=True)
    return folder


@pytest.mark.parametrize("step", [3, 10, 12, 20])
def test_steps_before_and_after_a_change_of_settings_come_out_as_recorded(continued, step):
    explained = explain(continued, step, "layers.1.moe.down_proj")
    assert explained.proofs[0].holds, explained.proofs[0]
    assert state_before(continued, step).config.optimizer.learning_rate == (3e-3 if step < 12 else 3e-3 / 4)


def test_a_resume_forgets_capsules_of_steps_that_are_done_again(tiny_tables, tmp_path):
    tables = tiny_tables()
    train(tables, run_dir=tmp_path / "run")
    for step in (8, 10):
        explain(tmp_path / "run", step, "layers.0.moe.gate_up_proj")
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"), key=lambda f: int(f.name.removeprefix("step-")))
    (newest / "model.safetensors").write_bytes(b"damaged")  # so it resumes from step 9
    train(tables, run_dir=tmp_path / "run", resume=True)
    assert capsule_path(tmp_path / "run", 8).exists() and not capsule_path(tmp_path / "run", 10).exists()


def test_steps_done_again_with_other_settings_belong_to_these(tiny_tables, tmp_path):
    """Continued from step 12 to 24 at another rate; then step 24 is lost, and the run goes on from 21 at a third one."""
    tables, folder = tiny_tables(), tmp_path / "run"
    train(tables, run_dir=folder)
    for rate, steps in ((1e-3, 24), (5e-4, 30)):
        tables["optimizer"]["learning_rate"], tables["training"]["max_steps"] = rate, steps
        train(tables, run_dir=folder, resume=True)
        if steps == 24:
            (folder / "checkpoints" / "step-24" / "model.safetensors").write_bytes(b"damaged")
    rates = [settings_of_step(folder, Run(folder).config, step)[0].optimizer.learning_rate for step in (11, 12, 20, 21, 29)]
    assert rates == [3e-3, 1e-3, 1e-3, 5e-4, 5e-4]


def test_a_step_not_yet_done_is_refused(tiny_tables, tmp_path):
    train(tiny_tables(), run_dir=tmp_path / "run")
    settings = tmp_path / "run" / "config.toml"
    settings.write_text(settings.read_text().replace("max_steps = 12", "max_steps = 40"))
    with pytest.raises(UserError, match="there is no step 15: the run has done the steps 0 to 11"):
        explain(tmp_path / "run", 15)


def test_a_run_goes_on_with_as_many_threads_as_before(tiny_tables, tmp_path, monkeypatch, final_state):
    """Else its sums would round differently; a number the user asked for stands, and is kept with the steps it was used for."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder, longer = tmp_path / "run", tiny_tables(max_steps=18)
    try:
        torch.set_num_threads(2)
        train(tiny_tables(), run_dir=folder)
        torch.set_num_threads(1)
        train(longer, run_dir=folder, resume=True)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        train(tiny_tables(max_steps=20), run_dir=folder, resume=True)
    finally:
        torch.set_num_threads(1)
    config = Run(folder).config
    assert [settings_of_step(folder, config, step)[1] for step in (5, 15, 19)] == [2, 2, 1]
    assert "threads was 2, is 1" in json.loads((folder / "manifest.json").read_bytes())["changes"][-1]["settings"]
