"""Whole runs: learning, resuming bit for bit, the saved folder, telemetry, and the commands on them."""

import csv
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn import metrics as peer

import pellucid
from pellucid import cli
from pellucid.config import HeadConfig, UserError
from pellucid.exchange.convert import convert
from pellucid.measure.documents import in_digits, predict_files
from pellucid.measure.tables import write_rows
from pellucid.observe.explain import explain
from pellucid.observe.explain_text import explain_text
from pellucid.observe.reader import Reader
from pellucid.observe.replay import state_before
from pellucid.observe.theatre import staged_steps, theatre_path
from pellucid.observe.trace import trace
from pellucid.run import train
from pellucid.training import checkpoint
from pellucid.training.evaluate import Evaluation
from pellucid.training.loop import Loop


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """A function: the `pellucid` command in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pellucid", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capfd.readouterr())

    monkeypatch.chdir(tmp_path)
    return call


def records(folder):
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]


def test_classes_are_learnt(class_run):
    with Reader(class_run.directory) as reader:
        _, losses = reader.series("run", "loss", stream="run")
        _, accuracy = reader.series("held-out", "accuracy", stream="evaluation")
        _, perplexity = reader.series("held-out", "perplexity", stream="evaluation")
    assert losses[0] == pytest.approx(math.log(3), rel=0.05) and losses[-1] < 0.2
    assert accuracy[0] < 0.7 and accuracy[-1] > 0.9
    assert not np.isfinite(perplexity.astype(float)).any(), "what is undefined is null"


def test_numbers_are_learnt(number_run):
    with Reader(number_run.directory) as reader:
        _, losses = reader.series("run", "loss", stream="run")
        _, r2 = reader.series("held-out", "r2", stream="evaluation")
    assert losses[0] == pytest.approx(1, rel=0.5) and losses[-1] < 0.3, "the variance of standardised numbers, at first"
    assert r2[-1] > 0.7


@pytest.mark.parametrize("task", [("classification", "label"), ("regression", ["words", "letters"])])
def test_resumed_run_equals_unbroken_run_bit_for_bit(tables, tmp_path, final_state, task):
    whole = train(tables(*task), run_dir=tmp_path / "whole")
    train(tables(*task, max_steps=12), run_dir=tmp_path / "cut")
    for step, folder in checkpoint.saved_steps(tmp_path / "cut" / "checkpoints").items():
        if step > 9:
            shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "cut" / "model")
    resumed = train(tables(*task), run_dir=tmp_path / "cut", resume=True)
    assert final_state(resumed.directory) == final_state(whole.directory)


@pytest.mark.parametrize(("changed", "best"), [
    ({"micro_batch_size": 2}, 5), ({"label_smoothing": 0.9}, 10), ({"evaluate_rows": 2}, 10)])
def test_the_lowest_held_out_loss_is_sought_anew_where_a_resumed_run_measures_otherwise(tables, tmp_path, monkeypatch, changed, best):
    monkeypatch.setattr(Loop, "measure", lambda loop, rows: Evaluation(nats=1.0 if loop.counters.step == 5 else 2.0, tokens=1))
    both = {"label_smoothing": 0.1, "evaluate_every": 5}
    run = train(tables(max_steps=6, **both) | {"observe": {"enabled": False}}, run_dir=tmp_path / "run")
    train(tables(max_steps=12, **both | changed) | {"observe": {"enabled": False}}, run_dir=run.directory, resume=True)
    assert checkpoint.newest_good(run.directory / "checkpoints").state["counters"]["best_step"] == best


def test_config_of_a_run_repeats_it(class_run, tmp_path, final_state):
    again = train(class_run.directory / "config.toml", run_dir=tmp_path / "again")
    assert final_state(again.directory) == final_state(class_run.directory)


def test_saved_folder_is_a_hugging_face_classifier_and_comes_back(class_run, number_run):
    for run, kind in ((class_run, "single_label_classification"), (number_run, "regression")):
        model, tokenizer = pellucid.load(run.directory)
        values = json.loads((run.directory / "model" / "config.json").read_text())
        assert values["architectures"] == ["Grok1ForSequenceClassification"] and values["problem_type"] == kind
        assert list(values["id2label"].values()) == model.config.head.labels == list(values["label2id"])
        tensors = load_file(run.directory / "model" / "model.safetensors")
        assert "lm_head.weight" not in tensors and torch.equal(tensors["score.weight"], model.score.weight)
        tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode("cat dog")]])
        newest = list(checkpoint.saved_steps(run.directory / "checkpoints").values())[-1]
        assert torch.equal(model.state_dict()["score.weight"], checkpoint.load(newest).tensors["model"]["score.weight"])
        assert model(tokens).shape == (1, 8, len(model.config.head.labels))


def test_a_head_has_no_place_in_the_official_format(class_run, tmp_path):
    with pytest.raises(UserError, match="no place for the head"):
        convert(class_run.directory, tmp_path / "xai", to="xai")
    convert(class_run.directory, tmp_path / "hf", to="hf")
    assert pellucid.load(tmp_path / "hf")[0].config.head.labels == ["animal", "colour", "metal"]


def test_trace_shows_the_labels_and_explain_proves_the_update_of_the_head(class_run):
    traced = trace(class_run.directory, 50)
    assert {d.label for d in traced.documents} <= {"animal", "colour", "metal"}
    assert all(d.loss is not None for d in traced.documents) and traced.tokens[0].token in ("animal", "colour", "metal")
    mean = sum(d.loss for d in traced.documents) / len(traced.documents)
    assert mean == pytest.approx(traced.loss, rel=1e-5), "one prediction a document"


@pytest.mark.parametrize("name", ["score.weight", "layers.0.moe.down_proj", "embedding.weight"])
def test_every_update_of_a_labelled_run_is_explained_with_all_proofs(number_run, name):
    explained = explain(number_run.directory, 40, name)
    assert not [proof for proof in explained.proofs if proof.holds is False], explained.proofs
    assert explained.proofs[0].holds


def test_a_step_on_a_sentence_makes_its_class_likelier(class_run, number_run):
    explained = explain_text(class_run.directory, "cat dog", label="metal")
    (answer,) = explained.predictions
    assert answer.token == "metal" and answer.expected_before == "animal" and answer.after > answer.before
    assert not [proof for proof in explained.proofs if proof.holds is False]
    lines = dict(explain_text(number_run.directory, "cat", label="6, 15").lines)
    assert lines["words, predicted after it"] > lines["words, predicted before the step"]
    with pytest.raises(UserError, match="say what this text is, with --label"):
        explain_text(class_run.directory, "cat")
    with pytest.raises(UserError, match="knows no such class; did you mean 'metal'"):
        explain_text(class_run.directory, "cat", label="mettal")


# ----------------------------------------------------------------------------------------- from a checkpoint


@pytest.fixture(scope="module")
def language_run(folder, tables):
    wanted = tables("language_modeling", None)
    return train(wanted, run_dir=folder / "language")


def test_a_head_on_a_language_model_starts_from_its_weights_and_tokenizer(language_run, tables, tmp_path):
    wanted = tables(max_steps=6, evaluate_every=0)
    wanted["model"] = {"init_from": str(language_run.directory)}
    wanted["checkpoint"] = {"every_steps": 0}
    run = train(wanted, run_dir=tmp_path / "run")
    begun = checkpoint.load(checkpoint.saved_steps(run.directory / "checkpoints")[0])
    model, tokenizer = language_run.load()
    for name, tensor in model.state_dict().items():
        assert torch.equal(begun.tensors["model"][name], tensor), name
    assert run.manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint


def test_what_is_asked_of_a_tokenizer_that_the_origin_brings_is_passed_over_and_said(language_run, tables, tmp_path, capsys):
    wanted = tables(max_steps=1, evaluate_every=0)
    wanted["model"] = {"init_from": str(language_run.directory)}
    wanted["data"]["tokenizer"] = {"kind": "bpe", "vocab_size": 300, "encoder": "reference"}
    run = train(wanted, run_dir=tmp_path / "run", progress=True)
    assert f"the tokenizer is that of {language_run.directory}; what data.tokenizer asks for is passed over" in capsys.readouterr().out
    assert run.manifest["tokenizer"]["fingerprint"] == language_run.manifest["tokenizer"]["fingerprint"]
    assert run.config.data.tokenizer.encoder == "reference"
    del wanted["data"]["tokenizer"]
    train(wanted, run_dir=tmp_path / "another", progress=True)
    assert "passed over" not in capsys.readouterr().out


def test_it_is_resumed_and_replayed_without_the_origin(language_run, tables, tmp_path, final_state):
    shutil.copytree(language_run.directory, tmp_path / "origin")
    wanted = tables(max_steps=4)
    wanted["model"] = {"init_from": str(tmp_path / "origin")}
    wanted["checkpoint"] = {"every_steps": 0, "keep_last": 9}
    wanted["data"]["tokenizer"] = {"kind": "file", "path": str(language_run.directory / "model")}
    run = train(wanted, run_dir=tmp_path / "run")
    shutil.rmtree(tmp_path / "origin")
    assert explain(run.directory, 2, "score.weight").proofs[0].holds, "from the checkpoint of step 0"
    whole = final_state(run.directory)
    shutil.rmtree(run.directory / "checkpoints" / "step-4")
    train(None, run_dir=run.directory, resume=True)
    assert final_state(run.directory) == whole


def test_it_is_resumed_by_its_settings_or_its_own_when_the_origin_is_gone(language_run, tables, tmp_path, final_state):
    """The tokenizer is the origin's too."""
    shutil.copytree(language_run.directory, tmp_path / "origin")
    wanted = tables(max_steps=4, evaluate_every=0)
    wanted["model"] = {"init_from": str(tmp_path / "origin")}
    wanted["checkpoint"] = {"every_steps": 2, "keep_last": 9}
    del wanted["data"]["tokenizer"]
    run = train(wanted, run_dir=tmp_path / "run")
    whole, directory = final_state(run.directory), run.manifest["data"]["directory"]
    for settings in (wanted, None, wanted):
        shutil.rmtree(run.directory / "checkpoints" / "step-4")
        resumed = train(settings, run_dir=run.directory, resume=True)
        assert final_state(run.directory) == whole
        assert resumed.config == run.config and resumed.dataset().directory.as_posix() == directory
        shutil.rmtree(tmp_path / "origin", ignore_errors=True)
    wanted["model"]["hidden_size"] = 32
    with pytest.raises(UserError, match=r"model.hidden_size is 32, but the model in .* has 16"):
        train(wanted, run_dir=run.directory, resume=True)


