"""Tokens to and from other trainers' files, read and written here with numpy alone, from the formats' definitions."""

import itertools
import json
import struct
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pellucid.cli import app
from pellucid.config import UserError, load_config, make_config
from pellucid.data import interchange, shards
from pellucid.data.build import prepare
from pellucid.data.dataset import Dataset
from pellucid.data.interchange import export_tokens, import_tokens
from pellucid.data.tokenizer import load_tokenizer

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "tokenizer" / "tokenizer.model"
HEAD = b"MMIDIDX\x00\x00"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Prepared data of 40 documents with a held-out split."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"text {n} " + "says this and that\n" * (n % 7)}) + "\n"
                                               for n in range(40)))
    config = make_config({"data": {"sources": [str(folder / "text.jsonl")], "validation_fraction": 0.2, "sequence_length": 32,
                                   "tokenizer": {"kind": "bpe", "vocab_size": 300}}})
    return prepare(config.data, directory=folder / "data")


def documents(dataset, split):
    reader = dataset.split(split).reader
    return [reader.tokens(np.arange(start, end)).tolist() for start, end in zip(reader.starts, reader.ends, strict=True)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def megatron_documents(prefix):
    """An .idx and .bin by Megatron's own layout."""
    raw = prefix.with_suffix(".idx").read_bytes()
    assert raw[:9] == HEAD
    version, code, sequences, bounds = struct.unpack("<QBQQ", raw[9:34])
    assert version == 1
    dtype = {4: np.int32, 8: np.uint16}[code]
    lengths = np.frombuffer(raw, np.int32, sequences, 34)
    pointers = np.frombuffer(raw, np.int64, sequences, 34 + 4 * sequences)
    first = np.frombuffer(raw, np.int64, bounds, 34 + 12 * sequences)
    assert len(raw) == 34 + 12 * sequences + 8 * bounds
    content = prefix.with_suffix(".bin").read_bytes()
    found = [np.frombuffer(content, dtype, length, pointer).tolist() for length, pointer in zip(lengths, pointers, strict=True)]
    return dtype, [flat(found[a:b]) for a, b in itertools.pairwise(first)]


def write_megatron(prefix, parts, dtype=np.int32, code=4):
    """`parts`: per document its sequences."""
    sequences = [sequence for document in parts for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    pointers = (np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize).astype(np.int64)
    bounds = np.concatenate([[0], np.cumsum([len(document) for document in parts])]).astype(np.int64)
    prefix.with_suffix(".bin").write_bytes(np.array(flat(sequences), dtype=dtype).tobytes())
    prefix.with_suffix(".idx").write_bytes(
        HEAD + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds)) + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())


def test_megatron_there_and_back(built, tmp_path):
    assert run("data", "export", built.directory, "--to", "megatron", "--out", tmp_path / "out").exit_code == 0
    for split in ("train", "validation"):
        dtype, found = megatron_documents(tmp_path / "out" / split)
        assert dtype is np.uint16 and found == documents(built, split)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["tokenizer"] == built.tokenizer.fingerprint and shards.damage(tmp_path / "out", record["files"]) is None
    assert run("data", "import", tmp_path / "out", "--out", tmp_path / "back", "--sequence-length", 32).exit_code == 0
    back = Dataset(tmp_path / "back")
    assert documents(back, "train") == documents(built, "train")
    assert documents(back, "validation") == documents(built, "validation")
    assert back.tokenizer.fingerprint == built.tokenizer.fingerprint
    assert back.manifest["stages"][0]["settings"] == {"closing_eos_added": 0}
    assert back.train.batch(0, 4).tokens_BT.shape == (4, 32)
    text = built.train.document(3)["text"]
    assert back.train.document(3)["text"] == text and back.manifest["splits"]["train"]["text_bytes"] == sum(
        len(built.train.document(n)["text"].encode()) for n in range(len(documents(built, "train"))))
    origin = back.train.document(3)
    raw = (tmp_path / "out" / "train.bin").read_bytes()[origin["byte_start"] : origin["byte_end"]]
    assert np.frombuffer(raw, np.uint16).tolist() == origin["token_ids"]


def test_megatron_of_a_large_vocabulary_is_int32():
    assert interchange.megatron_type(65499) == "<u2" and interchange.megatron_type(65500) == "<i4"


