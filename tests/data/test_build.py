"""prepare(): what is held out, what is reused, what the manifest says, and that a failed build leaves nothing."""

import errno
import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pellucid.config import DataConfig, UserError
from pellucid.data import blocks, build, pipeline, readers
from pellucid.data.build import prepare
from pellucid.data.stages.corpus import Deduplicate
from pellucid.data.stages.decontaminate import HeldOut
from pellucid.data.stages.repeats import CutRepeats


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def configure(folder: Path, sources: list, **settings) -> DataConfig:
    return DataConfig(**{"sources": sources, "directory": str(folder / "data"), "sequence_length": 16,
                         "tokenizer": {"kind": "bytes"}, **settings})


def texts_of(split) -> list[str]:
    return [split.document(n)["text"] for n in range(split.reader.ends.size)]


def test_the_default_corpus_becomes_a_dataset(tmp_path):
    dataset = prepare(DataConfig(sources=["builtin:python-topics"], directory=str(tmp_path)))
    packing = dataset.manifest["splits"]["train"]["packing"]
    assert packing["utilization"] > 0.98  # 80 texts only; thousands reach 0.999
    assert dataset.tokenizer.vocab_size == 4096
    batch = dataset.train.batch(0, 8)
    assert batch.tokens_BT.shape == (8, 256) and batch.tokens_BT.max() < 4096
    assert len(dataset.validation.rows(0, 10**6).tokens_BT) == len(dataset.validation) >= 1


def test_copies_fall_on_the_same_side_and_the_fraction_is_kept(tmp_path):
    texts = [f"text number {n % 500}" for n in range(1500)]
    dataset = prepare(configure(tmp_path, [write_jsonl(tmp_path / "a.jsonl", texts)], validation_fraction=0.1))
    train, held_out = texts_of(dataset.train), texts_of(dataset.validation)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(texts)
    assert 0.05 < len(held_out) / len(texts) < 0.15
    shuffled = prepare(configure(tmp_path / "b", [write_jsonl(tmp_path / "b.jsonl", texts[::-1])], validation_fraction=0.1))
    assert set(texts_of(shuffled.validation)) == set(held_out)


def test_at_least_one_document_is_held_out_and_one_is_trained_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a long enough first text", "a long enough second text"])
    for fraction in (1e-9, 0.999):
        dataset = prepare(configure(tmp_path, [path], validation_fraction=fraction))
        assert len(texts_of(dataset.train)) == len(texts_of(dataset.validation)) == 1
    single = write_jsonl(tmp_path / "b.jsonl", ["only this one"])
    with pytest.raises(UserError, match="only one document"):
        prepare(configure(tmp_path, [single]))


@pytest.mark.parametrize("text", ["".join(f"line {n}\n" for n in range(300)), "no line end at all é " * 90, "é" * 3000])
def test_the_tail_of_a_single_text_file_is_held_out(tmp_path, monkeypatch, text):
    monkeypatch.setattr(readers, "LARGEST_PLAIN", 700)
    (tmp_path / "a.txt").write_text(text)
    dataset = prepare(configure(tmp_path, [str(tmp_path / "a.txt")], validation_fraction=0.1))
    train, held_out = "".join(texts_of(dataset.train)), "".join(texts_of(dataset.validation))
    assert train + held_out == text
    assert 0.08 < len(held_out) / len(text) < 0.1 + 8 / len(text)
    assert dataset.manifest["split"]["method"] == "tail"
    ordinals = [split.document(n)["ordinal"] for split in (dataset.train, dataset.validation) for n in range(len(texts_of(split)))]
    assert ordinals == list(range(len(ordinals))) and len(ordinals) > 3
    if "\n" in text:
        assert train.endswith("\n")


@pytest.mark.parametrize(("line_end", "held_out"), [(35, 200), (9500, 200), (9700, 300), (9850, 150)])
def test_a_line_end_far_from_the_end_starts_no_tail(tmp_path, line_end, held_out):
    """10,000 bytes, 0.02 of them 200: a tail after a line end has at most twice as many, else it starts within a line."""
    text = "x" * (line_end - 1) + "\n" + "y" * (10_000 - line_end)
    (tmp_path / "a.txt").write_text(text)
    dataset = prepare(configure(tmp_path, [str(tmp_path / "a.txt")], validation_fraction=0.02))
    assert texts_of(dataset.train) + texts_of(dataset.validation) == [text[:-held_out], text[-held_out:]]


