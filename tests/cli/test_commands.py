"""The commands' answers: JSON that parses, numbers that match, help with examples."""

import json
import shlex
import subprocess
import sys

import pytest
import tomli_w
from safetensors.torch import load_file, save_file

from pellucid import cli
from pellucid.config import make_config
from pellucid.measure.files import evaluate_files
from pellucid.model.generate import generate
from pellucid.model.size import flops_per_token, parameter_counts, training_bytes
from pellucid.observe.reader import Reader


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """A function: the `pellucid` command in this process; returns its stdout after checking that it succeeded."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pellucid", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output, errors = capfd.readouterr()
        assert not ended.value.code, errors
        return output

    monkeypatch.chdir(tmp_path)
    return call


def test_evaluate_prints_what_evaluate_files_finds(command, tiny_run, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on a mat\n" * 30)
    expected = evaluate_files(*tiny_run.load(), str(tmp_path / "text.txt"), context=32).as_dict()
    assert json.loads(command("evaluate", tiny_run.directory, "--data", "text.txt", "--json")) == expected
    lines = command("evaluate", tiny_run.directory, "--data", "text.txt").splitlines()
    assert [line.split("  ")[0] for line in lines] == ["loss", "perplexity", "bits per byte", "over"]
    assert lines[0].split()[1] == f"{expected['loss']:.4f}"
    other = json.loads(command("evaluate", tiny_run.directory, "--data", "text.txt", "--context", "5", "--json"))
    assert other["tokens"] == expected["tokens"] and other["loss"] != expected["loss"]


def test_evaluate_without_data_is_the_last_evaluation_of_the_run(command, tiny_run):
    """That of its training, in fp32 as here, whatever checkpoint is asked: the newest is the finished model."""
    with Reader(tiny_run.directory) as run:
        step, recorded = (values[-1] for values in run.series("held-out", "loss", stream="evaluation"))
    for model in (tiny_run.directory, tiny_run.directory / "checkpoints" / f"step-{int(step) + 1}"):
        found = json.loads(command("evaluate", model, "--json"))
        assert found["loss"] == pytest.approx(recorded, abs=1e-6) and found["tokens"] > 0


def test_a_ckpt_0_goes_with_the_tokenizer_that_its_conversion_names(command, tiny_run):
    said = command("convert", tiny_run.directory, "ckpt-0", "--to", "xai")
    options = shlex.split(said[said.index("--tokenizer"):])
    asked = ["--prompt", "the cat", "--max-new-tokens", "3", "--temperature", "0"]
    assert command("generate", "ckpt-0", *options, *asked).startswith("the cat")


def test_a_loss_that_is_not_finite_is_json_too(command, tiny_run, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on a mat\n" * 3)
    command("convert", tiny_run.directory, "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"] *= 1e38
    weights["model.norm.weight"][::2] *= -3  # inf - inf
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    found = json.loads(command("evaluate", "hf", "--data", "text.txt", "--json"), parse_constant=pytest.fail)
    assert found["loss"] in ("nan", "inf")


def test_evaluate_reads_the_chosen_field(command, tiny_run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "the cat"}\n')
    found = json.loads(command("evaluate", tiny_run.directory, "--data", "a.jsonl", "--text-field", "body", "--json"))
    assert (found["tokens"], found["text_bytes"]) == (8, 7)


def test_generate_prints_the_prompt_and_its_continuation(command, tiny_run):
    options = ["--prompt", "the cat", "--max-new-tokens", "12", "--seed", "3", "--temperature", "0.9"]
    model, tokenizer = tiny_run.load()
    pieces = generate(model, tokenizer, "the cat", max_new_tokens=12, seed=3, temperature=0.9, top_p=0.95)
    expected = "the cat" + "".join(pieces) + "\n"
    assert command("generate", tiny_run.directory, *options) == expected
    assert command("generate", tiny_run.directory / "model", *options) == expected


def test_plan_prints_the_numbers_of_the_model(command):
    rows = json.loads(command("plan", "--json"))
    assert rows["grok-1"]["parameters"] == 315_684_820_992 and rows["grok-1"]["active"] == 83_756_587_008
    for name, row in rows.items():
        settings = make_config({"model": {"preset": name}})
        model = settings.model.model_copy(update={"vocab_size": row["vocabulary"]})
        assert row["parameters"] == parameter_counts(model)["total"]
        assert row["FLOP/token"] == flops_per_token(model, settings.data.sequence_length)
        assert row["bytes to train"] == training_bytes(model) == 16 * row["parameters"]
    lines = command("plan").splitlines()
    assert len(lines) == 1 + len(rows) and "316 G" in lines[-1] and "83.8 G" in lines[-1], "a line a preset"
    assert max(map(len, lines)) <= 100


def test_plan_tells_peak_and_longest_contexts_of_what_is_named(command):
    words = ("plan", "tiny", "data.tokenizer.vocab_size=300", "training.batch_size=2", "optimizer.state_dtype=bf16",
             "optimizer.name=adamw")  # fmt: skip
    rows = json.loads(command(*words, "--memory", "1MB", "--json"))
    assert list(rows) == ["tiny"]
    row, peak = rows["tiny"], rows["tiny"]["peak"]
    kinds = ("weights", "gradients", "moments", "activations", "libraries")  # the last is oneDNN's, which not every processor uses
    assert sum(peak.get(kind, 0) for kind in kinds) == peak["bytes"]
    assert row["vocabulary"] == 300 and peak["weights"] >= 4 * row["parameters"]
    assert row["contexts"] == {"none": None, "attention": None, "all": None}, "the program alone takes more"
    text = command(*words)
    assert "with 2 x 128 tokens at once" in text and "bf16 moments" in text


def test_plan_counts_the_model_that_train_would_make(command, tiny_run, tmp_path):
    """Its vocabulary is that of the tokenizer, its shape that of model.init_from."""
    (tmp_path / "further.toml").write_text(tomli_w.dumps({"model": {"init_from": str(tiny_run.directory)}}))
    row = json.loads(command("plan", "further.toml", "data.sequence_length=32", "--json"))["further.toml"]
    assert row["parameters"] == sum(parameter.numel() for parameter in tiny_run.load()[0].parameters())
    rows = json.loads(command("plan", f"model.init_from={tiny_run.directory}", "data.sequence_length=32", "--json"))
    assert list(rows) == [str(tiny_run.directory)] and rows[str(tiny_run.directory)]["parameters"] == row["parameters"]
    for words in (["data.tokenizer.kind=bytes"], [f"data.prepared={tiny_run.manifest['data']['directory']}"],
                  [f"data.tokenizer={{kind='file', path='{tiny_run.directory / 'model'}'}}"]):  # fmt: skip
        assert json.loads(command("plan", "tiny", *words, "--json"))["tiny"]["vocabulary"] == 260, words


def test_doctor_examines_this_machine(command):
    facts = json.loads(command("doctor", "--json"))
    assert facts.keys() >= {"pellucid", "torch", "processors", "memory", "gpu", "device", "precision", "experts"}
    assert all(isinstance(value, str) and value for value in facts.values())
    assert "torch" in command("doctor")


def test_data_commands(command, tiny_tables, tmp_path):
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tiny_tables()))
    built = command("data", "build", "tiny.toml", "--out", "built")
    manifest = json.loads(command("data", "inspect", "built", "--json"))
    for name, split in manifest["splits"].items():
        assert f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens" in built
    assert "written: built" in built
    assert "found ready: built" in command("data", "build", "tiny.toml", "--out", "built")


def test_data_build_counts_what_it_leaves_out(command, tiny_tables, tmp_path):
    tables = tiny_tables()
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"text": f"line {n} of a text " * 20}) for n in range(30)]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join([*lines, lines[0], "{", '{"text": 3}', '{"text": " "}']))
    (tmp_path / "corpus" / "b.jsonl").write_text("")
    (tmp_path / "corpus" / "c.jsonl").write_text("{")
    tables["data"] |= {"sources": ["corpus/*.jsonl"], "on_error": "skip", "deduplicate": {"exact": True}}
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tables))
    built = command("data", "build", "tiny.toml", "--out", "built")
    assert "read: 3 left out (2 bad JSON, 1 wrong field)" in built
    assert "normalize: 1 left out (1 empty)" in built and "deduplicate: 1 left out (1 exact duplicate)" in built
    assert f"files without a document: 2, the first {tmp_path}/corpus/b.jsonl" in built
    said = command("data", "inspect", "built")
    assert "3 files" in said and "32 documents; 2 gave no document" in said and "documents  35 -> 32" in said


def test_files_beyond_a_cap_are_not_among_those_without_a_document(command, tiny_tables, tmp_path):
    tables = tiny_tables()
    (tmp_path / "corpus").mkdir()
    for name in "abcd":
        lines = [json.dumps({"text": f"line {n} of {name}, some text " * 20}) for n in range(20)]
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("" if name == "a" else "\n".join(lines))
    tables["data"]["sources"] = [{"path": "corpus/*.jsonl", "max_documents": 25}]
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tables))
    assert "files without a document: 1, the first" in command("data", "build", "tiny.toml", "--out", "built")
    assert "4 files" in command("data", "inspect", "built"), "all are named"
    tables["data"]["sources"][0]["max_documents"] = 20  # all of b, so that c is not opened
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tables))
    assert "files without a document: 1, the first" in command("data", "build", "tiny.toml", "--out", "less")
    assert "20 documents; 1 gave no document; 2 were not opened, beyond a cap\n" in command("data", "inspect", "less")
    manifest = json.loads((tmp_path / "less" / "manifest.json").read_text())
    assert [source["documents"] for source in manifest["sources"]] == [0, 20, None, None]


def test_train_says_what_it_does_and_what_to_type_next(command, tiny_tables, tmp_path):
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tiny_tables()))
    output = command("train", "tiny.toml", "training.max_steps=3")
    for expected in ("parameters,", "before training", "after training", "a bigram model of the same training text",
                     "step 3/3", "tokens/s", "pellucid generate runs/tiny", "pellucid evaluate runs/tiny"):  # fmt: skip
        assert expected in output, expected
    assert "runs/tiny-2" in command("train", "tiny.toml", "training.max_steps=1")
    assert "runs/tiny-3" in command("train", "runs/tiny/config.toml", "training.max_steps=1")


def test_version(command):
    import pellucid

    assert command("version").strip() == command("--version").strip() == pellucid.__version__
    as_module = subprocess.run([sys.executable, "-m", "pellucid", "--version"], capture_output=True, text=True, check=True)
    assert as_module.stdout.strip() == pellucid.__version__


@pytest.mark.parametrize(("kind", "told"), [("unigram", True), ("sentencepiece", False)])
def test_a_tokenizer_that_only_sentencepiece_reads_exactly_is_told(command, tiny_folder, tmp_path, kind, told):
    said = "programs that read it with anything but SentencePiece, as transformers does, may give the model other ids"
    trained = command("train", f"data.sources=['{tiny_folder}/corpus']", f"data.tokenizer={{kind='{kind}', vocab_size=320}}",
                      "model.preset=tiny", "training.max_steps=1", "training.batch_size=2", "observe.enabled=false", "--run-dir", "run")
    converted = command("convert", "run", "hf")
    for text in (trained, converted):
        assert (said in " ".join(text.split())) == told
    assert (tmp_path / "hf" / "tokenizer.json").exists() != told


def commands():
    from typer.main import get_command

    root = get_command(cli.app)
    for name, found in root.commands.items():
        yield from ((f"{name} {below}" for below in found.commands) if hasattr(found, "commands") else [name])


@pytest.mark.parametrize("name", list(commands()))
def test_help_of_every_command_has_an_example(name, command):
    text = command(*name.split(), "--help")
    assert name == "version" or f"pellucid {name}" in text.split("Example:")[1]