def test_another_shape_than_the_origins_is_refused(language_run, tables, tmp_path):
    wanted = tables(max_steps=1)
    wanted["model"] |= {"init_from": str(language_run.directory), "hidden_size": 32}
    with pytest.raises(UserError, match=r"model.hidden_size is 32, but the model in .* has 16"):
        train(wanted, run_dir=tmp_path / "run")
    wanted["model"] = {"init_from": str(tmp_path / "nothing")}
    with pytest.raises(UserError, match="nothing"):
        train(wanted, run_dir=tmp_path / "run")


# ----------------------------------------------------------------------------------------------- commands


def test_predict_writes_a_line_a_document_in_order(command, class_run, folder):
    code, output, _ = command("predict", class_run.directory, "--data", folder / "a.jsonl")
    table = list(csv.DictReader(output.splitlines()))
    assert code == 0 and [int(row["record"]) for row in table] == list(range(150))
    right = np.mean([row["label"] == truth["label"] for row, truth in zip(table, records(folder), strict=True)])
    assert right > 0.9
    for row in table:
        chances = {name: float(row[f"p({name})"]) for name in ("animal", "colour", "metal")}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-4) and max(chances, key=chances.get) == row["label"]
    code, output, _ = command("predict", class_run.directory, "--data", folder / "a.jsonl", "--json")
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in table]
    code, output, _ = command("predict", class_run.directory / "model", "--data", folder / "a.jsonl", "--out", "o.jsonl")
    assert (code, output) == (0, "") and [json.loads(line) for line in open("o.jsonl")] == lines