@pytest.mark.parametrize("cap", [{"max_bytes": 5000}, {"max_documents": 8}])
def test_of_a_single_text_file_with_a_cap_something_is_held_out_too(tmp_path, monkeypatch, cap):
    monkeypatch.setattr(readers, "LARGEST_PLAIN", 700)
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(3000)))
    dataset = prepare(configure(tmp_path, [{"path": str(tmp_path / "a.txt"), **cap}], validation_fraction=0.2))
    train, held_out = texts_of(dataset.train), texts_of(dataset.validation)
    assert len(held_out) >= 1 and len(train) + len(held_out) == 8  # seven of less than 700 bytes are not yet 5,000


def test_validation_sources_replace_the_fraction(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", ["train text number one", "train text number two"])
    held_out = write_jsonl(tmp_path / "b.jsonl", ["held-out text"])
    dataset = prepare(configure(tmp_path, [train], validation=[held_out], validation_fraction=0.5))
    assert len(texts_of(dataset.train)) == 2 and texts_of(dataset.validation) == ["held-out text"]
    empty = write_jsonl(tmp_path / "c.jsonl", [" \n "])
    with pytest.raises(UserError, match=r"data.validation: no documents left"):
        prepare(configure(tmp_path, [train], validation=[empty]))


def test_what_validation_names_is_not_trained_on_though_a_source_matches_it_too(tmp_path):
    (tmp_path / "src").mkdir()
    for name in "abc":
        (tmp_path / "src" / f"{name}.txt").write_text(f"the text of {name}, long enough")
    (tmp_path / "src" / "link.txt").symlink_to("c.txt")
    (tmp_path / "other").symlink_to("src")
    said, validation = [], [str(tmp_path / "other" / "c.txt")]
    config = configure(tmp_path, [str(tmp_path / "src" / "*.txt")], validation=validation)
    dataset = prepare(config, progress=lambda stage, *call: said.append(stage))
    assert texts_of(dataset.train) == ["the text of a, long enough", "the text of b, long enough"]
    assert texts_of(dataset.validation) == ["the text of c, long enough"]
    [line] = {stage for stage in said if "data.validation" in stage}
    assert line.startswith(f"leaving out of data.sources what data.validation names: {tmp_path / 'src' / 'c.txt'}")
    assert prepare(config).reused
    with pytest.raises(UserError, match=r"data.sources: data.validation names all their files"):
        prepare(configure(tmp_path, validation, validation=validation))


def test_nothing_is_held_out_when_nothing_is_wanted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["some text here"] * 3)
    dataset = prepare(configure(tmp_path, [path], validation_fraction=0))
    assert dataset.validation is None
    with pytest.raises(UserError, match="no validation split"):
        dataset.split("validation")


def test_the_tokenizer_sees_the_training_split_only(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", ["abc abc abc abc"] * 3)
    held_out = write_jsonl(tmp_path / "b.jsonl", ["xyz xyz xyz xyz ∞"])
    dataset = prepare(configure(tmp_path, [train], validation=[held_out], tokenizer={"kind": "characters"}))
    assert dataset.tokenizer.vocab_size == 260 + len("abc ")


def test_the_manifest_tells_all(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"windows\r\nline ends and enough text\r\n")
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "c.txt").write_text("plain text, untouched by any stage\n")
    dataset = prepare(configure(tmp_path, [str(tmp_path / "*.txt")], validation_fraction=0))
    manifest = dataset.manifest
    read, normalize = manifest["stages"]
    assert (read["name"], read["documents_in"], read["documents_out"]) == ("read", 3, 3)
    assert (normalize["name"], normalize["documents_in"], normalize["documents_out"]) == ("normalize", 3, 2)
    assert normalize["dropped"] == {"empty": 1} and normalize["bytes_in"] - normalize["bytes_out"] == 2 + 3
    assert {sample["reason"] for sample in normalize["samples"]} == {None, "empty"}
    assert [source["documents"] for source in manifest["sources"]] == [1, 1, 1]
    assert manifest["splits"]["train"]["tokens"] == manifest["splits"]["train"]["text_bytes"] + 2
    assert manifest["tokenizer"]["fingerprint"] == dataset.tokenizer.fingerprint
    on_disk = {p.relative_to(dataset.directory).as_posix() for p in dataset.directory.rglob("*") if p.is_file()}
    assert on_disk == set(manifest["files"]) | {"manifest.json"}
    rows = pq.read_table(dataset.directory / "shards" / "00000.parquet").to_pylist()
    assert [row["exact"] for row in rows] == [False, True]
    assert sum(row["tokens"] for row in rows) == manifest["splits"]["train"]["tokens"]


