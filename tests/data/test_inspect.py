"""`data inspect`: counts, samples with their differences, statistics worked by hand, and where a token came from."""

import json

import pytest

from pellucid.config import DataConfig, UserError
from pellucid.data.build import prepare
from pellucid.data.dataset import Dataset
from pellucid.data.inspect import describe, describe_origin, difference
from pellucid.data.origin import origin
from pellucid.data.statistics import statistics


def configure(folder, **settings) -> DataConfig:
    return DataConfig(**{"sources": [str(folder / "*.txt")], "directory": str(folder / "data"), "sequence_length": 8,
                         "tokenizer": {"kind": "bytes"}, "validation_fraction": 0, **settings})


def test_counts_samples_splits_and_statistics_are_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"windows\r\nline ends and enough text\r\n")
    (tmp_path / "b.txt").write_bytes(b"  \n")
    (tmp_path / "c.txt").write_bytes(b"plain\n")
    (tmp_path / "d.txt").write_bytes(b"")
    dataset = prepare(configure(tmp_path))
    numbers = statistics(dataset)["train"]
    said = describe(dataset.manifest, {"train": numbers}).plain
    assert "4 files, 45 bytes as stored, 3 documents; 1 gave no document\n" in said
    assert "documents  3 -> 2" in said and "dropped    1 empty" in said
    assert r"'windows\r\nline ends" in said and r"'windows\nline ends" in said
    assert "train      2 documents, 42 tokens" in said and "of positions used" in said
    assert (numbers["documents"], numbers["tokens"], numbers["text_bytes"], numbers["augmented"]) == (2, 42, 40, 0)
    assert numbers["lengths"]["shortest"] == 7 and numbers["lengths"]["longest"] == 35
    assert numbers["histogram"] == [(4, 7, 1), (32, 63, 1)] and "4 to 7" in said
    assert numbers["changed_by"] == {"normalize": 1, "nothing": 1}
    assert numbers["vocabulary_used"] == len(set(b"windows\nline ends and enough text\nplain\n")) + 1  # and eos
    assert numbers["sources"] == [{"path": str(tmp_path / "*.txt"), "documents": 2, "tokens": 42}]
    assert numbers["languages"] is None or sum(numbers["languages"].values()) == pytest.approx(1)
    json.dumps(numbers)


def test_differences_are_coloured():
    before, after = difference("some\r\nold house", "some\nold mouse")
    coloured = lambda text: [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert before.plain == r"'some\r\nold house'" and after.plain == r"'some\nold mouse'"
    assert coloured(before) == [(r"\r", "bold red"), ("h", "bold red")] and coloured(after) == [("m", "bold green")]
    assert difference("gone", None)[1] is None


def test_every_token_leads_back_to_its_bytes(tmp_path):
    contents = {"a.txt": "naïve words and more\n", "b.txt": "changed\r\nby a stage\r\n", "c.txt": "数据 😀 text\n"}
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text.encode())
    dataset = prepare(configure(tmp_path, tokenizer={"kind": "bpe", "vocab_size": 300}))
    reader = dataset.train.reader
    for number in range(int(reader.ends[-1])):
        found = origin(dataset, "train", token=number)
        content = contents[found["source"].rpartition("/")[2]].encode()
        piece = dataset.tokenizer.token_bytes(found["token"]["id"])
        if found["exact"]:
            assert content[found["byte_start"] : found["byte_end"]] == piece
        else:
            assert (found["byte_start"], found["byte_end"]) == (0, len(content))
        assert found["decisions"] == {"normalize": "as it was" if found["exact"] else "changed"}
        [row] = found["rows"]
        pieces = dataset.train.describe_rows([row])
        assert any(p["document"] == found["document"] and
                   p["token_start"] <= found["token"]["position"] < p["token_start"] + p["length"] for p in pieces)
        assert found["source"] in describe_origin(found).plain
    for wrong in ({"token": 10**6}, {"document": -1}):
        with pytest.raises(UserError, match="the train split has"):
            origin(dataset, "train", **wrong)
    with pytest.raises(UserError, match="there is no split 'valid'; known: train, validation"):
        origin(dataset, "valid", token=0)
    with pytest.raises(UserError, match="give a token or a document, not both"):
        origin(dataset, "train", token=0, document=0)


def test_a_version_names_its_parent(tmp_path):
    (tmp_path / "a.txt").write_text("some words that will be swapped with each other here\n")
    for originals in (True, False):
        dataset = prepare(configure(tmp_path, augment=[{"name": "random_swap", "rate": 0.5}], augment_originals=originals))
        versions = [found for n in range(len(dataset.train.reader.ends))
                    if (found := origin(dataset, "train", document=n))["parent"]]
        [version] = versions
        assert version["parent"]["document"] == (0 if originals else None)
        assert "random_swap" in json.dumps(version["augmentation"]) and "a version of" in describe_origin(version).plain
        if originals:
            assert origin(dataset, "train", document=0)["content_hash"] == version["parent"]["content_hash"]


def test_data_of_an_earlier_format_is_built_anew(tmp_path):
    (tmp_path / "a.txt").write_text("some words that are long enough\n")
    folder = prepare(configure(tmp_path)).directory
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(UserError, match="build the data again"):
        Dataset(folder)