def test_numbers_called_as_other_columns_are_stand_beside_them(number_run, folder):
    model, tokenizer = number_run.load()
    before = list(predict_files(model, tokenizer, str(folder / "a.jsonl")))
    named = model.config.head.model_copy(update={"labels": ("record", "truncated")})
    model.config = model.config.model_copy(update={"head": named})
    for old, new in zip(before, predict_files(model, tokenizer, str(folder / "a.jsonl")), strict=True):
        assert new == {"source": old["source"], "record": old["record"], "predicted record": old["words"],
                       "predicted truncated": old["letters"], "truncated": old["truncated"]}  # fmt: skip


def test_evaluate_is_what_scikit_learn_says_of_the_predictions(command, class_run, number_run, folder):
    predicted = lambda run: command("predict", run.directory, "--data", folder / "a.jsonl", "--json")[1].splitlines()
    lines = [json.loads(line) for line in predicted(class_run)]
    facts = json.loads(command("evaluate", class_run.directory, "--data", folder / "a.jsonl", "--json")[1])
    true, found = [r["label"] for r in records(folder)], [line["label"] for line in lines]
    assert facts["accuracy"] == pytest.approx(peer.accuracy_score(true, found))
    assert facts["macro_f1"] == pytest.approx(peer.f1_score(true, found, average="macro"))
    assert facts["confusion_matrix"] == peer.confusion_matrix(true, found, labels=facts["labels"]).tolist()
    chances = [list(line["probabilities"].values()) for line in lines]
    assert facts["loss"] == pytest.approx(peer.log_loss(true, chances, labels=facts["labels"]), rel=1e-5)

    lines = [json.loads(line) for line in predicted(number_run)]
    facts = json.loads(command("evaluate", number_run.directory / "model", "--data", folder / "a.jsonl", "--json")[1])
    for name in ("words", "letters"):
        true, found = [r[name] for r in records(folder)], [line[name] for line in lines]
        assert facts["numbers"][name]["rmse"] == pytest.approx(peer.root_mean_squared_error(true, found), rel=1e-6)
        assert facts["numbers"][name]["r2"] == pytest.approx(peer.r2_score(true, found), rel=1e-6)
    assert "rmse" not in facts, "words and letters have no mean"
    named = ["--label-field", "letters", "--label-field", "words"]  # trained on words and letters
    assert json.loads(command("evaluate", number_run.directory, "--data", folder / "a.jsonl", *named, "--json")[1]) == facts
    text = command("evaluate", class_run.directory, "--data", folder / "a.jsonl")[1]
    assert "macro-F1" in text and "true \\ predicted" in text