@pytest.mark.parametrize("kind", [Deduplicate, CutRepeats, HeldOut])
def test_data_of_another_version_of_a_corpus_pass_is_not_used_again(tmp_path, monkeypatch, kind):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {n} " * 20 for n in range(50)])
    config = configure(tmp_path, [path], deduplicate={"exact": True, "substring_words": 50}, decontaminate={"held_out": True})
    first = prepare(config)
    assert prepare(config).reused
    monkeypatch.setattr(kind, "version", kind.version + 1)
    second = prepare(config)
    assert not second.reused and second.directory != first.directory


def test_two_builds_are_the_same_bytes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {n} " * 20 for n in range(50)])
    settings = {"tokenizer": {"kind": "bpe", "vocab_size": 300}}
    one, two = (prepare(configure(tmp_path / name, [path], **settings)) for name in "xy")
    assert one.directory != two.directory and not two.reused
    assert one.fingerprint == two.fingerprint
    assert (one.directory / "manifest.json").read_bytes() == (two.directory / "manifest.json").read_bytes()


def test_prepared_data_is_used_again_until_something_changes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["some text of a certain length", "and another one beside it"])
    first = prepare(configure(tmp_path, [path]))
    assert not first.reused and prepare(configure(tmp_path, [path])).reused
    os.utime(path, ns=(1, 1))  # touched, same content
    assert prepare(configure(tmp_path, [path])).reused
    longer = prepare(configure(tmp_path, [path], sequence_length=17))
    assert not longer.reused and longer.directory != first.directory
    write_jsonl(Path(path), ["some text of a certain lengtH", "and another one beside it"])  # same size
    changed = prepare(configure(tmp_path, [path]))
    assert not changed.reused and changed.directory != first.directory and first.directory.exists()
    assert prepare(configure(tmp_path, [path])).directory == changed.directory


def test_damage_is_found_before_reuse(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["some text of a certain length", "and another one beside it"])
    shard = prepare(configure(tmp_path, [path])).directory / "shards" / "00000.tok"
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"00000.tok.*remove the folder"):
        prepare(configure(tmp_path, [path]))
    shard.write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"00000.tok.*remove the folder"):
        prepare(configure(tmp_path, [path]))


def test_a_chosen_folder_is_filled_or_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["some text of a certain length", "and another one beside it"])
    config = configure(tmp_path, [path])
    (tmp_path / "out").mkdir()
    assert prepare(config, directory=tmp_path / "out").directory == tmp_path / "out"
    assert prepare(config, directory=tmp_path / "out").reused
    with pytest.raises(UserError, match="holds something else"):
        prepare(configure(tmp_path, [path], sequence_length=20), directory=tmp_path / "out")


def test_on_error_stop_stops_and_skip_counts(tmp_path):
    good = json.dumps({"text": "a good line of text"})
    (tmp_path / "a.jsonl").write_text(f'{good}\nnonsense\n{good}\n{{"body": 1}}\n')
    (tmp_path / "b.txt").write_bytes(b"bin\0ary")
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    with pytest.raises(UserError, match=r"a.jsonl:2: not a JSON object"):
        prepare(configure(tmp_path, files))
    assert not list((tmp_path / "data").glob("*"))
    dataset = prepare(configure(tmp_path, files, on_error="skip", validation_fraction=0))
    read = dataset.manifest["stages"][0]
    assert read["dropped"] == {"bad JSON": 1, "binary": 1, "wrong field": 1}
    assert (read["documents_in"], read["documents_out"]) == (5, 2)
    assert len(read["samples"]) == 3 and "a.jsonl:2" in read["samples"][0]["message"]


def test_no_documents_left_is_a_sentence_that_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"no documents left to train on \(3 wrong field\); the first: .*a.jsonl:1"):
        prepare(configure(tmp_path, [str(tmp_path / "a.jsonl")], on_error="skip"))


