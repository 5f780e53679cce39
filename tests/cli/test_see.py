"""`pellucid trace` and `pellucid explain` print what the library finds; a mistake is one sentence."""

import json
import sys

import pytest

from pellucid import cli
from pellucid.observe.explain import explain
from pellucid.observe.trace import trace


@pytest.fixture
def command(monkeypatch, capfd):
    """A function: the `pellucid` command in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pellucid", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capfd.readouterr()

    return call


def test_trace_prints_the_documents_that_trace_finds(command, tiny_run):
    expected = trace(tiny_run.directory, 5)
    code, out, _ = command("trace", tiny_run.directory, "--step", 5, "--json")
    assert code == 0 and json.loads(out) == expected.as_dict()
    _, out, _ = command("trace", tiny_run.directory, "--step", 5, "--documents", 1)
    top = expected.documents[0]
    assert f"step 5: loss {expected.loss:.4f}" in out and f"{top.loss:.3f}" in out
    assert f"bytes {top.byte_start}-{top.byte_end}" in " ".join(out.split())


def test_explain_prints_numbers_and_proofs_that_explain_finds(command, tiny_run):
    arguments = ("--parameter", "layers.1.moe.router.weight", "--index", "2,3")
    code, out, _ = command("explain", tiny_run.directory, "--step", 7, *arguments, "--json")
    expected = explain(tiny_run.directory, 7, "layers.1.moe.router.weight", (2, 3))
    assert code == 0 and json.loads(out) == json.loads(json.dumps(expected.as_dict()))
    assert sum(expected.terms.values()) == expected.change == expected.weight_after - expected.weight_before
    code, out, _ = command("explain", tiny_run.directory, "--step", 7, *arguments)
    assert code == 0 and f"{expected.weight_after:.9g}" in out and out.count("proven") == len(expected.proofs)


def test_explain_takes_a_sentence_and_shows_predictions_before_and_after(command, tiny_run):
    code, out, _ = command("explain", tiny_run.directory, "--text", "owls sang", "--json")
    answer = json.loads(out)
    assert code == 0, answer["proofs"]
    assert answer["loss_after"] < answer["loss"] and len(answer["predictions"]) == len("owls sang") + 1


@pytest.mark.parametrize("arguments, sentence", [
    (["trace", "RUN", "--step", "99"], "step 99 is not recorded; steps 0 to 11 are"),
    (["trace", "nowhere", "--step", "1"], "no run.sqlite here"),
    (["explain", "RUN"], "give either --step N or --text"),
    (["explain", "RUN", "--step", "1", "--text", "x"], "give either --step N or --text"),
    (["explain", "RUN", "--step", "1", "--index", "1,2"], "--parameter NAME"),
    (["explain", "RUN", "--step", "1", "--parameter", "final_norm.weight", "--index", "a"], "whole numbers"),
    (["explain", "nowhere", "--step", "1"], "not a run directory"),
])  # fmt: skip
def test_mistakes(arguments, sentence, command, tiny_run):
    code, out, err = command(*[tiny_run.directory if a == "RUN" else a for a in arguments])
    assert code == 2 and out == "" and err.count("\n") == 1 and sentence in err