def test_nanogpt_there_and_back(built, tmp_path):
    assert run("data", "export", built.directory, "--to", "nanogpt", "--out", tmp_path / "out").exit_code == 0
    for split, name in (("train", "train.bin"), ("validation", "val.bin")):
        stored = np.memmap(tmp_path / "out" / name, dtype=np.uint16, mode="r")  # as its train.py does
        assert stored.tolist() == flat(documents(built, split))
    back = import_tokens(str(tmp_path / "out"), tmp_path / "back", sequence_length=32)
    for split in ("train", "validation"):
        assert documents(back, split) == documents(built, split)
    export_tokens(built, "nanogpt", tmp_path / "wide", dtype="uint32")
    assert np.fromfile(tmp_path / "wide" / "train.bin", "<u4").tolist() == flat(documents(built, "train"))
    assert documents(import_tokens(str(tmp_path / "wide"), tmp_path / "back2"), "train") == documents(built, "train")


def test_megatron_made_by_others(built, tmp_path):
    """Several sequences a document, documents without eos, an empty one; int64."""
    eos = built.tokenizer.eos_token_id
    write_megatron(tmp_path / "theirs", [[[10, 11], [12]], [[13, eos]], [[]], [[20] * 300, [eos, 21, eos]]], np.int64, 5)
    dataset = import_tokens(str(tmp_path / "theirs.idx"), tmp_path / "data", tokenizer=built.directory / "tokenizer",
                            validation_fraction=0)
    assert documents(dataset, "train") == [[10, 11, 12, eos], [13, eos], [eos], [20] * 300 + [eos, 21, eos]]
    assert dataset.manifest["stages"][0]["settings"] == {"closing_eos_added": 2} and dataset.validation is None


def test_tables_and_hugging_face_datasets_of_tokens(built, tmp_path):
    eos = built.tokenizer.eos_token_id
    rows = [[5, 6, 7], [8, eos], [9] * 40, [eos]] * 3
    expected = [row if row[-1] == eos else [*row, eos] for row in rows]
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), tmp_path / "tokens.parquet", row_group_size=5)
    datasets.Dataset.from_dict({"ids": rows}).save_to_disk(str(tmp_path / "saved"))
    for source, field in ((tmp_path / "tokens.parquet", "input_ids"), (tmp_path / "saved", "ids")):
        dataset = import_tokens(str(source), tmp_path / f"from-{field}", tokenizer=built.directory / "tokenizer", field=field,
                                validation_fraction=0)
        assert documents(dataset, "train") == expected
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "hub" / "train.parquet")
    dataset = import_tokens(f"hf-dataset:{tmp_path / 'hub'}", tmp_path / "from-hub", tokenizer=built.directory / "tokenizer",
                            validation_fraction=0)
    assert documents(dataset, "train") == expected


def test_held_out_documents_are_chosen_by_their_tokens(built, tmp_path):
    rows = [[5 + n % 200, 6 + n // 200] for n in range(1000)]
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"input_ids": rows[::-1]}), tmp_path / "b.parquet")
    held_out = []
    for name in "ab":
        dataset = import_tokens(str(tmp_path / f"{name}.parquet"), tmp_path / name, tokenizer=built.directory / "tokenizer",
                                validation_fraction=0.1)
        held_out.append(sorted(documents(dataset, "validation")))
        assert len(documents(dataset, "train")) + len(held_out[-1]) == 1000
    assert held_out[0] == held_out[1] and 60 < len(held_out[0]) < 140


def test_many_blocks_and_shards(built, tmp_path, monkeypatch):
    monkeypatch.setattr(interchange, "BLOCK_TOKENS", 50)
    monkeypatch.setattr(shards, "TOKENS_PER_SHARD", 200)
    export_tokens(built, "megatron", tmp_path / "out")
    back = import_tokens(str(tmp_path / "out"), tmp_path / "back")
    assert documents(back, "train") == documents(built, "train") and len(back.manifest["splits"]["train"]["shards"]) == 3


def test_training_on_prepared_data(built, tiny_tables, tmp_path):
    from pellucid.run import train
    from pellucid.run_files import Run

    settings = tiny_tables(max_steps=4)
    settings["data"] = {"prepared": str(built.directory), "sequence_length": 32}
    train(settings, run_dir=tmp_path / "run")
    assert Run(tmp_path / "run").dataset().fingerprint == built.fingerprint
    settings["data"]["sequence_length"] = 64
    with pytest.raises(UserError, match=r"data.sequence_length = 64, but the data in .* were prepared with 32; set"):
        train(settings, run_dir=tmp_path / "run2")
    settings["data"] = {"prepared": str(built.directory), "sequence_length": 32, "mixture": [{"shares": [1, 1]}]}
    with pytest.raises(UserError, match=r"data.mixture: 2 shares for the 1 sources"):
        train(settings, run_dir=tmp_path / "run2")


