"""The dashboard of a classification and of a regression: it speaks of documents and their labels, with their numbers."""

import json
import math
import random
import re

import pytest

from pellucid.observe.reader import Reader
from pellucid.observe.theatre import staged_steps, theatre_path
from pellucid.observe.web.feed import Feed
from pellucid.observe.web.report import write_report
from pellucid.run import train

WORDS = {"animal": "cat dog horse cow", "metal": "iron gold tin lead"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Finished runs: {"classification": directory, "regression": directory}."""
    folder, rng = tmp_path_factory.mktemp("labelled-watched"), random.Random(0)
    rows = []
    for number in range(120):
        kind = rng.choice(list(WORDS))
        words = rng.choices(WORDS[kind].split(), k=rng.randint(2, 6))
        rows.append(json.dumps({"text": f"{' '.join(words)} {number}", "kind": kind, "words": len(words), "share": rng.random()}))
    (folder / "a.jsonl").write_text("\n".join(rows))
    made = {}
    for task, fields in (("classification", "kind"), ("regression", ["words", "share"])):
        data = {"sources": [str(folder / "a.jsonl")], "label_field": fields, "sequence_length": 48, "validation_fraction": 0.2,
                "tokenizer": {"kind": "bytes"}, "directory": str(folder / "data")}
        training = {"task": task, "max_steps": 20, "batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "evaluate_every": 5}
        tables = {"model": {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4, "num_attention_heads": 2}, "data": data,
                  "training": training, "optimizer": {"name": "adamw", "learning_rate": 3e-3}, "schedule": {"warmup_steps": 5},
                  "checkpoint": {"every_steps": 10}, "observe": {"budget": 1.0}}  # fmt: skip
        made[task] = train(tables, run_dir=folder / task).directory
    return made


@pytest.fixture(scope="module")
def pages(labelled, serving):
    with serving([Feed(run) for run in labelled.values()]) as address:
        yield {task: f"{address}#run={n}&" for n, task in enumerate(labelled)}


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_learning_tells_the_loss_of_documents_and_the_measures_of_the_task(labelled, pages, open_page, number, task):
    page = open_page(f"{pages[task]}view=learning&step=12", wait="#written-title")
    with Reader(labelled[task]) as reader:
        steps, losses = reader.series("run", "loss", stream="run")
        evaluated, measures = reader.series("held-out", "accuracy" if task == "classification" else "r2", stream="evaluation")
    measure = float(measures[list(evaluated).index(9)])  # the newest at or before the selected step
    loss, text = float(losses[list(steps).index(12)]), page.locator("main").inner_text()
    if task == "classification":
        assert f"{number(loss)} nats per document: the right class gets {100 * math.exp(-loss):.2f} %" in text
        assert f"Guessing among 2 classes would give {number(math.log(2))}." in text
        assert f"(accuracy {number(measure)}" in text
    else:
        assert f"{number(loss)} σ² per document: predictions are {number(math.sqrt(loss))} standard deviations off" in text
        assert f"(R² {number(measure)}" in text
    assert "What does it say of documents?" in text and "Which documents is it still wrong about?" in text
    assert "token gets" not in text and "tokens would give" not in text
    label = page.locator("#documents-title").locator("xpath=ancestor::section").locator("td:last-child").first.inner_text()
    assert label in WORDS if task == "classification" else re.fullmatch(r"words [2-6], share 0\.\d{4,}", label)
    assert "was changed" not in text, "a line of JSON is no plain text, and nothing changed what it says"


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_document_is_followed_through_the_seven_phases_live_and_in_the_report(labelled, pages, open_page, number, tmp_path, task):
    step = staged_steps(labelled[task])[-1]
    play = json.loads(theatre_path(labelled[task], step).read_text())
    output, true = play["outputs"][-1], play["tokens"][-1]["target_text"]
    report = write_report(labelled[task], tmp_path / "run.html").as_uri()
    for address, options in ((pages[task], {}), (f"{report}#", {"offline": True})):
        page = open_page(f"{address}view=network&step={step}&phase=2", wait=".theatre .scene", reduced_motion="reduce", **options)
        story = page.locator(".story").inner_text()
        assert f"The truth is “{true}”." in story
        if task == "classification":
            best = max(output["choices"], key=lambda choice: choice["p"])
            assert f"says “{best['text']}” with {100 * best['p']:.2f} %" in story
        else:
            assert ", ".join(f"{choice['text']} {number(choice['told'])}" for choice in output["choices"]) in story
        losses = [float(cell.get_attribute("data-value")) for cell in page.locator("table.outcome td[data-value]").all()]
        assert losses[:2] == [pytest.approx(output["loss"]), pytest.approx(output["loss_after"])]
        played = page.locator(".theatre").inner_text()
        assert "NaN" not in played and "undefined" not in played
        page.goto(f"{address}view=learn&step={step}")
        page.get_by_text(f"The truth is “{true}”.").wait_for()
