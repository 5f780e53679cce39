"""Augmentation within a build and a loader: what is stored and what is not, provenance, workers, the held-out split."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from pellucid.config import DataConfig, UserError
from pellucid.data.augment.pipeline import Augmentation
from pellucid.data.build import prepare

KEYBOARD = {"name": "keyboard", "rate": 0.1, "documents": 0.7}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(40):
        line = f"The committee met on day {n}. It will announce its decision in {n * 3} weeks.\n"
        (folder / f"{n:02}.txt").write_text(line * 3)
    return folder


def build(corpus, folder, *augment, **settings):
    settings = {"validation_fraction": 0.2, "sequence_length": 64, "tokenizer": {"kind": "bytes"}, **settings}
    return prepare(DataConfig(sources=[str(corpus)], directory=str(folder), augment=list(augment), **settings))


def rows(dataset, split="train"):
    numbers = [shard["number"] for shard in dataset.manifest["splits"][split]["shards"]]
    tables = [pq.read_table(dataset.directory / "shards" / f"{number:05d}.parquet") for number in numbers]
    return [row for table in tables for row in table.to_pylist()]


def files(dataset, suffixes=(".tok", ".idx")):
    return {name: f["sha256"] for name, f in dataset.manifest["files"].items() if name.endswith(suffixes)}


def test_versions_stand_beside_their_parents_and_can_be_made_again(corpus, tmp_path):
    dataset = build(corpus, tmp_path, KEYBOARD, augment_epochs=2)
    stored = rows(dataset)
    originals = {row["content_hash"]: n for n, row in enumerate(stored) if row["parent"] is None}
    versions = [n for n, row in enumerate(stored) if row["parent"] is not None]
    assert len(versions) > len(originals) and all(stored[n]["augmentation"] is None for n in originals.values())
    for n in versions[:10]:
        row, parent = stored[n], stored[originals[stored[n]["parent"]]]
        assert (row["source"], row["byte_start"], row["exact"]) == (parent["source"], parent["byte_start"], False)
        record = json.loads(row["augmentation"])
        again = Augmentation(DataConfig(augment=[s["settings"] for s in record["steps"]], augment_seed=record["seed"]))
        text = dataset.train.document(originals[row["parent"]])["text"]
        (version,) = again.versions([(row["parent"].hex(), text)], record["epoch"])
        assert version.text == dataset.train.document(n)["text"] != text
    stage = dataset.manifest["stages"][-1]
    assert stage["name"] == "augment" and stage["documents_out"] == len(versions)
    assert stage["documents_in"] == 2 * len(originals) and stage["samples"][0]["before"] != stage["samples"][0]["after"]
    assert stage["augmenters"][0]["changed"] > 0


def test_a_changed_lexicon_gives_its_own_words_in_the_same_process(corpus, tmp_path):
    entry = {"name": "synonyms", "source": "moby", "path": str(tmp_path / "words.txt"), "rate": 1.0}
    for word in ("board", "band"):
        (tmp_path / "words.txt").write_text(f"committee,{word}\n{word},committee\n")
        dataset = build(corpus, tmp_path / "data", entry)
        texts = [dataset.train.text_of(n) for n, row in enumerate(rows(dataset)) if row["parent"] is not None]
        assert texts and all(f"The {word} met" in text for text in texts)


def test_the_held_out_split_is_the_same_with_and_without(corpus, tmp_path):
    plain = build(corpus, tmp_path)
    augmented = build(corpus, tmp_path, {**KEYBOARD, "documents": 1.0}, {"name": "fill_in_the_middle", "rate": 1.0},
                      {"name": "token_masking", "rate": 0.5}, augment_epochs=3)
    held_out = rows(augmented, "validation")
    assert [row["content_hash"] for row in rows(plain, "validation")] == [row["content_hash"] for row in held_out]
    assert not any(row["parent"] for row in held_out)
    ours, theirs = augmented.validation.rows(0, 99), plain.validation.rows(0, 99)
    assert torch.equal(ours.tokens_BT, theirs.tokens_BT) and torch.equal(ours.targets_BT, theirs.targets_BT)
    assert augmented.train.rows_per_epoch > 2 * plain.train.rows_per_epoch
    assert augmented.tokenizer.fingerprint == plain.tokenizer.fingerprint


def test_rate_zero_stores_what_no_augmentation_stores(corpus, tmp_path):
    plain = build(corpus, tmp_path)
    assert files(build(corpus, tmp_path, {"name": "keyboard", "rate": 0.0}, augment_epochs=2)) == files(plain)
    replaced = build(corpus, tmp_path, {"name": "keyboard", "rate": 0.0}, augment_originals=False)
    assert files(replaced) == files(plain) and plain.directory != replaced.directory


def test_any_number_of_workers_stores_the_same_bytes(corpus, tmp_path):
    augment = KEYBOARD, {"name": "span_masking", "documents": 0.5}, {"name": "bpe_dropout", "documents": 0.5}
    settings = {"tokenizer": {"kind": "bpe", "vocab_size": 300}, "augment_epochs": 2}
    one = build(corpus, tmp_path / "1", *augment, workers=1, **settings)
    two = build(corpus, tmp_path / "2", *augment, workers=2, **settings)
    assert files(one, (".tok", ".idx", ".parquet")) == files(two, (".tok", ".idx", ".parquet"))
    stage = [m["stages"][-1] for m in (one.manifest, two.manifest)]
    assert stage[0] == stage[1]
    varied = [row for row in rows(one) if "bpe_dropout" in (row["augmentation"] or "")]
    assert varied
    assert build(corpus, tmp_path / "1", *augment, **settings).reused


def test_token_masking_changes_inputs_of_training_batches_only_and_repeatably(corpus, tmp_path):
    plain = build(corpus, tmp_path).train
    masked = build(corpus, tmp_path, {"name": "token_masking", "rate": 0.3}).train
    ours, theirs = masked.batch(2, 8), plain.batch(2, 8)
    assert torch.equal(ours.targets_BT, theirs.targets_BT) and torch.equal(ours.segment_ids_BT, theirs.segment_ids_BT)
    share = (ours.tokens_BT != theirs.tokens_BT)[ours.segment_ids_BT > 0].double().mean()
    assert 0.15 < share < 0.3  # some tokens are replaced by an equal one
    assert torch.equal(masked.batch(2, 8).tokens_BT, ours.tokens_BT)
    assert torch.equal(masked.samples(18, 20).tokens_BT, ours.tokens_BT[2:4])  # a rank's part of the batch
    epoch = masked.rows_per_epoch
    once, later = masked.samples(0, epoch), masked.samples(epoch, 2 * epoch)
    order = [s.sample_ids_B.argsort() for s in (once, later)]
    assert not torch.equal(once.tokens_BT[order[0]], later.tokens_BT[order[1]])  # the same rows, noised anew


def test_synonyms_and_round_trips_go_through_a_build(corpus, tmp_path, wordnet, need):
    need("/usr/share/apertium/modes/eng-spa.mode", "apertium apertium-eng-spa")
    augment = ({"name": "synonyms", "rate": 1.0}, {"name": "back_translation", "language": "eng", "pivot": "spa"})
    dataset = build(corpus, tmp_path, *augment)
    changed = [n for n, row in enumerate(rows(dataset)) if row["parent"]]
    assert len(changed) > 20 and (tmp_path / "translations.sqlite").is_file()
    names = {s["name"] for row in rows(dataset) if row["parent"] for s in json.loads(row["augmentation"])["steps"]}
    assert names == {"synonyms", "back_translation"}
    assert "commission" in dataset.train.document(changed[0])["text"]


@pytest.mark.parametrize("entry, sentence", [
    ({"name": "synonyms", "path": "/nowhere"}, "cannot read a wordnet lexicon at /nowhere"),
    ({"name": "back_translation", "pivot": "tlh"}, "Apertium"),
    ({"name": "bpe_dropout"}, "bpe_dropout cannot follow"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(corpus, tmp_path, entry, sentence):
    with pytest.raises(UserError, match=sentence):
        build(corpus, tmp_path / "data", entry)
    assert not (tmp_path / "data").exists() or not any(tmp_path.glob("data/[!.]*"))
