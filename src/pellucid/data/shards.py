"""Picture 2 on disk: token shards, written once, checked by size and sha256, never changed.

    shards/NNNNN.tok      little-endian uint32: each document's tokens and its closing eos
    shards/NNNNN.idx      little-endian uint64: where each document ends, in tokens, within the shard
    shards/NNNNN.parquet  one row per document: source, byte range, stages that changed it, tokens, text bytes, content hash
A shard belongs to one split; manifest.json (see build.py) says which, and names every file with size and hash.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pellucid.config import UserError
from pellucid.data.document import Document

TOKENS_PER_SHARD = 1 << 26  # 256 MiB of tokens; the block that reaches it is the shard's last
PROVENANCE = pa.schema([
    ("source", pa.dictionary(pa.int32(), pa.string())),  # uri of the file
    ("source_index", pa.int32()),  # entry of data.sources, or of data.validation
    ("ordinal", pa.int64()),  # number within the file
    ("byte_start", pa.int64()),  # in the decompressed file (parquet: row number)
    ("byte_end", pa.int64()),
    ("exact", pa.bool_()),  # those bytes are the text, unchanged by any stage
    ("changed_by", pa.dictionary(pa.int32(), pa.string())),  # stages that changed it, in order; the others let it pass as it was
    ("tokens", pa.int64()),  # with the closing eos
    ("text_bytes", pa.int64()),  # after all stages
    ("content_hash", pa.binary(16)),  # blake2b of the text after all stages
    ("parent", pa.binary(16)),  # content hash of the document this is an augmented version of; null: an original
    ("augmentation", pa.string()),  # JSON: epoch, seed, and each augmenter's settings; null: an original
    ("label", pa.string()),  # of a labelled document: a class, or a JSON list of numbers
])


class TokenBlock:
    """Tokenized documents of one split of one block, in memory until `save` makes NAME.tok and NAME.arrow of them."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.columns: list[list[Any]] = [[] for _ in PROVENANCE]
        self.text_bytes = 0

    def add(self, tokens: np.ndarray, document: Document, text_bytes: int, content_hash: bytes,
            parent: bytes | None = None, augmentation: str | None = None) -> None:
        """Append one document: its tokens, closing eos included, as uint32; for a version, what it was made from."""
        self.tokens.append(tokens.astype("<u4", copy=False))
        self.text_bytes += text_bytes
        values = (document.source, document.source_index, document.ordinal, document.byte_start, document.byte_end,
                  document.exact, document.changed_by, len(tokens), text_bytes, content_hash, parent, augmentation,
                  document.label)
        for column, value in zip(self.columns, values, strict=True):
            column.append(value)

    def save(self, folder: Path, name: str) -> dict[str, int]:
        """Write the two files; returns the counts."""
        write_file(folder / f"{name}.tok", (tokens.tobytes() for tokens in self.tokens))
        arrays = [pa.array(column, field.type) for column, field in zip(self.columns, PROVENANCE, strict=True)]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, PROVENANCE) as writer:
            writer.write_table(pa.Table.from_arrays(arrays, schema=PROVENANCE))
        write_file(folder / f"{name}.arrow", [memoryview(sink.getvalue())])
        return {"documents": len(self.tokens), "tokens": sum(map(len, self.tokens)), "text_bytes": self.text_bytes}


def write_shard(folder: Path, number: int, blocks: list[Path]) -> dict[str, Any]:
    """One shard of some token blocks (their paths without suffix), in order; returns its counts and files."""
    name = f"{number:05d}"
    digests = {"tok": write_file(folder / f"{name}.tok", (part for block in blocks for part in _parts(block)))}
    schema, ends, end = PROVENANCE, [], 0
    with pq.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd") as writer:
        for block in blocks:
            with pa.memory_map(str(block.with_suffix(".arrow"))) as source:
                table = pa.ipc.open_file(source).read_all()
                writer.write_table(table)
                ends.append(end + np.cumsum(table.column("tokens").to_numpy()))
            end = int(ends[-1][-1])
    digests["idx"] = write_file(folder / f"{name}.idx", [np.concatenate(ends).astype("<u8").tobytes()])
    digests["parquet"] = file_sha256(folder / f"{name}.parquet")
    files = {f"shards/{name}.{suffix}": {"size": (folder / f"{name}.{suffix}").stat().st_size, "sha256": digest}
             for suffix, digest in sorted(digests.items())}
    return {"number": number, "documents": sum(map(len, ends)), "tokens": end, "files": files}