def test_the_held_out_measures_of_a_run_are_those_of_the_files(class_run, command, tmp_path):
    """Padded one by one here, packed there: the same numbers."""
    split = class_run.dataset().validation
    texts = [split.document(n) for n in range(len(split.labels))]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": d["text"], "label": d["label"]}) + "\n" for d in texts))
    facts = json.loads(command("evaluate", class_run.directory, "--data", "held.jsonl", "--json")[1])
    with Reader(class_run.directory) as reader:
        _, loss = reader.series("held-out", "loss", stream="evaluation")
        _, f1 = reader.series("held-out", "macro_f1", stream="evaluation")
    assert facts["loss"] == pytest.approx(float(loss[-1]), rel=1e-4) and facts["macro_f1"] == pytest.approx(float(f1[-1]), rel=1e-5)
    own = json.loads(command("evaluate", class_run.directory, "--json")[1])  # without --data: those that the run held out
    assert own == facts | {"loss": pytest.approx(facts["loss"], rel=1e-4)}


@pytest.mark.parametrize(("arguments", "expected"), [
    (["generate", "CLASSES", "--prompt", "cat"], "labels documents and does not continue texts"),
    (["predict", "LANGUAGE", "--data", "a.jsonl"], "a language model, which labels no documents"),
    (["evaluate", "LANGUAGE", "--data", "a.jsonl", "--label-field", "label"], "labels no documents"),
    (["evaluate", "CLASSES", "--data", "other.jsonl"], "the model knows no class 'anmal'; did you mean 'animal'?"),
    (["evaluate", "CLASSES", "--data", "a.jsonl", "--label-field", "kind"], "no field 'kind'"),
    (["evaluate", "NUMBERS", "--data", "a.jsonl", "--label-field", "words"], "a label of 1 numbers where there should be 2"),
    (["predict", "CLASSES", "--data", "a.jsonl", "--out", "o.txt"], "ends in .csv or .jsonl"),
    (["predict", "CLASSES", "--data", "a.jsonl", "--out", "none/o.csv"], "--out none/o.csv: there is no folder none"),
    (["predict", "CLASSES", "--data", "a.jsonl", "--text-field", "body"], "(set --text-field)"),
    (["evaluate", "LANGUAGE", "--data", "a.jsonl", "--text-field", "body"], "(set --text-field)"),
    (["measure", "context", "CLASSES"], "its loss is not one of next tokens"),
    (["predict", "CLASSES", "--data", "empty.jsonl"], "the file is empty"),
    (["explain", "NUMBERS", "--text", "cat", "--label", "nan,2"], "a label of [NaN, 2.0]: not finite numbers"),
    (["evaluate", "NUMBERS", "--data", "huge.jsonl"], "a label of [1e+300, 2.0]: not finite numbers"),
])  # fmt: skip
def test_the_wrong_model_or_label_is_one_sentence(command, folder, class_run, number_run, language_run, tmp_path, arguments, expected):
    shutil.copy(folder / "a.jsonl", tmp_path / "a.jsonl")
    (tmp_path / "other.jsonl").write_text('{"text": "cat", "label": "anmal"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "huge.jsonl").write_text('{"text": "cat", "words": 1e300, "letters": 2}\n')
    runs = {"CLASSES": class_run, "NUMBERS": number_run, "LANGUAGE": language_run}
    code, output, errors = command(*(runs[a].directory if a in runs else a for a in arguments))
    assert code == 2 and expected in errors and errors.count("\n") == 1 and not output, errors
    assert not list(tmp_path.glob("*o.txt*"))


@pytest.mark.parametrize("arguments", [("predict", "--data", "a.jsonl"), ("evaluate", "--data", "a.jsonl"), ("measure", "experts")])
def test_weights_that_are_not_finite_are_named_and_nothing_is_answered(command, folder, class_run, tmp_path, arguments):
    shutil.copy(folder / "a.jsonl", tmp_path / "a.jsonl")
    shutil.copytree(class_run.directory, tmp_path / "broken")
    (file,) = (tmp_path / "broken" / "model").glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        about = stored.metadata()
    weights = load_file(file)
    weights["score.weight"][0, 0] = math.nan
    save_file(weights, file, about)
    code, output, errors = command(*arguments, "broken")
    assert code == 2 and "the weights 'score.weight' hold NaN or infinity" in errors and not output, errors


@pytest.mark.parametrize("name", ["class_run", "number_run"])
def test_a_step_of_a_labelled_run_is_played_with_all_proofs(name, request):
    """One document's end is followed: what the head said there, against softmax and squared error written out here."""
    run = request.getfixturevalue(name)
    step = staged_steps(run.directory)[-1]
    play = json.loads(theatre_path(run.directory, step).read_text())
    replay = state_before(run.directory, step)
    batches, head = replay.micro_batches(), replay.model.config.head
    row, at = play["row"], play["position"]
    batch, own = batches[row // 4], row % 4
    labels_K = batch.labels_BTK[own, at].double()
    documents = sum(int((~b.labels_BTK[..., 0].isnan()).sum()) for b in batches)
    with torch.no_grad():
        scores_K = replay.model(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)[own, at].double()
    output, here, close = play["outputs"][-1], play["tokens"][-1], lambda value: pytest.approx(float(value), rel=1e-4, abs=1e-6)
    target = output["target"]
    if name == "class_run":
        p_C = scores_K.softmax(-1)
        assert here["target_text"] == head.labels[target] == head.labels[int(labels_K[0])]
        assert {choice["id"]: choice["p"] for choice in output["choices"]} == {c: close(p) for c, p in enumerate(p_C)}
        assert output["loss"] == close(-p_C[target].log()) and output["slope"] == close((p_C[target] - 1) / documents)
    else:
        error_K, told_K = scores_K - labels_K, scores_K.numpy() * head.std + head.mean
        assert [choice["told"] for choice in output["choices"]] == [close(v) for v in told_K]
        assert [choice["true"] for choice in output["choices"]] == [close(v) for v in labels_K.numpy() * head.std + head.mean]
        assert output["loss"] == close(error_K.square().mean()) and output["slope"] == close(error_K[target] / documents)
    assert output["fan"]["tensor"] == "score.weight" and all(other["target"] < 0 for other in play["outputs"][:-1])
    with Reader(run.directory) as reader:
        steps, losses = reader.series("run", "loss", stream="run")
    assert play["losses"]["batch"][0] == close(losses[list(steps).index(step)]) and play["step_result"]["tokens"] == documents
    assert all(proof["holds"] for proof in play["proofs"])
    compared = [edge for edge in play["edges"] if edge["difference"] is not None]
    refuted = [edge for edge in compared if edge["doubt"] <= 0.05 * abs(edge["autograd"])
               and abs(edge["difference"] - edge["autograd"]) > 1e-3 * abs(edge["autograd"]) + edge["doubt"]]  # fmt: skip
    assert compared and not refuted and all(edge["by_hand"] == close(edge["autograd"]) for edge in play["edges"])


def test_numbers_for_a_person_have_the_digits_that_tell_them_apart():
    head = HeadConfig(problem_type="regression", labels=["far", "near"], mean=[1e9, 0.0], std=[2e5, 2.0], max_length=8)
    assert in_digits(head, np.array([1e9 + 12345.0, 1.23456])) == "1.000012e+09, 1.235"
    assert in_digits(head, np.array([np.nan, 0.0])) == "nan, 0"


def test_where_predictions_cannot_be_written_the_file_named_is_the_one_asked_for(tmp_path):
    out = tmp_path / f"{'x' * 245}.csv"  # what is written first has a longer name, too long a one
    with pytest.raises(UserError, match=rf"{out}: cannot be written \(File name too long\); choose another name or folder"):
        write_rows([{"label": "cat"}], out, "csv")
    assert not any(tmp_path.iterdir())