def test_a_corpus_shorter_than_one_row_is_a_sentence(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["tiny", "small"])
    with pytest.raises(UserError, match=r"data.sequence_length = 64: the training split holds \d+ tokens"):
        prepare(configure(tmp_path, [path], sequence_length=64))
    assert not list((tmp_path / "data").glob("*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, code):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pipeline, "write_shard", fail)
    path = write_jsonl(tmp_path / "a.jsonl", ["some text of a certain length", "and another one beside it"])
    for out, advice in ((None, "set data.directory to"), (tmp_path / "data" / "out", "give --out a folder on")):
        says = f"disk is full; free some space, or {advice}" if code == errno.ENOSPC else "Permission denied"
        with pytest.raises(UserError, match=says):
            prepare(configure(tmp_path, [path]), directory=out)
        assert not list((tmp_path / "data").glob("*"))


@pytest.mark.parametrize("block_bytes", [1 << 23, 20])  # the second: it is looked at before it is read, to be cut
def test_a_file_that_may_not_be_read_is_a_bad_document(tmp_path, monkeypatch, block_bytes):
    for name in ("a", "b", "shut"):
        (tmp_path / f"{name}.txt").write_text(f"a text of a certain length in {name}.txt\n")
    real = open

    def guarded(path, *arguments, **named):
        if str(path).endswith("shut.txt"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr("builtins.open", guarded)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    config = configure(tmp_path, [str(tmp_path / "*.txt")])
    with pytest.raises(UserError, match=r"shut.txt: cannot be read \(Permission denied\); data.on_error = \"skip\""):
        prepare(config)
    config.on_error = "skip"
    assert prepare(config).manifest["stages"][0]["dropped"] == {"unreadable": 1}
    os.utime(tmp_path / "shut.txt", (1, 1))
    assert prepare(config).reused, "nothing was read of it, nor can be"
    monkeypatch.setattr("builtins.open", real)  # as chmod does, which changes neither size nor time
    again = prepare(config)
    assert not again.reused and again.manifest["stages"][0]["documents_out"] == 3


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    path = Path(write_jsonl(tmp_path / "a.jsonl", ["some text of a certain length", "and another one beside it"]))

    read_documents = pipeline.read_documents

    def grow(file, progress, span):
        yield from read_documents(file, progress, span)
        path.write_text(path.read_text() * 2)

    monkeypatch.setattr(pipeline, "read_documents", grow)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(configure(tmp_path, [str(path)]))


@pytest.mark.parametrize("size", [1, 3 << 20])
def test_a_file_that_goes_away_while_data_are_built_is_named(tmp_path, monkeypatch, size):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 20)
    path = Path(write_jsonl(tmp_path / "a.jsonl", ["x" * size, "some text of a certain length"]))
    list_files = build.list_files

    def listed(*arguments, **named):
        files = list_files(*arguments, **named)
        path.unlink(missing_ok=True)
        return files

    monkeypatch.setattr(build, "list_files", listed)
    with pytest.raises(UserError, match=r"a.jsonl: the file went away while the data were built \(No such file or directory\)"):
        prepare(configure(tmp_path, [str(path)]))


def test_progress_names_its_stages_and_never_passes_the_end(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {n} " * 20 for n in range(50)])
    calls = []
    config = configure(tmp_path, [path], tokenizer={"kind": "bpe", "vocab_size": 300})
    prepare(config, progress=lambda *call: calls.append(call))
    named = list(dict.fromkeys(stage for stage, *_ in calls))
    assert named == ["reading", "training tokenizer", "tokenizing", "writing"]
    assert all(0 <= done <= total for _, done, total, *_ in calls)
    assert max(done for stage, done, *_ in calls if stage == "reading") == Path(path).stat().st_size


def test_a_folder_built_anew_takes_the_new_tokenizer(tmp_path):
    texts = ["the quick brown fox jumps over it. ", "zwei alte Zwerge gingen zum Brunnen. "]
    for text in texts:
        (tmp_path / "text.txt").write_text(text * 60)
        config = DataConfig(**{"sources": [str(tmp_path / "text.txt")], "sequence_length": 8, "validation_fraction": 0.0,
                                       "tokenizer": {"kind": "bpe", "vocab_size": 300}})
        dataset = prepare(config, directory=tmp_path / "data")
        assert dataset.train.document(0)["text"].startswith(text)
        shutil.rmtree(tmp_path / "data")
