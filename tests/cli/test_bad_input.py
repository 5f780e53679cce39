"""Bad input through the command: exit code 2, one sentence on stderr, no traceback, nothing left behind."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import tomli_w
import torch

from pellucid import cli, run
from pellucid.data.tokenizer import load_tokenizer
from pellucid.measure import enough_memory
from pellucid.model.kernels import native
from pellucid.training.loop import Loop


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def command(monkeypatch, capfd):
    """A function: the `pellucid` command in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pellucid", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture
def refused(command, here):
    """A function: runs the command, checks how it refused and that the folder is as before; returns the sentence."""

    def call(*arguments):
        before = tree(here)
        code, _, errors = command(*arguments)
        assert code == 2, errors
        return one_sentence(errors, before, here)

    return call


def tree(folder):
    """Every file; an empty folder is nothing."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def one_sentence(errors, before, folder):
    assert errors.startswith("pellucid: ") and errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    assert tree(folder) == before, "nothing is left behind"
    return errors


@pytest.fixture
def write(here, tiny_tables):
    """A function: writes tiny.toml with [data] values replaced, data kept in this very folder."""

    def tables(data=None, **sections):
        settings = tiny_tables()
        settings["data"] |= {"directory": "data"} | (data or {})
        for name, values in sections.items():
            settings[name] |= values
        settings["model"].pop("max_position_embeddings")
        (here / "tiny.toml").write_text(tomli_w.dumps(settings))

    return tables


# ----------------------------------------------------------------------------------------- the text


BAD_TEXT = {
    "missing.txt": (None, "no file matches"),
    "empty.txt": (b"", "the file is empty"),
    "blank.jsonl": (b"", "the file is empty"),
    "binary.txt": (b"abc\0\x01\x02" * 100, "a binary file, not text"),
    "latin.txt": ("naïve\n".encode("latin-1") * 50, "not UTF-8"),
    "odd.xyz": (b"text", "no known extension"),
    "broken.jsonl": (b'{"text": "good"}\n{"text": "cut off\n', "broken.jsonl:2: not a JSON object"),
    "field.jsonl": (b'{"body": "good"}\n', "no field 'text'; the fields are 'body'"),
    "number.jsonl": (b'{"text": 3}\n', "field 'text' is an integer, not text"),
    "list.jsonl": (b"[1]\n", "a list, not a JSON object"),
    "cut.txt.gz": (b"\x1f\x8b\x08\x00rubbish", "gzip file"),
    "cut.parquet": (b"PAR1 rubbish", "parquet"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
@pytest.mark.parametrize("verb", ["train", "data build"])
def test_text_that_cannot_be_read(verb, name, here, write, refused):
    content, expected = BAD_TEXT[name]
    if content is not None:
        (here / name).write_bytes(content)
    write({"sources": [name]})
    message = refused(*verb.split(), "tiny.toml", *(["--out", "built"] if verb == "data build" else []))
    assert expected in message and name in message


def test_a_file_of_nothing_but_white_space_is_one_empty_document_and_named(here, write, refused):
    (here / "white.txt").write_text("  \n \n")
    write({"sources": ["white.txt"]})
    message = refused("data", "build", "tiny.toml", "--out", "built")
    assert "no documents left to train on (1 empty); the first: " in message and "white.txt" in message


def test_an_empty_file_that_is_named_is_to_be_left_out_and_one_in_a_folder_is_passed_over(here, write, refused, command):
    (here / "texts").mkdir()
    (here / "texts" / "empty.txt").touch()
    (here / "texts" / "some.txt").write_text("A line of text.\n" * 60)
    write({"sources": ["texts/empty.txt"]})
    message = refused("data", "build", "tiny.toml", "--out", "built")
    assert "empty.txt: the file is empty; leave it out of the sources" in message and "on_error" not in message
    write({"sources": ["texts"], "validation_fraction": 0.0})
    code, output, errors = command("data", "build", "tiny.toml", "--out", "built")
    assert code == 0, errors
    assert "files without a document: 1" in output + errors


def test_bad_lines_can_be_skipped_and_are_counted(here, write, command):
    lines = [json.dumps({"text": f"a line of text number {n} of many"}) for n in range(60)]
    (here / "some.jsonl").write_text("\n".join([*lines[:30], "{broken", '{"no": "text"}', *lines[30:]]))
    write({"sources": ["some.jsonl"], "on_error": "skip"})
    assert command("data", "build", "tiny.toml", "--out", "built")[0] == 0
    code, output, _ = command("data", "inspect", "built", "--json")
    stage = json.loads(output)["stages"][0]
    assert code == 0 and stage["documents_out"] == 60 and sum(stage["dropped"].values()) == 2


def test_context_longer_than_the_data(here, write, refused):
    (here / "short.txt").write_text("A few words.\n")
    write({"sources": ["short.txt"], "sequence_length": 4096, "validation_fraction": 0.0})
    assert "data.sequence_length = 4096" in refused("train", "tiny.toml")


def test_epochs_too_few_for_one_step(here, write, command):
    (here / "short.txt").write_text("A few words.\n" * 60)
    write({"sources": [{"path": "short.txt", "epochs": 0.001}], "validation_fraction": 0.0})
    code, _, errors = command("train", "tiny.toml")
    assert code == 2 and errors.count("\n") == 1 and "not enough for one step" in errors and "= 0" not in errors
    assert not (here / "runs").exists()


# ------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_steps=4", "unknown key 'max_steps'; did you mean 'training.max_steps'?"),
        ("training.batchsize=4", "unknown key 'training.batchsize'; did you mean 'batch_size'?"),
        ("model.hidden_size=15", "hidden_size 15 is not a multiple"),
        ("model.num_experts_per_tok=9", "num_experts_per_tok 9 exceeds num_experts 4"),
        ("data.tokenizer.vocab_size=5", "data.tokenizer.vocab_size"),
        ("model.vocab_size=100", "model.vocab_size is 100 but the tokenizer has 260 tokens"),
        ("model.max_position_embeddings=8", "data.sequence_length 32 exceeds model.max_position_embeddings 8"),
        ("training.device=cuda:77", "training.device = 'cuda:77': not usable on this machine"),
        ("training.device=abacus", "training.device = 'abacus': not usable on this machine"),
        ("training.precision=fp7", "training.precision"),
        ("training.device=tpu", "not usable on this machine (known: auto, cpu, cuda, cuda:1 and so on, mps)"),
        ("schedule.name=cosin", "pellucid: command line: schedule.name: "),
        ("data.sources=[{pth='x'}]", "unknown key 'data.sources[0].pth'; did you mean 'path'?"),
        ("data.sources=[a.txt,b.txt]", 'a list is needed: data.sources=["a.txt", "b.txt"]; a shell takes its quotes away'),
        ("data.sources=corpus/a.txt", 'data.sources: a list is needed: data.sources=["corpus/a.txt"]'),
        ("data.augment=[{name='synonym'}]", "data.augment[0]: there is no 'synonym'; did you mean 'synonyms'?"),
        ("data.augment=[{rate=0.1}]", "data.augment[0]: say which by its 'name'; known: synonyms, "),
        ("data.sources=['~/none of these.txt']", f"no file matches '{os.path.expanduser('~')}/none of these.txt'"),
        ("nonsense", "neither a configuration file nor key=value"),
        ("data.tokenizer={kind='file', path='none.json'}", "none.json"),
    ],
)
def test_settings_that_cannot_be(override, expected, tiny_tables, here, refused):
    (here / "tiny.toml").write_text(tomli_w.dumps(tiny_tables()))  # its data is prepared elsewhere
    message = refused("train", "tiny.toml", override)
    assert expected in message


def test_a_mistake_is_blamed_on_where_it_was_written(here, write, refused):
    write(schedule={"name": "cosin"})
    assert "pellucid: tiny.toml: schedule.name: " in refused("train", "tiny.toml", "training.max_steps=3")
    write({"sources": ["~/none of these.txt"]})
    assert f"no file matches '{os.path.expanduser('~')}/none of these.txt'" in refused("train", "tiny.toml")


@pytest.mark.parametrize(("content", "expected"), [(None, "cannot read the configuration"), ("[model", "not valid TOML")])
def test_configuration_file_that_cannot_be_read(content, expected, here, refused):
    if content:
        (here / "bad.toml").write_text(content)
    assert expected in refused("train", "bad.toml")
    assert expected in refused("data", "build", "bad.toml", "--out", "built")


def test_tokenizer_file_that_is_none(here, write, refused):
    (here / "tokenizer.json").write_text('{"version": "1.0"}')
    write({"tokenizer": {"kind": "file", "path": "tokenizer.json"}})
    assert "tokenizer.json" in refused("train", "tiny.toml")
    (here / "words.txt").write_text("no tokenizer")
    write({"tokenizer": {"kind": "file", "path": "words.txt"}})
    message = refused("train", "tiny.toml")
    assert "words.txt: not a tokenizer (.json or .model) file that can be read (not what SentencePiece writes)" in message


# ---------------------------------------------------------------------------------- the run's folder


def test_run_directory_that_exists(tiny_run, tiny_tables, here, refused):
    (here / "tiny.toml").write_text(tomli_w.dumps(tiny_tables()))
    before = tree(tiny_run.directory)
    assert "exists already; choose another --run-dir" in refused("train", "tiny.toml", "--run-dir", tiny_run.directory)
    (here / "file").write_text("mine")
    assert "exists already" in refused("train", "tiny.toml", "--run-dir", "file")
    assert "file" in refused("train", "tiny.toml", "--run-dir", "file/below")
    assert tree(tiny_run.directory) == before


def test_resuming_what_is_no_run(tiny_tables, here, refused):
    (here / "tiny.toml").write_text(tomli_w.dumps(tiny_tables()))
    (here / "empty").mkdir()
    assert "say which run" in refused("train", "--resume")
    for folder in ("none", "empty"):
        assert f"{folder}: not a run directory" in refused("train", "--run-dir", folder, "--resume")
        assert f"{folder}: not a run directory" in refused("train", "tiny.toml", "--run-dir", folder, "--resume")
    (here / "empty" / "config.toml").write_text("")
    assert "manifest.json" in refused("train", "--run-dir", "empty", "--resume")


def test_resuming_with_other_settings(tiny_run, here, refused):
    shutil.copytree(tiny_run.directory, here / "run")
    message = refused("train", "--run-dir", "run", "--resume", "model.rope_theta=5.0")
    assert "cannot resume" in message and "model.rope_theta was 10000.0, is 5.0" in message


def test_other_kernels_than_the_run_began_with_are_said(tiny_run, here, command, monkeypatch):
    shutil.copytree(tiny_run.directory, here / "run")
    assert tiny_run.manifest["machine"]["kernels"] == native.serving()
    monkeypatch.setattr(native, "_load", lambda: (None, "no C++ compiler (g++ or clang++) was found"))
    for recorded, said in (("compiled", 1), ("plain", 0)):
        manifest = tiny_run.manifest | {"machine": {**tiny_run.manifest["machine"], "kernels": recorded}}
        (here / "run" / "manifest.json").write_text(json.dumps(manifest))
        code, output, errors = command("train", "--run-dir", "run", "--resume")
        assert code == 0, errors
        words = " ".join((output + errors).split())
        assert json.loads((here / "run" / "manifest.json").read_text())["machine"]["kernels"] == "plain"
        changes = json.loads((here / "run" / "manifest.json").read_text()).get("changes", [])
        assert [change["kernels"] for change in changes] == ["compiled"] * said
        assert words.count(f"computed by the {recorded} CPU kernels, now it is plain PyTorch: no C++ compiler") == said


def test_unreadable_checkpoint(tiny_run, here, refused):
    shutil.copytree(tiny_run.directory, here / "run")
    shutil.rmtree(here / "run" / "model")
    for path in here.glob("run/checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    assert "no checkpoint is intact" in refused("train", "--run-dir", "run", "--resume")
    assert "intact checkpoint" in refused("generate", "run")
    assert "intact checkpoint" in refused("evaluate", "run", "--data", "tiny.toml")


# ------------------------------------------------------------------------------------ using a model


@pytest.mark.parametrize("name", ["nowhere", "smal", "."])
def test_model_that_is_not_there(name, here, refused):
    (here / "text.txt").write_text("text")
    refused("generate", name, "--prompt", "a")
    refused("evaluate", name, "--data", "text.txt")
    refused("convert", name, "out")


@pytest.mark.parametrize("name", BAD_TEXT)
def test_evaluating_what_cannot_be_read(name, tiny_run, here, refused):
    content, expected = BAD_TEXT[name]
    if content is not None:
        (here / name).write_bytes(content)
    assert expected in refused("evaluate", tiny_run.directory, "--data", name)


def test_wrong_tokenizer_for_a_model(tiny_run, here, command, refused, write):
    (here / "text.txt").write_text("some text, and more of it\n" * 40)
    write({"sources": ["text.txt"], "tokenizer": {"kind": "bpe", "vocab_size": 280}})
    assert command("data", "build", "tiny.toml", "--out", "built")[0] == 0
    other = here / "built" / "tokenizer"
    for arguments in (["generate", tiny_run.directory], ["evaluate", tiny_run.directory, "--data", "text.txt"]):
        assert "not the tokenizer that" in refused(*arguments, "--tokenizer", other)
        assert "none.json" in refused(*arguments, "--tokenizer", "none.json")
    shutil.copytree(tiny_run.directory / "model", here / "bare")
    for path in here.glob("bare/tokenizer*"):
        path.unlink()
    assert "brings no tokenizer" in refused("generate", "bare")
    wide = load_tokenizer(other).vocab_size
    assert f"the tokenizer has {wide} tokens but the model only 260" in refused("generate", "bare", "--tokenizer", other)


def test_training_on_from_weights_of_another_tokenizer(tiny_run, here, command, refused, write):
    """It has as many tokens, so nothing but its fingerprint tells."""
    (here / "text.txt").write_text("some text, and more of it\n" * 40)
    write({"sources": ["text.txt"], "tokenizer": {"kind": "bpe", "vocab_size": 260}})
    assert command("data", "build", "tiny.toml", "--out", "built")[0] == 0
    other = here / "built" / "tokenizer"
    assert load_tokenizer(other).vocab_size == tiny_run.load()[1].vocab_size
    begin = ["train", f"model={{init_from='{tiny_run.directory}'}}", "data.sequence_length=32"]
    chosen = refused(*begin, "data.sources=['text.txt']", f"data.tokenizer={{kind='file', path='{other}'}}")
    assert "data.tokenizer.path: not the tokenizer that" in chosen
    assert "data.prepared: not the tokenizer that" in refused(*begin, "data.prepared=built")


def test_files_that_are_there_are_not_written_over(tiny_run, here, refused):
    (here / "mine.jsonl").write_text('{"text": "a", "label": "b"}\n')
    assert "--out mine.jsonl: exists already" in refused("predict", tiny_run.directory, "--data", "mine.jsonl", "--out", "mine.jsonl")
    assert "a name that ends in .html" in refused("report", tiny_run.directory, "-o", tiny_run.directory / "run.sqlite")


def test_more_tokens_than_the_model_is_meant_for(tiny_run, refused):
    most = tiny_run.config.model.max_position_embeddings
    said = refused("generate", tiny_run.directory, "--prompt", "ab", "--max-new-tokens", most)
    assert f"more than the {most} that the model is meant for" in said
    said = refused("evaluate", tiny_run.directory, "--data", "builtin:python", "--context", most + 1)
    assert f"--context {most + 1}: the model is meant for at most {most}" in said


def test_other_arguments_that_cannot_be(tiny_run, here, refused, command):
    assert "float8" in refused("generate", tiny_run.directory, "--dtype", "float8")
    assert "smal" in refused("plan", "smal")
    assert "for language models only" in refused("plan", "tiny", "training.task=classification", "data.label_field=label")
    assert "set model.vocab_size" in refused("plan", "tiny", "data.tokenizer.kind=characters")
    assert "none" in refused("data", "inspect", "none")
    data = tiny_run.manifest["data"]["directory"]
    assert f"{tiny_run.directory}: a run; the data it was trained on are in {data}" in refused("data", "inspect", tiny_run.directory)
    assert "without training.task, data.label_field" in refused("plan", "tiny", "training.task=regression", "data.label_field=label")
    assert "--device = 'gpu': not usable on this machine (known:" in refused("plan", "tiny", "--device", "gpu")
    assert "--stop" in refused("generate", tiny_run.directory, "--stop", "")
    assert "not valid UTF-8" in refused("generate", tiny_run.directory, "--prompt", "caf\udce9")
    assert "give either --data FILE or --harness TASK" in refused("evaluate", tiny_run.directory, "--data", "a", "--harness", "b")
    for option in (["--context", "4"], ["--text-field", "body"], ["--label-field", "label"], ["--tokenizer", "t.json"]):
        assert f"{option[0]}: what the run held out is read as in its training" in refused("evaluate", tiny_run.directory, *option)
    assert "not a run, so it has no held-out text" in refused("evaluate", tiny_run.directory / "model")
    for arguments in (["generate"], ["evaluate"], ["trains"], ["generate", "x", "--temperature", "-1"],
                      ["generate", "x", "--seed", str(10**23)]):
        code, _, errors = command(*arguments)
        assert code == 2 and "Usage:" in errors and "Traceback" not in errors


# ------------------------------------------------------------------------------------- the machine


def limited(limit, *arguments, cwd):
    """The command in a process whose files cannot grow beyond `limit` bytes: how a disk fills up."""
    return subprocess.run(
        [sys.executable, "-c", "from pellucid.cli import main; main()", *map(str, arguments)], cwd=cwd, text=True,
        capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip


def test_a_terminal_without_a_letter_shows_its_code(tiny_run, here):
    words = ["generate", str(tiny_run.directory), "--prompt", "naïve 日", "--max-new-tokens", "1"]
    ended = subprocess.run([sys.executable, "-c", "from pellucid.cli import main; main()", *words], cwd=here, capture_output=True,
                           env=os.environ | {"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(b"na\\xefve \\u65e5")


def test_full_disk_while_data_is_prepared(here, write):
    write()
    before = tree(here)
    ended = limited(2000, "data", "build", "tiny.toml", "--out", "built", cwd=here)
    assert ended.returncode == 2, ended.stderr
    assert "built: a file may grow no larger here" in one_sentence(ended.stderr, before, here)


def test_a_file_that_may_grow_no_larger_while_data_are_exported(tiny_run, here):
    before = tree(here)
    data = tiny_run.manifest["data"]["directory"]
    ended = limited(1000, "data", "export", data, "--to", "nanogpt", "--out", "tokens", cwd=here)
    assert ended.returncode == 2, ended.stderr
    assert "tokens: cannot be written (File too large); raise `ulimit -f`" in one_sentence(ended.stderr, before, here)


def test_a_run_that_may_not_be_written_to_is_not_resumed(tiny_run, here, refused):
    shutil.copytree(tiny_run.directory, here / "run")
    (here / "run" / ".lock").unlink()
    (here / "run" / ".lock").mkdir()  # root may write everywhere else
    assert "run: cannot be written to (Is a directory); make the folder writable" in refused("train", "--run-dir", "run", "--resume")


def test_too_little_memory_is_one_sentence_and_leaves_no_run(here, write, monkeypatch, command):
    write()
    monkeypatch.setattr(Loop, "run", lambda self: torch.empty(2**58))
    code, _, errors = command("train", "tiny.toml")
    assert code == 2 and errors.splitlines()[-1].startswith("pellucid: not enough memory") and "Traceback" not in errors
    assert not list(here.glob("runs/*"))


def test_a_step_beyond_this_machine_s_memory_is_refused_before_a_run_begins(here, write, monkeypatch, command):
    write()
    monkeypatch.setattr(enough_memory, "memory_limit", lambda: 1000)
    code, _, errors = command("train", "tiny.toml")
    assert code == 2 and "weights and gradients alone need" in errors.splitlines()[-1] and "Traceback" not in errors
    assert not list(here.glob("runs/*"))


def test_an_interrupt_before_the_loop_is_said(here, write, monkeypatch, command):
    write()

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "prepare", interrupt)
    assert command("train", "tiny.toml") == (130, "", "pellucid: interrupted\n")


def test_an_interrupt_while_a_step_is_played_leaves_a_finished_run(tiny_tables, here, monkeypatch, command):
    (here / "tiny.toml").write_text(tomli_w.dumps(tiny_tables(max_steps=1) | {"observe": {"plays": 1}}))

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "stage_last", interrupt)
    code, output, _ = command("train", "tiny.toml", "--run-dir", "my run")
    assert code == 0 and "pellucid watch 'my run'" in output


def test_full_disk_while_a_checkpoint_is_written_costs_nothing_but_that_checkpoint(tiny_tables, here, command):
    tables = tiny_tables()
    tables["model"] |= {"hidden_size": 64}
    tables["observe"] = {"enabled": False}
    (here / "tiny.toml").write_text(tomli_w.dumps(tables))
    ended = limited(60_000, "train", "tiny.toml", "--run-dir", "run", cwd=here)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1 and "a file may grow no larger here (File too large)" in ended.stderr, ended.stderr
    assert "raise `ulimit -f`, then resume" in ended.stderr
    assert sorted(os.listdir(here / "run")) == [".lock", "checkpoints", "config.toml", "manifest.json"]
    assert os.listdir(here / "run" / "checkpoints") == []
    code, _, errors = command("train", "--run-dir", "run", "--resume")
    assert code == 0, errors
    assert (here / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("limit", [20_000, 100_000, 200_000])
def test_full_disk_as_telemetry_begins(limit, write, here):
    """Cut in its tables, its axes, its first facts: SQLite calls a file that may not grow an I/O error."""
    write()
    before = None
    for folder in ("prepared first", "run"):
        ended = limited(2**40 if before is None else limit, "train", "tiny.toml", "--run-dir", folder, cwd=here)
        before = before or tree(here)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1 and "run.sqlite: cannot be used" in ended.stderr, ended.stderr
    assert not (here / "run").exists()


def test_manifest_of_something_else(tiny_run, here, refused):
    shutil.copytree(tiny_run.directory, here / "run")
    (here / "run" / "manifest.json").write_text("[]")
    assert "not a run directory" in refused("train", "--run-dir", "run", "--resume")


def test_tokenizer_put_into_a_run(tiny_run, here, refused, write):
    """Of fewer tokens than the model: only the run's own manifest tells."""
    shutil.copytree(tiny_run.directory, here / "run")
    other = load_tokenizer(here / "run" / "model" / "tokenizer.json")
    text = (here / "run" / "model" / "tokenizer.json").read_text()
    (here / "run" / "model" / "tokenizer.json").write_text(text.replace('"<unk>"', '"<nobody>"'))
    assert load_tokenizer(here / "run" / "model" / "tokenizer.json").fingerprint != other.fingerprint
    assert "not the one it was trained with" in refused("generate", "run", "--prompt", "a")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="a matter of POSIX permissions")
def test_folder_without_permission(tiny_tables, here, monkeypatch, refused):
    """Root may write everywhere, so the refusal itself is played."""
    (here / "tiny.toml").write_text(tomli_w.dumps(tiny_tables()))

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", "runs/tiny")

    monkeypatch.setattr(os, "rename", refuse)
    assert "Permission denied" in refused("train", "tiny.toml", "--run-dir", "run")
