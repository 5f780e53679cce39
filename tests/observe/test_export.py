"""What other tools read back with their own readers is what was recorded."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import pellucid
from pellucid import cli
from pellucid.config import UserError
from pellucid.observe.export import EXPORTERS, TOOLS, export, scalars
from pellucid.observe.reader import Reader


@pytest.fixture(scope="module")
def expected(run_dir):
    with Reader(run_dir) as run:
        return {(name, step): value for step, _, values in scalars(run) for name, value in values.items()}


def test_scalars_hold_whole_tensors_and_nothing_that_was_not_measured(expected, run_dir):
    names = {name for name, _ in expected}
    assert "run/loss" in names and "evaluation/bits_per_byte" in names
    assert "param/update_ratio/layers.0.moe.down_proj" in names and not any("[" in name for name in names)
    assert "run/mfu" not in names
    with Reader(run_dir) as run:
        assert ("evaluation/loss", -1) in expected and ("run/loss", -1) not in expected, "before training"
        assert expected["run/loss", 10] == run.series("run", "loss", stream="run")[1][10]


def test_tensorboard_reads_back_every_scalar(run_dir, tmp_path, expected):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(export(run_dir, "tensorboard", tmp_path / "tb")), size_guidance={"scalars": 0})
    events.Reload()
    found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert found.keys() == expected.keys()
    assert all(found[k] == v or (math.isnan(v) and math.isnan(found[k])) for k, v in expected.items())


def test_mlflow_reads_back_every_scalar(run_dir, tmp_path, expected):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    folder = export(run_dir, "mlflow", tmp_path / "ml")
    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "pellucid"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["optimizer.name"] == "adamw"
    for name in ("run/loss", "param/update_ratio/embedding.weight", "evaluation/loss"):
        history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}
        assert history == {step: value for (n, step), value in expected.items() if n == name}


def test_mlflow_takes_a_run_by_a_relative_path_with_spaces(run_dir, tmp_path, monkeypatch):
    """As `train` names a run of its own: runs/NAME."""
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    place = tmp_path / "my runs ü"
    place.mkdir()
    (place / "demo").symlink_to(run_dir)
    monkeypatch.chdir(place)
    folder = export("demo", "mlflow", "ml")
    client = MlflowClient(tracking_uri=(folder.resolve() / "mlruns").as_uri())
    assert "pellucid" in {experiment.name for experiment in client.search_experiments()}


def test_wandb_reads_back_every_scalar_from_the_offline_run(run_dir, tmp_path, expected):
    """`wandb leet inspect`: the reader that comes with wandb 0.31 and later."""
    pytest.importorskip("wandb")
    (path,) = export(run_dir, "wandb", tmp_path / "wb").glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [record for record in map(json.loads, said.splitlines()) if record["type"] == "history"]
    items = [(int(r["history"]["step"]["num"]), r["history"]["item"]) for r in records]
    found = {(name, step): float(value) for step, item in items for name, value in item.items() if name[0] != "_"}
    expected = {(name, max(step, 0)): value for (name, step), value in expected.items()}  # before training is step 0 there
    assert found.keys() == expected.keys()
    assert all(found[k] == v or (math.isnan(v) and math.isnan(found[k])) for k, v in expected.items())


def test_parquet_holds_everything_with_nulls_where_nothing_was_measured(run_dir, tmp_path):
    import pyarrow.parquet as pq

    folder = export(run_dir, "parquet", tmp_path / "pq")
    with Reader(run_dir) as run:
        steps, frames = run.frames("param")
        table = pq.read_table(folder / "param.parquet")
        assert table.num_rows == len(steps) * len(run.rows("param"))
        column = next(s["id"] for s in run.stats("param") if s["name"] == "update_norm")
        np.testing.assert_array_equal(table["update_norm"].to_numpy(), frames[:, :, column].reshape(-1))
        assert table["cos_previous"].null_count > 0
        assert {p.stem for p in folder.glob("*.parquet")} >= set(run.streams())


def test_one_setting_exports_when_training_ends(tiny_tables, tmp_path):
    tables = tiny_tables(max_steps=3) | {"observe": {"export": ["parquet"]}}
    folder = pellucid.train(tables, run_dir=tmp_path / "run").directory
    with Reader(folder) as run:
        _, losses = run.series("run", "loss", stream="run")
    assert pq.read_table(folder / "export" / "parquet" / "run.parquet")["loss"].to_pylist() == losses.tolist()


def test_a_tool_that_is_missing_is_told_before_training_with_how_to_install_it(tiny_tables, tmp_path, monkeypatch):
    monkeypatch.setitem(TOOLS, "wandb", ("a_package_nobody_has", "wandb"))
    with pytest.raises(UserError, match=r"'wandb' is not installed; pip install wandb$"):
        pellucid.train(tiny_tables() | {"observe": {"export": ["wandb"]}}, run_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="export needs what observation records"):
        pellucid.train(tiny_tables() | {"observe": {"export": ["wandb"], "enabled": False}}, run_dir=tmp_path / "run")


def test_the_command_exports_a_finished_run(run_dir, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    for arguments in (["--to", "parquet", "--to", "tensorboard"], ["--to", "neptune"]):
        monkeypatch.setattr(sys, "argv", ["pellucid", "export", str(copy), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, error = capsys.readouterr()
        if "neptune" in arguments:
            assert ended.value.code == 2 and "export to 'neptune': not known; choose from tensorboard" in error and not out
        else:
            assert not ended.value.code and out.split() == [str(copy / "export" / "parquet"), str(copy / "export" / "tensorboard")]
            assert all(any(Path(folder).iterdir()) for folder in out.split())


def test_an_unknown_tool_is_one_sentence_and_a_failed_export_leaves_nothing(run_dir, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="choose from tensorboard, wandb, mlflow, parquet"):
        export(run_dir, "neptune")
    monkeypatch.setitem(EXPORTERS, "parquet", lambda run, folder, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run_dir, "parquet", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