def test_what_was_imported_is_what_a_run_without_settings_takes(built, tmp_path):
    export_tokens(built, "megatron", tmp_path / "out")
    shown = run("data", "import", str(tmp_path / "out"), "--out", str(tmp_path / "again"))
    assert prepare(load_config(None, [f"data.prepared={tmp_path / 'again'}"]).data).directory == tmp_path / "again"
    assert f"data.prepared={tmp_path / 'again'} data.sequence_length=128" in shown.stderr + shown.stdout


def test_ids_that_do_not_fit_are_refused(built, tmp_path):
    official = tmp_path / "official"
    load_tokenizer(OFFICIAL).save(official, convert=False)
    write_megatron(tmp_path / "large", [[[131071, 70000, 5]] * 3] * 200)
    large = import_tokens(str(tmp_path / "large.bin"), tmp_path / "large-data", tokenizer=official)
    with pytest.raises(UserError, match=r"131072 token ids do not fit nanoGPT's uint16; give --dtype uint32"):
        export_tokens(large, "nanogpt", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    export_tokens(large, "megatron", tmp_path / "out")
    dtype, found = megatron_documents(tmp_path / "out" / "train")
    assert dtype is np.int32 and found == documents(large, "train")
    with pytest.raises(UserError, match=r"large.bin: document 0 holds token id 131071, but the tokenizer has only the ids 0 to 275"):
        import_tokens(str(tmp_path / "large.bin"), tmp_path / "no", tokenizer=built.directory / "tokenizer")
    with pytest.raises(UserError, match=r"not the tokenizer of these tokens"):
        import_tokens(str(tmp_path / "out"), tmp_path / "no", tokenizer=built.directory / "tokenizer")
    assert not (tmp_path / "no").exists()


def test_bad_token_files_are_one_sentence(built, tmp_path):
    tokenizer = built.directory / "tokenizer"
    write_megatron(tmp_path / "good", [[[5, 6]], [[7]]])
    index, content = (tmp_path / "good.idx").read_bytes(), (tmp_path / "good.bin").read_bytes()

    def refused(name, idx, bin, says, **options):
        folder = tmp_path / name
        folder.mkdir()
        if idx is not None:
            (folder / "x.idx").write_bytes(idx)
        if bin is not None:
            (folder / "x.bin").write_bytes(bin)
        with pytest.raises(UserError, match=says) as error:
            import_tokens(str(folder / ("x.bin" if bin is not None else "x.idx")), tmp_path / "no", tokenizer=tokenizer, **options)
        assert "\n" not in str(error.value) and not (tmp_path / "no").exists()

    refused("cut", index[:-8], content, "truncated")
    refused("head", b"something else" * 9, content, "not a Megatron index")
    refused("version", index[:9] + struct.pack("<Q", 2) + index[17:], content, "version 2")
    refused("short", index, content[:-4], r"x.bin: 8 bytes where its index speaks of 12")
    refused("order", index[:34] + struct.pack("<i", 3) + index[38:], content, "damaged")
    refused("alone", index, None, r"x.bin: missing")
    refused("odd", None, b"abc", "no whole number of uint16")
    refused("negative", index, np.array([5, -1, 7], np.int32).tobytes(), "token id -1")
    refused("empty", None, b"", "no documents to train on")
    refused("kind", None, b"ab", "there is no other", kind="other")
    ids = pa.array([[1, None]])
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), ids, ids, ids], names=["text", "input_ids", "twice", "twice"]),
                   tmp_path / "t.parquet")
    for field, says in (("text", "holds string, not lists"), ("no", r"no column 'no'; the columns are text, input_ids"),
                        ("twice", "2 columns are called 'twice'"),
                        ("input_ids", "row 0: column 'input_ids' is null, or holds a null")):
        with pytest.raises(UserError, match=says):
            import_tokens(str(tmp_path / "t.parquet"), tmp_path / "no", tokenizer=tokenizer, field=field)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="not a complete table"):
        import_tokens(str(tmp_path / "bad.parquet"), tmp_path / "no", tokenizer=tokenizer)
    with pytest.raises(UserError, match="say which tokenizer made these tokens"):
        import_tokens(str(tmp_path / "good.bin"), tmp_path / "no")
    with pytest.raises(UserError, match="no such file or folder"):
        import_tokens(str(tmp_path / "nothing.bin"), tmp_path / "no", tokenizer=tokenizer)
    with pytest.raises(UserError, match="exists already"):
        import_tokens(str(tmp_path / "good.bin"), tmp_path, tokenizer=tokenizer)
    with pytest.raises(UserError, match="there is no format 'jax'"):
        export_tokens(built, "jax", tmp_path / "no")
