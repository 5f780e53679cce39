"""Searching prepared data: every document that holds a text, its bytes in the source, and the steps that saw it."""

import json
import random

import pytest

from pellucid.config import DataConfig, UserError
from pellucid.data import search as search_module
from pellucid.data.build import prepare
from pellucid.data.search import search
from pellucid.observe.sightings import find, render


def texts(count: int) -> list[str]:
    rng = random.Random(4)
    words = ["river", "houses", "naïve", "数据", "seven", "\n", "green 😀"]
    return [" ".join(rng.choices(words, k=rng.randrange(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_what_is_found_is_what_looking_into_every_text_finds(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(search_module, "TOKENS_AT_ONCE", 500)
    written = texts(60)
    for number, text in enumerate(written):
        (tmp_path / f"{number:02}.txt").write_text(text)
    config = DataConfig(sources=[str(tmp_path / "*.txt")], directory=str(tmp_path / "data"), sequence_length=32,
                        tokenizer={"kind": kind, "vocab_size": 400}, validation_fraction=0.2)
    dataset = prepare(config)
    for wanted in ("river", "houses naïve", "据", "even", "green 😀 \n", "nothing of the kind"):
        result = search(dataset, wanted, limit=100)
        holding = {str(tmp_path / f"{n:02}.txt"): text for n, text in enumerate(written) if wanted in text}
        assert result.documents == len(holding) and {item.source for item in result.found} == set(holding)
        assert result.occurrences == sum(text.count(wanted) for text in holding.values())
        for item in result.found:
            content = holding[item.source].encode()
            assert item.exact and content[item.byte_start : item.byte_end].decode() == wanted
            assert item.byte_start == content.find(wanted.encode())
            assert (item.before + item.text + item.after).strip() in holding[item.source]
            split = dataset.split(item.split)
            places = {piece["document"] for piece in split.describe_rows(item.rows)}
            assert item.document in places
    for wanted in (" river", " ", " 数"):  # a tokenizer's own space before a text is none of it
        assert search(dataset, wanted).occurrences == sum(text.count(wanted) for text in written)
    for nothing in ("", "\udcff", "caf\udce9"):  # the bytes that a terminal gave are no text
        with pytest.raises(UserError, match="nothing to search for"):
            search(dataset, nothing)


@pytest.mark.parametrize(("query", "places"), [
    ("naïve cat sat", 1), ("NAI\u0308VE  Cat\u00a0sat", 1), ("“cat” here", 1), ("cat,", 0), (" cat", 1), ("cat", 3), ("concat", 1),
    ("line\r\nnext", 1), ("mail jane@example.org now", 1), ("line \n\n\n\nnext", 0),
])
def test_a_query_is_normalised_as_the_data_were(tmp_path, query, places):
    text = "A Naïve   cat sat. The “cat” here? concat\r\nline  \r\nnext to it. Mail jane@example.org now"
    (tmp_path / "a.txt").write_text(text, newline="")
    rules = {"lowercase": True, "quotes": True, "whitespace": "collapse", "pii": ["email"]}
    config = DataConfig(sources=[str(tmp_path / "a.txt")], directory=str(tmp_path / "data"), sequence_length=16, normalize=rules,
                        tokenizer={"kind": "bytes"}, validation_fraction=0)
    result = search(prepare(config), query)
    assert result.occurrences == places
    with pytest.raises(UserError, match="once it is normalised"):
        search(prepare(config.model_copy(update={"normalize": config.normalize.model_copy(update={"punctuation": True})})), "?!")


def test_only_the_rows_that_hold_the_place_count(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100 + "needle" + "y" * 100)
    config = DataConfig(sources=[str(tmp_path / "a.txt")], directory=str(tmp_path / "data"), sequence_length=16,
                        tokenizer={"kind": "bytes"}, validation_fraction=0)
    split = prepare(config).train
    [found] = search(prepare(config), "needle").found
    assert found.tokens == (100, 106)
    assert sum(piece["length"] for piece in split.describe_rows(found.rows)) == 16  # tokens 96 to 111 are one piece of 16
    assert len(split.rows_of_document(0)) == 13


def test_a_run_says_which_of_its_steps_saw_a_text(tiny_run, tiny_tables, tmp_path, monkeypatch):
    split = tiny_run.dataset().split("train", tiny_run.config.training.seed)
    steps, size = tiny_run.config.training.max_steps, tiny_run.config.training.batch_size
    [result] = find("moon", [tiny_run.directory], limit=100)
    for item, seen in zip(result.search.found, result.steps[str(tiny_run.directory)], strict=True):
        rows = set(item.rows)
        expected = [step for step in range(steps) if rows & set(split.batch(step, size).sample_ids_B.tolist())]
        assert seen == (expected if item.split == "train" else [])
    assert any(result.steps[str(tiny_run.directory)]) and "seen at step" in render([result]).plain
    [alone] = find("moon", [tiny_run.dataset().directory], limit=1)
    assert alone.search.documents == result.search.documents and len(alone.search.found) == 1 and not alone.steps
    assert json.loads(json.dumps(alone.as_dict()))["documents"] == alone.search.documents
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no runs in runs/ here"):
        find("owls", [])
    with pytest.raises(UserError, match="neither a run nor a folder"):
        find("owls", [tmp_path])
