"""Batches: targets worked by hand, every token once per epoch, order without memory, traces that point at the bytes."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from pellucid.config import DataConfig, UserError
from pellucid.data.build import prepare
from pellucid.data.dataset import FORMAT, Dataset
from pellucid.data.search import search


def words(n: int, seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(["alpha ", "beta ", "gámma\n", "δ "]) for _ in range(n))


def corpus(folder: Path, texts: list[str], name: str = "corpus.jsonl") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / name)


def configure(folder: Path, sources, **settings) -> DataConfig:
    values = {"sources": sources, "directory": str(folder / "data"), "sequence_length": 16, "validation_fraction": 0.0,
              "tokenizer": {"kind": "bytes"}, **settings}
    return DataConfig(**values)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [words(n % 13 + 1, n) for n in range(80)]
    return prepare(configure(folder, [corpus(folder, texts)], validation_fraction=0.1))


def test_inputs_and_targets_are_those_worked_by_hand(tmp_path):
    """Texts "abcdefg" and "xy", T = 5, ids of bytes are byte + 4, eos 2, pad 0."""
    split = prepare(configure(tmp_path, [corpus(tmp_path, ["abcdefg", "xy"])], sequence_length=5)).train
    ids = {char: ord(char) + 4 for char in "abcdefgxy"}
    batch = split.rows(0, 10)
    rows = {tuple(tokens): [list(map(int, values)) for values in rest] for tokens, *rest in zip(
        batch.tokens_BT.tolist(), batch.targets_BT, batch.segment_ids_BT, batch.positions_BT, strict=True)}
    a, b, c, d, e, f, g, x, y = (ids[char] for char in "abcdefgxy")
    assert rows == {
        (2, a, b, c, d): [[a, b, c, d, e], [1] * 5, [0, 1, 2, 3, 4]],
        (e, f, g, 0, 0): [[f, g, 2, -100, -100], [1, 1, 1, 0, 0], [0, 1, 2, 0, 0]],
        (2, x, y, 0, 0): [[x, y, 2, -100, -100], [1, 1, 1, 0, 0], [0, 1, 2, 0, 0]],
    }


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_an_epoch_predicts_every_byte_of_every_document_exactly_once(tmp_path, packing):
    texts = [words(n, n) for n in (1, 2, 3, 5, 8, 13, 21, 34)]
    split = prepare(configure(tmp_path, [corpus(tmp_path, texts)], packing=packing)).train
    rebuilt = [{} for _ in texts]
    steps = -(-split.rows_per_epoch // 3)
    for step in range(steps):
        batch = split.samples(step * 3, min(step * 3 + 3, split.rows_per_epoch))
        pieces = split.describe_rows(batch.sample_ids_B.numpy())
        for piece in pieces:
            where = slice(piece["position_start"], piece["position_start"] + piece["length"])
            targets = batch.targets_BT[piece["row"], where].tolist()
            inputs = batch.tokens_BT[piece["row"], where].tolist()
            assert inputs[1:] == targets[:-1]
            assert batch.segment_ids_BT[piece["row"], where].unique().tolist() == [piece["segment"]]
            assert batch.positions_BT[piece["row"], where].tolist() == list(range(piece["length"]))
            assert piece["token_start"] not in rebuilt[piece["ordinal"]]
            rebuilt[piece["ordinal"]][piece["token_start"]] = targets
        padding = batch.segment_ids_BT == 0
        assert (batch.targets_BT[padding] == -100).all() and (batch.tokens_BT[padding] == 0).all()
        assert (batch.targets_BT[~padding] >= 0).all()
    for text, pieces in zip(texts, rebuilt, strict=True):
        tokens = [token for start in sorted(pieces) for token in pieces[start]]
        assert tokens == [byte + 4 for byte in text.encode()] + [2]
    assert split.tokens_per_epoch == sum(len(text.encode()) + 1 for text in texts)


def test_the_order_is_a_function_of_seed_and_sample_alone(dataset):
    split = dataset.split("train", seed=7)
    long = split.samples(0, 60)
    assert long.tokens_BT.equal(torch.cat([split.batch(step, 12).tokens_BT for step in range(5)]))
    assert long.tokens_BT.equal(torch.cat([split.batch(step, 20).tokens_BT for step in range(3)]))
    again = Dataset(dataset.directory).split("train", seed=7)
    assert again.batch(123_456_789, 4).tokens_BT.equal(split.batch(123_456_789, 4).tokens_BT)
    assert not dataset.split("train", seed=8).samples(0, 60).tokens_BT.equal(long.tokens_BT)
    assert dataset.train.samples(0, 60).tokens_BT.equal(dataset.split("train", 0).samples(0, 60).tokens_BT)


def test_epochs_are_counted(dataset):
    split = dataset.train
    assert split.epoch_of(0, 4) == 0.0
    assert split.epoch_of(split.rows_per_epoch, 3) == 3.0
    ids = [int(i) for i in split.samples(0, 2 * split.rows_per_epoch).sample_ids_B]
    for epoch in (ids[: len(split)], ids[len(split) :]):
        assert sorted(epoch) == list(range(len(split)))


def test_held_out_rows_come_in_one_fixed_order(dataset):
    rows = dataset.validation.rows(0, 10**6)
    assert sorted(rows.sample_ids_B.tolist()) == list(range(len(dataset.validation)))
    other = dataset.split("validation", seed=99)
    assert other.rows(1, 3).tokens_BT.equal(rows.tokens_BT[1:3])


def test_source_weights_are_exact_shares(tmp_path):
    first = corpus(tmp_path, ["a" * 15] * 40, "a.jsonl")
    second = corpus(tmp_path, ["b" * 15] * 10, "b.jsonl")
    config = configure(tmp_path, [{"path": first, "weight": 0.5}, {"path": second, "weight": 3.0}])
    split = prepare(config).train
    assert split.rows_per_epoch == 20 + 30
    for epoch in range(3):
        sources = split.samples(50 * epoch, 50 * epoch + 50).source_ids_B
        assert np.bincount(sources).tolist() == [20, 30]
    rows = split.samples(0, 100).sample_ids_B.numpy()
    assert np.bincount(rows, minlength=50).tolist() == [1] * 40 + [6] * 10
    assert split.tokens_per_epoch == 50 * 16


def test_a_trace_points_at_the_bytes_of_the_source(tmp_path):
    text = words(3000, 1)
    (tmp_path / "a.txt").write_text(text)
    for kind in ("bpe", "sentencepiece", "bytes"):
        split = prepare(configure(tmp_path, [str(tmp_path / "a.txt")], tokenizer={"kind": kind, "vocab_size": 400})).train
        batch, pieces = split.batch(2, 5), split.trace(2, 5)
        assert {piece["row"] for piece in pieces} == set(range(5))
        for piece in pieces:
            where = slice(piece["position_start"], piece["position_start"] + piece["length"])
            targets = batch.targets_BT[piece["row"], where].tolist()
            expected = b"".join(split.tokenizer.token_bytes(i) for i in targets)
            if kind == "sentencepiece" and piece["token_start"] == 0:
                expected = expected[1:]  # the space it puts before a text
            assert text.encode()[piece["byte_start"] : piece["byte_end"]] == expected
            assert piece["exact"] and piece["source"] == str(tmp_path / "a.txt")
            assert piece["sample"] == batch.sample_ids_B[piece["row"]]


def lossy_tokenizer(path: Path, kind: str) -> str:
    """A tokenizer.json that loses part of a text: WordPiece its blanks, the other its accents."""
    if kind == "wordpiece":
        vocabulary = {"<pad>": 0, "<eos>": 1, "[UNK]": 2, **{name: n for n, name in enumerate(("al", "##pha", "beta", "go"), 3)}}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    else:
        vocabulary = {"<pad>": 0, "<eos>": 1, **{char: n for n, char in enumerate("abeglhpotm ", 2)}}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()])
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize(("kind", "text"), [
    ("sentencepiece", "alpha \u2581 beta \u2581\u2581"), ("wordpiece", "alpha beta go"), ("wordpiece", "go alpha"),
    ("accents", "gámma beta"),
])
def test_bytes_are_exact_only_where_the_tokens_spell_them(tmp_path, kind, text):
    """WordPiece's "alpha beta go" becomes al ##pha beta go: two signs for two blanks, of the same length but elsewhere."""
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("beta")
    path = None if kind == "sentencepiece" else lossy_tokenizer(tmp_path / "tokenizer.json", kind)
    tokenizer = {"kind": "file", "path": path} if path else {"kind": kind, "vocab_size": 300}
    dataset = prepare(configure(tmp_path, [str(tmp_path / "*.txt")], tokenizer=tokenizer, sequence_length=4))
    for piece in dataset.train.describe_rows(np.arange(len(dataset.train))):
        content = Path(piece["source"]).read_bytes()
        if piece["source"].endswith("a.txt"):
            assert (piece["exact"], piece["byte_start"], piece["byte_end"]) == (False, 0, len(content))
        else:
            assert piece["exact"]
    found = {Path(item.source).name: item for item in search(dataset, "beta").found}
    assert (found["b.txt"].exact, found["b.txt"].byte_start, found["b.txt"].byte_end) == (True, 0, 4)
    if "a.txt" in found:
        assert (found["a.txt"].exact, found["a.txt"].byte_start, found["a.txt"].byte_end) == (False, 0, len(text.encode()))


