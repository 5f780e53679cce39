"""The river's counts, stage by stage, against what is counted in the sources, the shards and the batches themselves."""

import itertools
import json

import pytest

from pellucid.config import DataConfig
from pellucid.data.build import prepare
from pellucid.data.interchange import export_tokens, import_tokens
from pellucid.data.river import COUNTS, river

CLEAN = ["the old king sees a ship\n" * (n % 4 + 1) + f"number {n}\n" for n in range(40)]
DIRTY = {3: "e\u0301tude, the other cafe\u0301s\r\n", 4: "\x07 \n", 5: CLEAN[0]}  # to compose, nothing left, a copy


def build(folder, texts, **settings):
    (folder / "corpus").mkdir()
    for number, text in enumerate(texts):
        (folder / "corpus" / f"{number:03}.txt").write_bytes(text.encode())
    settings = {"validation_fraction": 0.2, "sequence_length": 32, "tokenizer": {"kind": "bytes"}, **settings}
    return prepare(DataConfig(sources=[str(folder / "corpus")], directory=str(folder / "data"), **settings))


def counted(dataset):
    """{split: documents, text_bytes, tokens}, document by document."""
    found = {}
    for name in dataset.manifest["splits"]:
        split = dataset.split(name)
        texts = [split.document(n) for n in range(len(split.reader.starts))]
        found[name] = {"documents": len(texts), "text_bytes": sum(len(text["text"].encode()) for text in texts),
                       "tokens": sum(len(text["token_ids"]) for text in texts)}
    return found


def total(splits, key):
    return sum(split[key] for split in splits.values())


def assert_flows(stages):
    """Nothing is lost or made between two stages."""
    for before, after in itertools.pairwise(stages):
        for kind in ("documents", "bytes", "tokens"):
            given, taken = before[f"{kind}_out"], after[f"{kind}_in"]
            assert given == taken or None in (given, taken), (before["name"], after["name"], kind)


def test_every_stage_has_what_went_in_and_out_and_one_that_changed_a_text_shows_it(tmp_path):
    texts = [DIRTY.get(n, text) for n, text in enumerate(CLEAN)]
    dataset = build(tmp_path, texts, deduplicate={"exact": True})
    stages = river(dataset)
    assert [stage["name"] for stage in stages] == ["read", "normalize", "deduplicate", "split", "tokenize", "pack"]
    assert_flows(stages)
    read, normalize, deduplicate, split, tokenize, pack = stages
    assert [read["documents_in"], normalize["documents_out"], split["documents_in"]] == [40, 39, 38]
    assert read["bytes_in"] == sum(len(text.encode()) for text in texts)
    shown = {sample["reason"]: (sample["before"], sample["after"]) for sample in normalize["samples"]}
    assert shown[None] == (DIRTY[3], "étude, the other cafés\n") and shown["empty"][1] is None
    assert [sample["reason"] for sample in deduplicate["samples"]] == ["exact duplicate"]
    found = counted(dataset)
    assert tokenize["splits"] == found
    assert split["splits"] == {name: {key: counts[key] for key in ("documents", "text_bytes")} for name, counts in found.items()}
    assert (tokenize["documents_in"], tokenize["bytes_in"], tokenize["tokens_out"]) == tuple(
        total(found, key) for key in ("documents", "text_bytes", "tokens"))
    rows = {name: dataset.split(name).rows(0, 10**6).targets_BT for name in found}
    assert pack["rows"] == sum(len(targets) for targets in rows.values()) and pack["positions"] == 32 * pack["rows"]
    assert pack["tokens_in"] == pack["tokens_out"] == sum(int((targets >= 0).sum()) for targets in rows.values())
    for name, targets in rows.items():
        assert pack["splits"][name]["packing"]["utilization"] == pytest.approx(float((targets >= 0).float().mean()))
    for sample in tokenize["samples"]:
        assert dataset.tokenizer.encode(sample["before"]) == sample["ids"] and len(sample["ids"]) == len(sample["after"])
        assert not sample["before"].isascii() or "".join(sample["after"]) == sample["before"]
        assert any(sample["before"] and text.startswith(sample["before"]) for text in [*texts, shown[None][1]])


def test_a_stage_that_changed_nothing_has_no_sample_and_without_a_held_out_split_all_is_trained_on(tmp_path):
    dataset = build(tmp_path, CLEAN, validation_fraction=0)
    stages = river(dataset)
    assert [(stage["name"], len(stage["samples"])) for stage in stages] == [
        ("read", 0), ("normalize", 0), ("split", 0), ("tokenize", 3), ("pack", 0)]
    assert_flows(stages)
    assert stages[2]["splits"] == {"train": {"documents": 40, "text_bytes": sum(map(len, CLEAN))}}
    assert all(set(COUNTS) <= stage.keys() for stage in stages)


def test_versions_of_augmented_documents_come_between_the_split_and_the_tokens(tmp_path):
    dataset = build(tmp_path, CLEAN, augment=[{"name": "keyboard", "rate": 0.3}])
    *_, split, augment, tokenize, _ = stages = river(dataset)
    assert [stage["name"] for stage in stages[2:]] == ["split", "augment", "tokenize", "pack"]
    train = dataset.train.reader.columns(["parent"]).column("parent")
    assert augment["documents_out"] == len(train) - train.null_count > 0 and augment["samples"]
    assert split["documents_out"] == 40 == total(split["splits"], "documents")
    assert split["splits"]["train"]["documents"] == train.null_count == augment["documents_in"]
    assert split["bytes_out"] == total(split["splits"], "text_bytes") == sum(map(len, CLEAN))
    assert split["splits"]["train"]["text_bytes"] == augment["bytes_in"]
    assert tokenize["documents_in"] == 40 + augment["documents_out"]
    assert tokenize["bytes_in"] == split["bytes_out"] + augment["bytes_out"]


def test_labelled_documents_longer_than_a_row_lose_tokens_when_packed(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "ab" * n, "label": "xy"[n % 2]}) + "\n" for n in range(1, 31)))
    config = DataConfig(sources=[str(tmp_path / "a.jsonl")], directory=str(tmp_path / "data"), validation_fraction=0,
                        sequence_length=32, tokenizer={"kind": "bytes"}, label_field="label")
    pack = river(prepare(config))[-1]
    assert pack["tokens_in"] == sum(2 * n + 1 for n in range(1, 31))
    assert pack["tokens_out"] == sum(min(2 * n + 1, 32) for n in range(1, 31))


def test_imported_tokens_were_never_text(tmp_path):
    dataset = build(tmp_path, CLEAN)
    export_tokens(dataset, "megatron", tmp_path / "out")
    stages = river(import_tokens(str(tmp_path / "out"), tmp_path / "back", sequence_length=32))
    assert [stage["name"] for stage in stages] == ["import", "split", "pack"]
    assert_flows(stages)
    tokens = total(counted(dataset), "tokens")
    assert all((stage["tokens_in"], stage["tokens_out"]) == (tokens, tokens) for stage in stages)
