"""A run on disk: what lies in it, what it is called, and that its config.toml repeats it from anywhere."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

import pellucid
from pellucid.config import SourceConfig, UserError, load_config
from pellucid.data.sources import list_files
from pellucid.exchange.load import find_tokenizer, run_of
from pellucid.measure.texts import open_dataset, trained_with
from pellucid.observe.reader import Reader
from pellucid.observe.store import Record, Writer
from pellucid.observe.trace import trace
from pellucid.observe.web.feed import Feed
from pellucid.run import train
from pellucid.run_files import Run, next_run_dir, resolved_config, run_name
from pellucid.summary import what_next
from pellucid.training.checkpoint import saved_steps
from pellucid.training.device import choose_device, choose_precision, resolve_precision
from pellucid.training.evaluate import Evaluation
from pellucid.training.loop import Loop


def test_run_directory_holds_what_the_design_says(tiny_run):
    folder = tiny_run.directory
    assert {p.name for p in folder.iterdir()} >= {"config.toml", "manifest.json", "run.sqlite", "checkpoints", "model"}
    assert max(saved_steps(folder / "checkpoints")) == 12
    assert {p.name for p in (folder / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 0 and torch.__version__.startswith(manifest["libraries"]["torch"])
    assert manifest.keys() >= {"pellucid", "python", "libraries", "machine", "seed", "data", "tokenizer", "parameters"}
    assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pt", ".pth", ".distcp")]


def test_config_of_a_run_is_fully_resolved(tiny_run):
    tables = tomllib.loads((tiny_run.directory / "config.toml").read_text())
    assert tables["model"]["vocab_size"] == 260 and tables["model"]["head_dim"] == 8
    assert tables["training"]["micro_batch_size"] == 2 and tables["training"]["precision"] == "fp32"
    assert Run(tiny_run.directory).config == load_config(tiny_run.directory / "config.toml")


def test_a_run_on_relative_sources_is_resumed(tiny_folder, tiny_tables, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder / "corpus", tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    tables = tiny_tables()
    tables["data"] |= {"sources": ["corpus"], "directory": "data"}
    train(tables, run_dir="run")
    assert max(saved_steps(train(None, run_dir="run", resume=True).directory / "checkpoints")) == 12
    tables["training"]["max_steps"] = 14
    assert max(saved_steps(train(tables, run_dir="run", resume=True).directory / "checkpoints")) == 14


def test_a_project_that_was_moved_goes_on_bit_for_bit(tiny_folder, tiny_tables, tmp_path, monkeypatch, final_state):
    """Sources, data and runs in one folder, which gets another name: its old paths lead nowhere."""
    shutil.copytree(tiny_folder / "corpus", tmp_path / "old" / "corpus")
    monkeypatch.chdir(tmp_path / "old")
    tables = tiny_tables()
    tables["data"] |= {"sources": ["corpus"], "directory": "data"}
    unbroken = final_state(train(tables, run_dir="runs/a").directory)
    monkeypatch.chdir(tmp_path)
    os.rename("old", "new ü")
    run = tmp_path / "new ü" / "runs" / "a"
    shutil.rmtree(run / "checkpoints" / "step-12")
    shutil.rmtree(run / "model")
    assert trace(run, 3).documents and open_dataset(str(run)).directory.parent.parent.resolve() == tmp_path / "new ü"
    assert find_tokenizer(run) is not None, "of an unfinished run it lies with the data"
    shown = Feed(run).river
    assert shown.dataset is not None, shown.problem
    shutil.copytree(tmp_path / "new ü", tmp_path / "copy")
    assert open_dataset(str(tmp_path / "copy" / "runs" / "a")).directory.parent.parent == tmp_path / "copy", "a copy reads its own"
    monkeypatch.chdir(run)
    assert final_state(train(None, run_dir=".", resume=True).directory) == unbroken


def test_a_run_remembers_where_the_same_data_were_found_again(tiny_run, tmp_path):
    run, data = shutil.copytree(tiny_run.directory, tmp_path / "run"), shutil.copytree(tiny_run.dataset().directory, tmp_path / "again")
    tables = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    tables["data"]["prepared"] = str(data)
    assert train(tables, run_dir=run, resume=True).dataset().directory == data
    assert Run(run).manifest["data"]["fingerprint"] == tiny_run.manifest["data"]["fingerprint"]


def test_a_finished_run_that_is_resumed_keeps_one_text_of_each_step(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run.directory, tmp_path / "run")
    steps = lambda: [e["step"] for e in Reader(run).events() if e["rule"] == "text_sample"]
    before = steps()
    train(None, run_dir=run, resume=True)
    assert steps() == before == sorted(set(before)) and before[-1] == 11


@pytest.mark.parametrize("pattern", [".", "**/*", "**/*.json", "**/*.txt"])
def test_a_run_and_its_data_are_no_sources_of_the_folder_they_lie_in(pattern, tiny_run, tmp_path, monkeypatch):
    """Else the second run reads the manifest and tables of the first, and the first, resumed, finds its data changed."""
    for name in ("00.txt", "01.txt"):
        (tmp_path / name).write_text("my own", encoding="utf-8")
    (tmp_path / "notes.json").write_text('{"text": "my own"}', encoding="utf-8")
    shutil.copytree(tiny_run.directory, tmp_path / "runs" / "a")
    shutil.copytree(tiny_run.manifest["data"]["directory"], tmp_path / "data" / "b")
    (tmp_path / "runs" / "a" / "requirements.txt").write_text("what an exporter left", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    mine = [name for name in ("00.txt", "01.txt", "notes.json") if name.endswith(Path(pattern).suffix)]
    assert [file.path.name for file in list_files([SourceConfig(path=pattern)])] == mine
    with pytest.raises(UserError, match="no file matches"):
        list_files([SourceConfig(path="runs/*/**")])
    assert "manifest.json" in [file.path.name for file in list_files([SourceConfig(path="data/b")])], "unless it is named itself"


def test_a_folder_with_somebody_else_s_manifest_is_a_source(tmp_path):
    (tmp_path / "extension").mkdir()
    for name, text in (("manifest.json", '{"name": "mine"}'), ("config.toml", ""), ("a.txt", "my own")):
        (tmp_path / "extension" / name).write_text(text, encoding="utf-8")
    (tmp_path / "deep").mkdir()
    for name, text in (("manifest.json", "[" * 200_000), ("config.toml", "")):
        (tmp_path / "deep" / name).write_text(text, encoding="utf-8")
    assert [file.path.name for file in list_files([SourceConfig(path=f"{tmp_path}/**/*.txt")])] == ["a.txt"]


def test_a_resumed_run_leaves_its_caller_the_threads_it_had(tiny_tables, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    train(tiny_tables(max_steps=4), run_dir=tmp_path / "run")
    torch.set_num_threads(2)
    train(tiny_tables(max_steps=8), run_dir=tmp_path / "run", resume=True)
    assert torch.get_num_threads() == 2
def test_every_path_given_here_means_the_same_in_the_config_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = pellucid.Config.model_validate({"model": {"init_from": "m"}, "data": {
        "sources": ["s/*.txt", {"path": "t.jsonl"}, "builtin:python"], "validation": ["v"], "prepared": "p", "directory": "d",
        "tokenizer": {"kind": "file", "path": "k"}, "decontaminate": {"against": ["a", {"path": "b"}]},
        "augment": [{"name": "synonyms", "path": "w"}]}})  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(resolved_config(config).to_toml())
    again = load_config("run/config.toml")
    data = again.data
    found = [again.model.init_from, data.prepared, data.directory, data.tokenizer.path, data.augment[0].path,
             *(source.path for source in (*data.validation, *data.decontaminate.against, *data.sources))]  # fmt: skip
    here = ("m", "p", "d", "k", "w", "v", "a", "b", "s/*.txt", "t.jsonl")
    assert found == [*(str(tmp_path / name) for name in here), "builtin:python"]


def test_a_run_on_prepared_data_named_on_the_command_line_is_resumed(tiny_tables, tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run.manifest["data"]["directory"], tmp_path / "prepared")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(tomli_w.dumps(tiny_tables(max_steps=4)))
    train(load_config("a.toml", ["data.prepared=prepared"]), run_dir="run")
    assert max(saved_steps(train(None, run_dir="run", resume=True).directory / "checkpoints")) == 4
    assert max(saved_steps(train("run/config.toml", run_dir="again").directory / "checkpoints")) == 4


@pytest.mark.parametrize(("section", "values", "named"), [
    ("model", {"hidden_size": 32}, "model.hidden_size was 16, is 32"),
    ("data", {"sources": ["elsewhere"]}, "data.sources was"),
    ("data", {"sequence_length": 16}, "data.sequence_length was 32, is 16"),
    ("data", {"tokenizer": {"kind": "bpe", "vocab_size": 300}}, "data.tokenizer.kind was 'bytes', is 'bpe'"),
])  # fmt: skip
def test_a_refused_resume_names_the_difference_and_changes_nothing(section, values, named, tiny_tables, tmp_path):
    train(tiny_tables(), run_dir=tmp_path / "run")
    tables = tiny_tables()
    tables[section] |= values
    tables["data"]["directory"] = str(tmp_path / "data")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"cannot resume, these settings have changed: .*{named}"):
        train(tables, run_dir=tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert not (tmp_path / "data").exists(), "nothing is prepared for it"


def test_a_run_is_trained_by_one_process_at_a_time(tiny_tables, tmp_path, monkeypatch):
    """What a second one is told while the first, in turn a new run and a resumed one, is amid its steps."""
    folder, refused, step = tmp_path / "run", [], Loop.step

    def step_beside_another(loop):
        if loop.counters.step in (5, 13):
            command = [sys.executable, "-c", "from pellucid.cli import main; main()", "train", "--run-dir", str(folder), "--resume"]
            refused.append(subprocess.run(command, capture_output=True, text=True, timeout=120))
        return step(loop)

    monkeypatch.setattr(Loop, "step", step_beside_another)
    train(tiny_tables(), run_dir=folder)
    train(tiny_tables(max_steps=16), run_dir=folder, resume=True)
    sentence = f"pellucid: {folder}: is being trained by process {os.getpid()}; wait for its end, or stop it first\n"
    assert [(second.returncode, second.stderr) for second in refused] == [(2, sentence)] * 2
    monkeypatch.setattr(Loop, "step", lambda loop: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny_tables(max_steps=20), run_dir=folder, resume=True)
    monkeypatch.setattr(Loop, "step", step)
    train(tiny_tables(max_steps=20), run_dir=folder, resume=True)  # a failed one holds nothing


def test_auto_precision_is_written_down_as_what_it_became(tiny_tables, tmp_path):
    run = train(tiny_tables(max_steps=1, precision="auto"), run_dir=tmp_path / "run")
    assert run.config.training.precision == resolve_precision("auto", torch.device("cpu")) != "auto"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_config_of_a_run_repeats_it_from_any_folder(precision, tiny_folder, tiny_tables, tmp_path, monkeypatch, final_state):
    """Relative paths in the first place: of text, tokenizer and prepared data."""
    shutil.copytree(tiny_folder / "corpus", tmp_path / "a" / "corpus")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    tables = tiny_tables(precision=precision)
    tables["data"] |= {"sources": ["corpus"], "directory": "data"}
    first = train(tables, run_dir="first")
    shutil.copy("first/model/tokenizer.json", "tokenizer.json")
    tables["data"]["tokenizer"] = {"kind": "file", "path": "tokenizer.json"}
    second = train(tables, run_dir="second")
    first_dir, second_dir = tmp_path / "a" / "first", tmp_path / "a" / "second"

    monkeypatch.chdir(tmp_path / "b")
    for original in (first_dir, second_dir):
        repeated = train(original / "config.toml", run_dir=f"again-{original.name}")
        assert final_state(repeated.directory) == final_state(original)
        assert (repeated.directory / "config.toml").read_text() == (original / "config.toml").read_text()
        ours, theirs = (r.manifest["data"] for r in (repeated, Run(original)))
        assert ours["directory"] == theirs["directory"] and ours["fingerprint"] == theirs["fingerprint"]
    assert not (tmp_path / "b" / "data").exists(), "the prepared data was found again"
    assert first.stopped_by is None and second.stopped_by is None


def test_model_folder_equals_the_last_checkpoint(tiny_run):
    last = tiny_run.directory / "checkpoints" / "step-12" / "model.safetensors"
    model, tokenizer = pellucid.load(tiny_run.directory)
    for name, tensor in load_file(last).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert tokenizer.fingerprint == tiny_run.manifest["tokenizer"]["fingerprint"]


def test_default_names_are_free_ones(tmp_path, monkeypatch, tiny_tables, tiny_run):
    monkeypatch.chdir(tmp_path)
    assert str(next_run_dir("demo")) == "runs/demo"
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo-2").touch()
    assert str(next_run_dir("demo")) == "runs/demo-3"
    assert run_name(None) == "demo" and run_name("my/corpus.toml") == "corpus" and run_name("config.toml") == "config"
    assert run_name(tiny_run.directory / "config.toml") == tiny_run.directory.name, "a repeated run keeps its name"
    assert str(train(tiny_tables(max_steps=1)).directory) == "runs/run"


TOGETHER = """if True:
    import pathlib, sys, time
    from pellucid import cli, run_files
    free, mark = run_files.next_run_dir, pathlib.Path(sys.argv.pop())
    def next_run_dir(name):
        found = free(name)
        mark.touch()
        while len(list(mark.parent.glob("*.found"))) < 2:
            time.sleep(0.01)
        return found
    run_files.next_run_dir = next_run_dir
    cli.main()
