"""Labels go with their documents from the file to the batch; documents stay whole; bad labels are sentences."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pellucid.config import UserError, make_config
from pellucid.data.build import prepare


def build(path, task="classification", label_field="label", **data):
    config = make_config({
        "data": {"sources": [str(path)], "label_field": label_field, "sequence_length": 16, "validation_fraction": 0.0,
                 "tokenizer": {"kind": "bytes"}, "directory": str(path.parent / "data"), **data},
        "training": {"task": task},
    })  # fmt: skip
    return prepare(config.data)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def label_of(text):
    return "even" if int(text.split()[-1]) % 2 == 0 else "odd"


def rows(count=60):
    return [{"text": f"some  number {n}", "label": label_of(f"{n}")} for n in range(count)]


def documents(split):
    return [split.document(n) for n in range(len(split.labels))]


def test_labels_follow_their_documents_through_every_stage(tmp_path):
    """Normalised, deduplicated, filtered, augmented, split: the label still is what the text says."""
    path = write(tmp_path / "a.jsonl", rows() + rows(10))
    dataset = build(path, validation_fraction=0.3, normalize={"whitespace": "collapse"}, deduplicate={"exact": True},
                    filter={"expression": "characters > 13"}, sequence_length=64,
                    augment=[{"name": "random_swap", "rate": 0.0}, {"name": "characters", "rate": 0.05}])  # fmt: skip
    train, held_out = documents(dataset.train), documents(dataset.validation)
    originals = [d for d in train if d["augmentation"] is None]
    assert len({d["text"] for d in originals + held_out}) == len(originals + held_out) == 50, "no duplicates, no short ones"
    assert all(d["label"] == label_of(d["text"]) for d in originals + held_out)
    assert all("  " not in d["text"] for d in originals)
    label_of_hash = {d["content_hash"]: d["label"] for d in originals}
    versions = [d for d in train if d["augmentation"] is not None]
    assert versions and all(d["label"] == label_of_hash[d["parent"]] for d in versions)
    assert dataset.labels["names"] == ["even", "odd"] and sum(dataset.labels["counts"]) == len(train)


def test_every_document_is_one_piece_with_its_label_at_its_last_token(tmp_path):
    dataset = build(write(tmp_path / "a.jsonl", rows()), sequence_length=48)
    split, seen = dataset.train, []
    batch = split.rows(0, len(split))
    names, eos = dataset.labels["names"], dataset.tokenizer.eos_token_id
    for row, at in (~batch.labels_BTK[..., 0].isnan()).nonzero().tolist():
        mine = batch.segment_ids_BT[row] == batch.segment_ids_BT[row, at]
        assert int(mine.nonzero().max()) == at
        tokens = batch.tokens_BT[row][mine].tolist()
        assert tokens[0] == eos
        text = dataset.tokenizer.decode(tokens[1:])
        assert names[int(batch.labels_BTK[row, at, 0])] == label_of(text)
        seen.append(text)
    assert sorted(seen) == sorted(row["text"] for row in rows()), "each once"
    assert int(batch.segment_ids_BT.max()) > 1, "packed"


@pytest.mark.parametrize(("side", "read"), [("right", "\0abcdefghijklmno"), ("left", "klmnopqrstuvwxyz")])
def test_of_a_document_longer_than_a_row_one_side_is_read_and_it_is_counted(tmp_path, side, read):
    path = write(tmp_path / "a.jsonl", [{"text": "abcdefghijklmnopqrstuvwxyz", "label": 1}, {"text": "short", "label": 0}])
    dataset = build(path, truncation_side=side)
    batch = dataset.train.rows(0, 2)
    long = batch.tokens_BT[(batch.labels_BTK[..., 0] == 1).any(-1)][0].tolist()
    eos = dataset.tokenizer.eos_token_id
    assert "".join("\0" if t == eos else dataset.tokenizer.decode([t]) for t in long) == read
    assert dataset.manifest["splits"]["train"]["packing"]["truncated_documents"] == 1 == dataset.train.plan.truncated


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
@pytest.mark.parametrize("label_field", ["x", ["x", "y"]])
def test_numbers_come_from_every_kind_of_table_standardised(tmp_path, kind, label_field):
    table = [{"text": f"text {n}", "x": n * 1.5, "y": 7 - n} for n in range(40)]
    path = tmp_path / f"a.{kind}"
    if kind in ("parquet", "arrow"):
        data = pa.Table.from_pylist(table)
        if kind == "parquet":
            pq.write_table(data, path)
        else:
            with pa.ipc.new_file(str(path), data.schema) as writer:
                writer.write_table(data)
    elif kind == "csv":
        path.write_text("text,x,y\n" + "".join(f"{r['text']},{r['x']},{r['y']}\n" for r in table))
    else:
        path.write_text(json.dumps(table) if kind == "json" else "".join(json.dumps(r) + "\n" for r in table))
    dataset = build(path, "regression", label_field)
    fields = [label_field] if isinstance(label_field, str) else label_field
    true = np.array([[table[int(d["text"].split()[1])][f] for f in fields] for d in documents(dataset.train)])
    assert dataset.labels["names"] == fields
    assert dataset.labels["mean"] == pytest.approx(true.mean(0)) and dataset.labels["std"] == pytest.approx(true.std(0))
    assert dataset.train.labels == pytest.approx((true - true.mean(0)) / true.std(0), abs=1e-6)  # float32


def test_a_list_of_numbers_in_one_field_is_several_numbers(tmp_path):
    dataset = build(write(tmp_path / "a.jsonl", [{"text": f"t {n}", "y": [n, -2 * n]} for n in range(20)]), "regression", "y")
    assert dataset.labels["names"] == ["y[0]", "y[1]"] and dataset.train.labels.shape == (20, 2)


def test_integers_are_classes_in_their_order(tmp_path):
    dataset = build(write(tmp_path / "a.jsonl", [{"text": f"t {n}", "label": n % 12} for n in range(40)]))
    assert dataset.labels["names"] == [str(n) for n in range(12)]


def test_labels_decide_the_fingerprint(tmp_path):
    prints = set()
    for name, other in (("a", "odd"), ("b", "even"), ("c", "odd")):
        (tmp_path / name).mkdir()
        changed = [{**row, "label": other} if n == 3 else row for n, row in enumerate(rows())]
        prints.add(build(write(tmp_path / name / "a.jsonl", changed)).fingerprint)
    assert len(prints) == 2


def bad(change):
    table = rows(20)
    table[3] = {**table[3], **change}
    return [{k: v for k, v in row.items() if v != "LEFT OUT"} for row in table]


BAD = {
    "missing": (bad({"label": "LEFT OUT"}), "classification", "a.jsonl:4: no field 'label'; the fields are 'text'"),
    "null": (bad({"label": None}), "classification", "a.jsonl:4: field 'label' is empty"),
    "object": (bad({"label": {"a": 1}}), "classification", "a.jsonl:4: field 'label' is an object"),
    "NaN class": (bad({"label": float("nan")}), "classification", "a.jsonl:4: field 'label' is NaN"),
    "half a pair": (bad({"label": "\ud800"}), "classification", "field 'label' holds half of a surrogate pair (U+D800)"),
    "one class": ([{"text": f"t {n}", "label": "a"} for n in range(20)], "classification", "at least two classes"),
    "word": ([{"text": "a", "label": 1.5}, {"text": "b", "label": "big"}], "regression", "a.jsonl:2: field 'label' is 'big', not"),
    "NaN": ([{"text": "a", "label": 1.5}, {"text": "b", "label": float("nan")}], "regression", "a.jsonl:2: field 'label' is nan"),
    "infinite": ([{"text": "a", "label": 1.5}, {"text": "b", "label": 1e999}], "regression", "a.jsonl:2: field 'label' is inf"),
    "true": ([{"text": "a", "label": 1.5}, {"text": "b", "label": True}], "regression", "a.jsonl:2: field 'label' is True, not"),
    "widths": ([{"text": "ab" * 9, "label": [1, 2]}, {"text": "b", "label": 1}], "regression", "some documents have 1 numbers and"),
    "huge": ([{"text": f"t {n}", "label": n * 1e300} for n in range(20)], "regression", "'label' has numbers so large"),
    "constant": ([{"text": f"t {n}", "label": 7} for n in range(20)], "regression", "'label' is 7 in every training document"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_labels_are_a_sentence_with_the_place(tmp_path, name):
    table, task, expected = BAD[name]
    with pytest.raises(UserError) as raised:
        build(write(tmp_path / "a.jsonl", table), task)
    assert expected in str(raised.value)
    assert not (tmp_path / "data").exists() or not any((tmp_path / "data").iterdir())


def test_bad_labels_can_be_skipped_and_are_counted(tmp_path):
    dataset = build(write(tmp_path / "a.jsonl", bad({"label": None})), on_error="skip")
    assert dataset.manifest["stages"][0]["dropped"] == {"no label": 1} and len(dataset.train.labels) == 19


def test_a_class_that_only_held_out_documents_have_is_named(tmp_path):
    train, held_out = write(tmp_path / "a.jsonl", rows()), write(tmp_path / "b.jsonl", [{"text": "x", "label": "prime"}])
    with pytest.raises(UserError, match=r"only held-out documents have.*'prime' \(1\)"):
        build(train, validation=[str(held_out)])


def test_plain_text_has_no_labels(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="this kind of file has no field 'label'"):
        build(tmp_path / "a.txt")


@pytest.mark.parametrize(("tables", "expected"), [
    ({"training": {"task": "classification"}}, "needs data.label_field"),
    ({"data": {"label_field": "y"}}, "data.label_field is for training.task"),
    ({"data": {"label_field": ["y", "z"]}, "training": {"task": "classification"}}, "a class is in one field"),
    ({"data": {"label_field": "y", "packing": "concatenate"}, "training": {"task": "classification"}}, "'concatenate' cuts"),
    ({"data": {"label_field": "y", "cross_document_attention": True}, "training": {"task": "regression"}}, "its neighbours"),
    ({"data": {"label_field": "y"}, "training": {"task": "regression", "label_smoothing": 0.1}}, "is for training.task = 'class"),
    ({"data": {"label_field": "y"}, "training": {"task": "classification", "huber_delta": 1.0}}, "is for training.task = 'regr"),
    ({"data": {"label_field": "y", "label_type": "category"}, "training": {"task": "regression"}}, "does not go with"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(tables, expected):
    with pytest.raises(UserError, match=expected):
        make_config(tables)
