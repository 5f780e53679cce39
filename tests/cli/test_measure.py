"""`pellucid measure`: answers on disk and on stdout, a section in the run's report, and mistakes in one sentence."""

import json
import sys

import pytest

from pellucid import cli
from pellucid.measure.outcome import sections


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """A function: `pellucid measure ...` in an empty folder; returns (exit code, stdout, stderr)."""

    def measure(*arguments):
        monkeypatch.setattr(sys, "argv", ["pellucid", "measure", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capfd.readouterr())

    monkeypatch.chdir(tmp_path)
    return measure


def test_context_experts_and_diversity_of_a_run_are_kept_with_it(call, tiny_run, tmp_path):
    long = tmp_path / "text"
    long.mkdir()
    for number in range(4):
        (long / f"{number}.txt").write_text(f"the cat sat on mat {number} while dogs ran past old trees in rain " * 30)
    code, output, errors = call("context", tiny_run.directory, "--data", long, "--predictions", 32, "--copies", 4)
    assert code == 0, errors
    assert "From token 8 to token 24 the loss changes by" in output and "induction gains" in output
    code, output, errors = call("experts", tiny_run.directory, "--json")
    assert code == 0, errors
    assert json.loads(output)["numbers"]["churn"]["steps"]
    code, output, errors = call("diversity", long, "--held-out", long, "--model", tiny_run.directory, "--out", "here")
    assert code == 0, errors
    assert "100.0% of 4 documents share a run of 13 words" in output
    assert {p.name for p in (tmp_path / "here").iterdir()} == {"diversity.json", "diversity.html", "diversity-1.svg", "diversity-2.svg"}
    assert len(sections(tiny_run.directory)) == 2


def test_one_document_gives_no_interval(call, tiny_run, tmp_path):
    (tmp_path / "one.txt").write_text("the cat sat on mat while dogs ran past old trees in rain " * 100)
    code, output, errors = call("experts", tiny_run.directory, "--data", "one.txt", "--out", "experts")
    assert code == 0 and "(no interval from one document) bits about its experts" in output, errors
    assert json.loads((tmp_path / "experts" / "experts.json").read_text())["numbers"]["specialisation"][0]["bits"]["low"] is None
    code, output, errors = call("diversity", "one.txt", "--out", "diversity")
    assert code == 0 and output.count("(no interval from one document)") == 2, errors


def test_a_plan_runs_resumes_and_reports(call, tmp_path):
    command = ("capacity", "--parameters", 38400, "--loads", "0.01,0.02", "--epochs", 4, "--seeds", 1, "--out", "plan")
    code, first, errors = call(*command)
    assert code == 0, errors
    written = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "plan" / "jobs").iterdir()}
    assert len(written) == 2
    code, again, _ = call(*command)
    assert again.splitlines()[0] == first.splitlines()[0], "the same answer"
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "plan" / "jobs").iterdir()} == written, "from what was finished"


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("capacity", "--parameters", "a lot"), "--parameters 'a lot': not positive numbers"),
    (("capacity", "--compare", "magic"), "--compare: unknown magic"),
    (("capacity", "--epochs", 10**8), "add --yes to start it"),
    (("capacity", "--run", "nowhere"), "--run nowhere: not a run directory"),
    (("scaling", "training.batch_sise=3"), "batch_size"),
    (("scaling", "--sizes", "16", "--trial", "16:4000", "--tokens", "3200", "training.batch_size=1"), "three or more --sizes"),
    (("scaling", "--trial", "64:3900", "--tokens", "3200,3201,3300", "training.batch_size=1"), "whole steps of 32 tokens"),
    (("scaling", "--trial", "64"), "--trial 64: give SIZE:TOKENS"),
    (("scaling", "--sizes", "16,32,48", "--trial", "65:3900", "--tokens", "3200,3300,3400", "training.batch_size=1"),
     "--trial: '65' is neither"),
    (("scaling", "--sizes", "16,32,48", "--trial", "32:3900", "--tokens", "3200,3300,3400", "training.batch_size=1"),
     "--trial 32:3900: the run that judges the law must be larger"),
    (("capacity", "--parameters", 10**13), "random sequences need "),
    (("capacity", "--parameters", 10**13, "--loads", 1e-9), "parameters of a model, with gradient and optimizer, need "),
    (("robustness", "--arms", "wishes"), "--arms: unknown wishes"),
    (("scaling", "--sizes", "16,32,²", "--trial", "64:3900", "--tokens", "3200,3300,3400", "training.batch_size=1"),
     "--sizes: '²' is neither"),
    (("scaling", "--sizes", "16,32,48", "--trial", "²:3900", "--tokens", "3200,3300,3400", "training.batch_size=1"),
     "--trial: '²' is neither"),
    (("diversity", "missing.txt"), "no file matches"),
    (("context", "missing"), "neither a folder nor a preset"),
])  # fmt: skip
def test_mistakes_are_one_sentence_and_leave_nothing(call, tmp_path, small_corpus, arguments, sentence):
    if arguments[0] in ("scaling", "robustness"):
        arguments = (*arguments, *small_corpus)
    code, _, errors = call(*arguments)
    assert code == 2 and errors.startswith("pellucid: ") and errors.count("\n") == 1 and sentence in errors
    assert not (tmp_path / "measure").exists()


@pytest.fixture
def small_corpus(tiny_folder):
    """Overrides that make a plan's data small and prepared once."""
    return (f'data.sources=["{tiny_folder / "corpus"}"]', "data.tokenizer.kind=bytes", f"data.directory={tiny_folder / 'data'}",
            "data.sequence_length=32")  # fmt: skip


def test_no_sample_of_text_is_infinite(call, tiny_run):
    for name in ("context", "experts", "diversity"):
        code, _, errors = call(name, tiny_run.directory, "--megabytes", "inf")
        assert code == 2 and "Invalid value for '--megabytes': Input should be less than or equal to" in errors


def test_too_little_text_for_the_plan_is_said_with_both_numbers(call, small_corpus):
    code, _, errors = call("scaling", *small_corpus)
    assert code == 2 and "the plan's largest run takes 1,200,000 tokens but the text has" in errors


def test_a_model_without_text_says_where_to_get_some(call):
    code, _, errors = call("context", "tiny")
    assert code == 2 and "brings no tokenizer" in errors