def write_file(path: Path, content: Iterable[bytes]) -> str:
    """Write a file and see it on the disk; returns its sha256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in content:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _parts(block: Path) -> Iterator[bytes]:
    with open(block.with_suffix(".tok"), "rb") as file:
        yield from iter(lambda: file.read(1 << 20), b"")


class ShardReader:
    """The documents of one split, in order, through memory maps. Document d holds tokens ends[d-1] : ends[d]."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]]):
        self.folder, self.shards = folder, shards
        self.token_base = np.cumsum([0, *(shard["tokens"] for shard in shards)])  # first token of each shard
        self.document_base = np.cumsum([0, *(shard["documents"] for shard in shards)])
        self._bases = self.token_base.tolist()
        maps = [np.memmap(self._path(shard, "tok"), dtype="<u4", mode="r") for shard in shards]
        self._tokens = [np.asarray(tokens) for tokens in maps]  # plain views: the memmap class is slow to index
        ends = [np.fromfile(self._path(shard, "idx"), dtype="<u8").astype(np.int64) for shard in shards]
        for shard, end in zip(shards, ends, strict=True):
            if len(end) != shard["documents"] or end[-1] != shard["tokens"] or np.any(np.diff(end, prepend=0) <= 0):
                raise UserError(f"{self._path(shard, 'idx')}: damaged (its document ends do not fit the manifest); "
                                "build the data again")
        self.ends = np.concatenate([end + base for end, base in zip(ends, self.token_base, strict=False)])
        self.lengths = np.diff(self.ends, prepend=0)
        self.starts = self.ends - self.lengths
        self.source_index = self.columns(["source_index"]).column(0).to_numpy()

    def _path(self, shard: dict[str, Any], suffix: str) -> Path:
        return self.folder / f"{shard['number']:05d}.{suffix}"

    def tokens(self, index: np.ndarray) -> np.ndarray:
        """The tokens at global positions `index` (int64, any shape), as int64."""
        if len(self._tokens) == 1:
            return self._tokens[0][index].astype(np.int64)
        result = np.empty(index.shape, dtype=np.int64)
        which = np.searchsorted(self.token_base, index, side="right") - 1
        for number in np.unique(which):
            mine = which == number
            result[mine] = self._tokens[number][index[mine] - self.token_base[number]]
        return result

    def labels(self) -> list[str | None]:
        """The label of every document."""
        return self.columns(["label"]).column(0).to_pylist()

    def window(self, first: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(the tokens one before each, the tokens) at global positions first : first + length, all of one document.

        What stands before the first token of a document means nothing.
        """
        shard = bisect_right(self._bases, first) - 1
        tokens, at = self._tokens[shard], first - self._bases[shard]
        if at:
            return tokens[at - 1 : at + length - 1], tokens[at : at + length]
        return np.concatenate([tokens[-1:], tokens[: length - 1]]), tokens[:length]

    def columns(self, names: list[str]) -> pa.Table:
        """Some provenance columns of all documents."""
        return pa.concat_tables(pq.read_table(self._path(shard, "parquet"), columns=names) for shard in self.shards)

    def provenance(self, documents: list[int]) -> list[dict[str, Any]]:
        """The provenance rows of some documents, in the order asked."""
        rows: dict[int, dict[str, Any]] = {}
        for number, shard in enumerate(self.shards):
            first, last = self.document_base[number], self.document_base[number + 1]
            mine = sorted({d for d in documents if first <= d < last})
            if mine:
                table = pq.read_table(self._path(shard, "parquet"), memory_map=True).take([d - first for d in mine])
                rows.update(zip(mine, table.to_pylist(), strict=True))
        return [rows[document] for document in documents]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path, known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{relative path: {size, sha256}} of every file below a folder, each flushed to the disk; `known` are not read."""
    described = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        described[name] = known.get(name) or {"size": path.stat().st_size, "sha256": file_sha256(path)}
    return described


def damage(folder: Path, files: dict[str, dict[str, Any]], hashes: bool = True) -> str | None:
    """The first thing wrong with a folder's files, as the start of a sentence; None when all are as described."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != expected["size"]:
            return f"{path}: {path.stat().st_size} bytes where the manifest has {expected['size']}"
        if hashes and file_sha256(path) != expected["sha256"]:
            return f"{path}: its contents differ from those the manifest describes (sha256)"
    return None
