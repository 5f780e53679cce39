"""prepare() with everything on, from a messy file to shards: counts by reason, samples, order and workers, a kill."""

import json
import random

import pytest

from pellucid.config import DataConfig, UserError, make_config
from pellucid.data import blocks as ledger
from pellucid.data.build import prepare
from pellucid.data.inspect import describe
from pellucid.data.stages import refine as module

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("an", "e", "il", "or", "um")]
WORDS = ["the", "of", "and", "with", "that", "have", "be", "to", "in", "was"]


def story(seed: int) -> str:
    """Twelve sentences of made-up words among English ones, different for every seed."""
    draw = random.Random(f"story {seed}")
    word = lambda: draw.choice(WORDS) if draw.random() < 0.3 else "".join(draw.choices(SYLLABLES, k=3))
    lines = [" ".join(word() for _ in range(12)).capitalize() + "." for _ in range(12)]
    return " ".join(lines[:6]) + "\n" + " ".join(lines[6:])


BENCHMARK = "What did the keeper of the northern lighthouse write in his diary on the night before the great storm came?"


def corpus() -> list[str]:
    texts = [story(seed) for seed in range(40)]
    near = texts[3].replace(".", " again.", 1)
    return [*texts, texts[0], texts[1].upper().replace(" ", "  "), near, "Too short.", "# " * 60 + texts[5],
            "The same line comes to the end of it.\n" * 30, f"{story(90)} {BENCHMARK} {story(91)}",
            f"{story(92)}\nMail me: jane@example.org."]


def configure(folder, texts: list[str], **settings) -> DataConfig:
    folder.mkdir(exist_ok=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "benchmark.txt").write_text(BENCHMARK)
    return make_config({"data": {
        "sources": [str(folder / "corpus.jsonl")], "directory": str(folder / "data"), "sequence_length": 64,
        "validation_fraction": 0.1, "tokenizer": {"kind": "bytes"}, "normalize": {"pii": ["email"], "whitespace": "trim"},
        "filter": {"length": True, "gopher_quality": True, "gopher_repetition": True, "c4": True, "fineweb": True,
                   "expression": "words < 5000"},
        "deduplicate": {"exact": True, "near": True, "substring_words": 60},
        "decontaminate": {"against": [str(folder / "benchmark.txt")], "held_out": True}, **settings}}).data


def kept(dataset) -> set[str]:
    splits = (dataset.train, dataset.validation)
    return {split.document(n)["text"] for split in splits for n in range(split.reader.ends.size)}


def test_every_stage_counts_what_it_drops_and_shows_samples(tmp_path):
    dataset = prepare(configure(tmp_path, corpus()))
    stages = {stage["name"]: stage for stage in dataset.manifest["stages"]}
    assert list(stages) == [
        "read", "normalize", "length", "gopher_quality", "gopher_repetition", "c4", "fineweb", "expression",
        "decontaminate benchmarks", "deduplicate", "cut repeated passages", "decontaminate held-out"]
    assert stages["length"]["dropped"] == {"too short": 1}
    assert stages["gopher_quality"]["dropped"] == {"too many hash signs": 1, "too few stop words": 1}
    assert stages["gopher_repetition"]["dropped"] == {"repeated lines": 1}
    assert stages["decontaminate benchmarks"]["dropped"] == {"shares text with a benchmark": 1}
    assert stages["deduplicate"]["dropped"] == {"exact duplicate": 1, "near-duplicate": 1}
    for before, after in zip(list(stages.values()), list(stages.values())[1:], strict=False):
        assert before["documents_out"] == after["documents_in"] and before["bytes_out"] == after["bytes_in"]
        assert after["documents_in"] - after["documents_out"] == sum(after["dropped"].values())
    assert any("jane@example.org" in s["before"] and "<email>" in s["after"] for s in stages["normalize"]["samples"])
    assert "1 exact duplicate, 1 near-duplicate" in describe(dataset.manifest, {}).plain
    splits = dataset.manifest["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 41 == len(kept(dataset))


@pytest.mark.parametrize("change", ["order", "blocks", "workers"])
def test_neither_order_nor_blocks_nor_workers_change_what_is_kept(tmp_path, monkeypatch, change):
    texts = corpus()
    first = prepare(configure(tmp_path / "a", texts))
    if change == "order":
        random.Random(1).shuffle(texts)
    elif change == "blocks":
        monkeypatch.setattr(ledger, "BLOCK_BYTES", 3000)
    second = prepare(configure(tmp_path / "b", texts, workers=2 if change == "workers" else 1))
    assert kept(first) == kept(second)


def test_a_build_killed_in_a_pass_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "BLOCK_BYTES", 3000)
    whole = prepare(configure(tmp_path, corpus()), directory=tmp_path / "whole")
    real, calls = module._apply, 0

    def dying(*arguments):
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_apply", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(configure(tmp_path, corpus()), directory=tmp_path / "again")
    assert not (tmp_path / "again").exists() and (tmp_path / ".again.building" / "blocks").is_dir()
    again = prepare(configure(tmp_path, corpus()), directory=tmp_path / "again")
    assert again.manifest["files"] == whole.manifest["files"] and again.manifest["stages"] == whole.manifest["stages"]


def test_a_changed_benchmark_is_another_dataset(tmp_path):
    config = configure(tmp_path, corpus())
    first = prepare(config)
    assert prepare(config).reused
    (tmp_path / "benchmark.txt").write_text(" ".join(story(7).split()[:40]))
    second = prepare(config)
    assert not second.reused and second.directory != first.directory and kept(first) != kept(second)


def test_a_filter_that_leaves_nothing_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no documents left to train on.*48 expression"):
        prepare(configure(tmp_path, corpus(), filter={"expression": "words > 5000"}))
    assert not list((tmp_path / "data").glob("[!.]*"))