"""


def test_runs_begun_at_the_same_moment_take_different_names(tiny_tables, tmp_path):
    """Two processes; neither goes on before both have found the same name free."""
    (tmp_path / "a.toml").write_text(tomli_w.dumps(tiny_tables(max_steps=2)))
    both = []
    try:
        for mark in ("1.found", "2.found"):
            command = [sys.executable, "-c", TOGETHER, "train", "a.toml", mark]
            both.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        said = [one.communicate(timeout=120) for one in both]
    finally:
        for one in both:
            one.kill()
    assert [(one.returncode, errors) for one, (_, errors) in zip(both, said, strict=True)] == [(0, "")] * 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a", "a-2"]
    named = {output.split("the run is in ")[1].split(".")[0] for output, _ in said}
    assert named == {"runs/a", "runs/a-2"}
    assert all(max(saved_steps(tmp_path / name / "checkpoints")) == 2 for name in named)


def test_printed_commands_can_be_pasted_whatever_the_folder_is_called(tiny_run, tmp_path):
    run = Run(shutil.copytree(tiny_run.directory, tmp_path / "it's mine", ignore=shutil.ignore_patterns("checkpoints")))
    commands = [shlex.split(line) for line in what_next(run).splitlines()[1:]]
    assert [words[:3] for words in commands] == [["pellucid", verb, str(run.directory)] for verb in ("generate", "evaluate", "watch")]


def test_an_empty_folder_may_be_the_run_directory(tiny_tables, tmp_path):
    (tmp_path / "run").mkdir()
    assert train(tiny_tables(max_steps=1), run_dir=tmp_path / "run").directory == tmp_path / "run"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_train_takes_tables_a_config_and_a_file(tiny_tables, tmp_path, final_state):
    config = pellucid.Config.model_validate(tiny_tables(max_steps=2))
    (tmp_path / "a.toml").write_text(config.to_toml())
    before = config.model_copy(deep=True)
    file = tmp_path / "a.toml"
    kinds = {"tables": tiny_tables(max_steps=2), "config": config, "file": file, "name": str(file)}
    states = [final_state(train(given, run_dir=tmp_path / kind).directory) for kind, given in kinds.items()]
    assert all(state == states[0] for state in states)
    assert config == before, "what the caller gave is left alone"


def test_what_is_no_run_is_refused(tmp_path):
    for prepare in (lambda: None, lambda: (tmp_path / "config.toml").write_text("")):
        prepare()
        with pytest.raises(UserError, match="not a run directory"):
            Run(tmp_path)


def test_devices_and_precisions():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="not usable on this machine"):
        choose_device("cuda:99")
    with pytest.raises(UserError, match="not usable on this machine"):
        choose_device("meta")
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) == (torch.float32, False)
    assert choose_precision("bf16", cpu) == (torch.bfloat16, False)
    assert choose_precision("parity", cpu) == (torch.bfloat16, True)


def test_precision_decides_the_products_and_masters_stay_fp32(tiny_tables, tmp_path):
    run = train(tiny_tables(max_steps=2, precision="parity"), run_dir=tmp_path / "run")
    weights = load_file(run.directory / "checkpoints" / "step-2" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_public_names():
    for name in pellucid.__all__:
        assert getattr(pellucid, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = pellucid.trian


def test_a_run_shorter_than_its_warm_up_is_told_how_far_it_gets(tiny_tables, tmp_path, capsys):
    for warm_up, said in ((4, ""), (5, "so it ends at 80% of its learning rate")):
        tables = tiny_tables(max_steps=4)
        tables["schedule"] = {"warmup_steps": warm_up}
        train(tables, run_dir=tmp_path / str(warm_up), progress=True)
        assert ("warm-up" in (printed := capsys.readouterr().out)) == bool(said) and said in " ".join(printed.split())


def test_a_text_too_small_for_the_tokenizer_asked_for_is_told(tiny_tables, tmp_path, capsys):
    tables = tiny_tables(max_steps=1)
    tables["data"]["tokenizer"] = {"kind": "bpe", "vocab_size": 50_000}
    run = train(tables, run_dir=tmp_path / "run", progress=True)
    said = f"its text gives a tokenizer of {run.dataset().tokenizer.vocab_size:,} tokens, not 50,000"
    assert said in " ".join(capsys.readouterr().out.split())


def test_the_last_held_out_loss_says_that_it_is_of_more_text_than_those_before(tiny_tables, tmp_path, capsys):
    train(tiny_tables(max_steps=4, evaluate_every=2, evaluate_rows=1), run_dir=tmp_path / "run", progress=True)
    lines = " ".join(capsys.readouterr().out.split()).split("held-out loss ")
    whole = [", over all that is held out" in line[:60] for line in lines[1:]]
    assert whole[:3] == [False, False, True], lines  # before training, after 2 steps, after 4


def test_alarms_and_the_best_checkpoint_are_told_at_the_end(tiny_tables, tmp_path, capsys, monkeypatch):
    """Losses that rise: what is best was saved after two steps, and is not the model that the run ends with."""
    losses = {0: 3.0, 2: 1.0, 4: 2.0, 6: 2.5}
    monkeypatch.setattr(Loop, "measure", lambda self, rows: Evaluation(losses[self.counters.step], 1, 1))
    run = train(tiny_tables(max_steps=6, evaluate_every=2), run_dir=tmp_path / "run", progress=True)
    kept = tmp_path / "run" / "checkpoints" / "step-2"
    assert f"its lowest held-out loss was 1.0000, after 2 steps: {kept}" in " ".join(capsys.readouterr().out.split())
    writer = Writer(run.directory)
    writer.write(Record(5, events=[{"rule": "dead_expert", "severity": "alarm", "subject": "run", "text": "one"}] * 2))
    writer.close()
    assert what_next(run).endswith("# alarms: 2 dead_expert")


def test_a_checkpoint_of_a_run_is_a_model(tiny_run):
    """Wherever a run is: its weights are the checkpoint's, tokenizer and settings the run's."""
    step, folder = next(iter(saved_steps(tiny_run.directory / "checkpoints").items()))
    assert step < 12
    model, tokenizer = pellucid.load(folder)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert tokenizer.fingerprint == tiny_run.load()[1].fingerprint
    assert trained_with(folder) == tiny_run.config.data


def test_only_what_train_saved_is_taken_for_a_checkpoint(tmp_path):
    """grok-1/checkpoints/ckpt-0 is where the official weights are unpacked; a config.toml may lie beside."""
    (tmp_path / "checkpoints" / "ckpt-0").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-3").mkdir()
    (tmp_path / "config.toml").write_text("")
    assert run_of(tmp_path / "checkpoints" / "ckpt-0") == tmp_path / "checkpoints" / "ckpt-0"
    assert run_of(tmp_path / "checkpoints" / "step-3") == tmp_path
