"""`data inspect` says what the manifest says."""

from pellucid.config import DataConfig
from pellucid.data.build import prepare
from pellucid.data.inspect import describe


def test_counts_samples_and_splits_are_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"windows\r\nline ends and enough text\r\n")
    (tmp_path / "b.txt").write_bytes(b"  \n")
    config = DataConfig(sources=[str(tmp_path)], directory=str(tmp_path / "data"), sequence_length=8,
                        tokenizer={"kind": "bytes"}, validation_fraction=0)
    said = describe(prepare(config).manifest)
    assert "2 files, 39 bytes as stored, 2 documents" in said
    assert "documents  2 -> 1" in said and "dropped    1 empty" in said
    assert r"'windows\r\nline ends" in said and r"'windows\nline ends" in said
    assert "train      1 documents, 35 tokens" in said and "5 rows, 87.50% of positions used" in said
