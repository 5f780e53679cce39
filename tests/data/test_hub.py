"""Files and datasets of the Hugging Face hub, by a stand-in on this machine, through the command line."""

import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import COMMIT, REPOSITORY, serve_hub

from pellucid.config import SourceConfig, UserError
from pellucid.data import readers_tables
from pellucid.data.dataset import Dataset
from pellucid.data.sources import list_files, read_documents


def table(name, rows):
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [f"{name} {n} words of a text" for n in range(rows)]}), out, row_group_size=20)
    return out.getvalue()


FILES = {"README.md": b"# texts\n", "data/train-00000-of-00002.parquet": table("first", 60),
         "data/train-00001-of-00002.parquet": table("second", 30), "data/test-00000-of-00001.parquet": table("test", 10)}  # fmt: skip


def build(tmp_path, sources, **environment):
    (tmp_path / "c.toml").write_text(f"[data]\nsources = {json.dumps(sources)}\nsequence_length = 16\nvalidation_fraction = 0\n"
                                     '[data.tokenizer]\nkind = "bytes"\n')
    command = [sys.executable, "-c", "from pellucid.cli import main; main()", "data", "build", "c.toml", "--out", "out"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **environment})


def test_files_and_datasets_of_the_hub_by_name(tmp_path):
    sources = [f"hf://datasets/{REPOSITORY}/data/train-*.parquet", f"hf-dataset:{REPOSITORY}", f"hf-dataset:{REPOSITORY}::test"]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    with serve_hub(FILES) as (address, asked):
        done = build(tmp_path, sources, HF_ENDPOINT=address, **home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked
    split = Dataset(tmp_path / "out").train
    texts = [split.document(n)["text"] for n in range(len(split.reader.ends))]
    train = [f"{name} {n} words of a text" for name, rows in (("first", 60), ("second", 30)) for n in range(rows)]
    assert texts == train * 2 + [f"test {n} words of a text" for n in range(10)]
    sources = Dataset(tmp_path / "out").manifest["sources"]
    assert [source["documents"] for source in sources] == [60, 30, 90, 10]
    assert sources[2]["version"] == COMMIT  # the very state of the dataset is in the manifest
    (tmp_path / "other").mkdir()
    with serve_hub(FILES) as (address, _):
        done = build(tmp_path / "other", ["hf-dataset:nobody/nothing"], HF_ENDPOINT=address, **home)
    assert done.returncode == 2 and "hf-dataset:nobody/nothing: cannot be opened" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "other" / "out").exists()


def test_a_stream_that_breaks_off_is_a_sentence_and_no_bad_document(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("reset by peer\nand more")

    monkeypatch.setattr(readers_tables, "open_hugging_face", lambda *name: rows())
    monkeypatch.setattr("pellucid.data.sources._hub_version", lambda name: "")
    [file] = list_files([SourceConfig(path="hf-dataset:a/b")])
    with pytest.raises(UserError, match=r"hf-dataset:a/b: the stream broke off after row 1 \(reset by peer\)"):
        list(read_documents(file))