def test_a_document_can_be_asked_for(dataset):
    found = dataset.train.document(3)
    [line] = Path(found["source"]).read_bytes()[found["byte_start"] : found["byte_end"]].splitlines()
    assert found["text"] == json.loads(line)["text"] and found["token_ids"][-1] == 2


def test_cross_document_attention_makes_a_row_one_segment(tmp_path):
    texts = ["abc", "de", "fgh"]
    split = prepare(configure(tmp_path, [corpus(tmp_path, texts)], cross_document_attention=True, sequence_length=8)).train
    for step in range(split.rows_per_epoch):
        batch = split.batch(step, 1)
        used = int((batch.targets_BT >= 0).sum())
        assert batch.segment_ids_BT[0].tolist() == [1] * used + [0] * (8 - used)
        assert batch.positions_BT[0, :used].tolist() == list(range(used))


def test_many_shards_read_as_one(tmp_path, monkeypatch):
    texts = [words(n % 40 + 1, n) for n in range(200)]
    whole = prepare(configure(tmp_path / "one", [corpus(tmp_path, texts)]))
    monkeypatch.setattr("pellucid.data.blocks.BLOCK_BYTES", 2000)
    monkeypatch.setattr("pellucid.data.shards.TOKENS_PER_SHARD", 500)
    parts = prepare(configure(tmp_path / "many", [corpus(tmp_path, texts)]))
    assert len(parts.manifest["splits"]["train"]["shards"]) > 10
    assert parts.train.batch(5, 16).tokens_BT.equal(whole.train.batch(5, 16).tokens_BT)
    assert parts.train.trace(5, 16) == whole.train.trace(5, 16)


@pytest.mark.parametrize("suffix", ["tok", "idx", "parquet"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named(dataset, tmp_path, suffix, harm):
    copy = tmp_path / "copy"
    shutil.copytree(dataset.directory, copy)
    path = copy / "shards" / f"00000.{suffix}"
    data = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if harm == "cut" else data[:40] + bytes([data[40] ^ 1]) + data[41:])
    with pytest.raises(UserError, match=f"00000.{suffix}"):
        Dataset(copy)


def test_no_dataset_here_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"manifest.json: cannot be read"):
        Dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        Dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest of data format"):
        Dataset(tmp_path)
    settings = {"sequence_length": 16, "packing": "of the future"}
    manifest = {"format": FORMAT, "settings": settings, "splits": {}, "files": {}, "tokenizer": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"settings this version does not know \(packing"):
        Dataset(tmp_path)


def test_a_document_is_spelled_once_for_all_its_pieces_and_steps(dataset, monkeypatch):
    """A step's batch may hold many pieces of one book: the page asks for every step of a run that trains."""
    split, steps = dataset.train, range(6)
    expected = [split.trace(step, 8) for step in steps]
    split = dataset.split("train")
    seen, spell = [], type(split)._spell
    monkeypatch.setattr(type(split), "_spell", lambda self, document, origin: (seen.append(document), spell(self, document, origin))[1])
    assert [split.trace(step, 8) for step in steps] == expected
    assert len(seen) == len(set(seen)) < sum(map(len, expected))
