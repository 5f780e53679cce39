"""Token files of other trainers, as arrays: Megatron's .bin and .idx, nanoGPT's .bin, tables with a column of token ids.

    Megatron   .bin: tokens, no header. .idx: "MMIDIDX\\0\\0", u64 1, u8 type, u64 sequences, u64 documents + 1, then
               i32 length and i64 byte offset of each sequence, i64 first sequence of each document and the end
    nanoGPT    .bin: tokens as uint16, no header; each document ends with the end-of-text token
Sources: megatron/core/datasets/indexed_dataset.py of github.com/NVIDIA/Megatron-LM, data/openwebtext/prepare.py of
github.com/karpathy/nanoGPT. All little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pellucid.config import UserError

MAGIC, HEADER = b"MMIDIDX\x00\x00", struct.Struct("<QBQQ")
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's numbers; 6 and 7 are floats
NANOGPT_TYPES = {"uint16": "<u2", "uint32": "<u4"}
READ_TOKENS = 1 << 20


@dataclass
class Tokenized:
    """One document of a token file: its ids (any integer type) and where they lie (bytes; rows of a table)."""

    tokens: np.ndarray
    start: int
    end: int


# -------------------------------------------------------------------------------------------- Megatron


def megatron_type(vocab_size: int) -> str:
    """The type Megatron itself chooses for a vocabulary."""
    return "<u2" if vocab_size < 65500 else "<i4"


def write_megatron_index(path: Path, lengths: np.ndarray, dtype: str) -> None:
    """The .idx of documents of one sequence each, whose tokens lie one after another in the .bin."""
    code = next(number for number, name in TYPES.items() if name == dtype)
    count = len(lengths)
    if count and int(lengths.max()) > np.iinfo(np.int32).max:
        raise UserError(f"{path}: Megatron's index has no room for a document of {int(lengths.max())} tokens")
    pointers = np.cumsum(lengths, dtype=np.int64) - lengths
    with open(path, "wb") as file:
        file.write(MAGIC + HEADER.pack(1, code, count, count + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((pointers * np.dtype(dtype).itemsize).astype("<i8").tobytes())
        file.write(np.arange(count + 1, dtype="<i8").tobytes())


def read_megatron(path: Path) -> Iterator[Tokenized]:
    """The documents of PREFIX.bin and PREFIX.idx; `path` is either. A document of several sequences is one."""
    index, content = path.with_suffix(".idx"), path.with_suffix(".bin")
    for file in (index, content):
        if not file.is_file():
            raise UserError(f"{file}: missing; Megatron's data are a .bin and an .idx of the same name")
    raw = index.read_bytes()
    start = len(MAGIC) + HEADER.size
    if raw[: len(MAGIC)] != MAGIC or len(raw) < start:
        raise UserError(f"{index}: not a Megatron index (it does not begin with MMIDIDX)")
    version, code, sequences, bounds = HEADER.unpack_from(raw, len(MAGIC))
    if version != 1 or code not in TYPES:
        raise UserError(f"{index}: a Megatron index of version {version} and type {code}; known: version 1, integers")
    dtype = np.dtype(TYPES[code])
    if len(raw) < start + 12 * sequences + 8 * bounds:
        raise UserError(f"{index}: truncated ({len(raw)} bytes, its header speaks of {start + 12 * sequences + 8 * bounds})")
    lengths = np.frombuffer(raw, "<i4", sequences, start).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, start + 4 * sequences)
    documents = np.frombuffer(raw, "<i8", bounds, start + 12 * sequences)
    size, ends = content.stat().st_size, np.concatenate([[0], np.cumsum(lengths)])
    whole = bounds and documents[0] == 0 and documents[-1] == sequences and np.all(np.diff(documents) >= 0)
    if not whole or np.any(lengths < 0) or np.any(pointers != ends[:-1] * dtype.itemsize):
        raise UserError(f"{index}: damaged (its documents do not follow one another)")
    if size != ends[-1] * dtype.itemsize:
        raise UserError(f"{content}: {size} bytes where its index speaks of {int(ends[-1]) * dtype.itemsize}")
    tokens = _mapped(content, dtype)
    for first, last in zip(ends[documents[:-1]].tolist(), ends[documents[1:]].tolist(), strict=True):
        yield Tokenized(tokens[first:last], first * dtype.itemsize, last * dtype.itemsize)


# --------------------------------------------------------------------------------------------- nanoGPT


def read_nanogpt(path: Path, dtype: str, eos_token_id: int) -> Iterator[Tokenized]:
    """The documents of a flat file: each ends with an end-of-text token, the last one also with the file."""
    kind = np.dtype(NANOGPT_TYPES[dtype])
    if path.stat().st_size % kind.itemsize:
        raise UserError(f"{path}: {path.stat().st_size} bytes are no whole number of {dtype} tokens; give --dtype, or fetch "
                        "the file again")
    tokens, first = _mapped(path, kind), 0
    for chunk in range(0, len(tokens), READ_TOKENS):
        for end in (np.flatnonzero(tokens[chunk : chunk + READ_TOKENS] == eos_token_id) + chunk + 1).tolist():
            yield Tokenized(tokens[first:end], first * kind.itemsize, end * kind.itemsize)
            first = end
    if first < len(tokens):
        yield Tokenized(tokens[first:], first * kind.itemsize, len(tokens) * kind.itemsize)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)


# ---------------------------------------------------------------------------------------------- tables


def read_table(path: Path, field: str) -> Iterator[Tokenized]:
    """The rows of a parquet or Arrow file (what datasets.save_to_disk writes too) with a column of lists of ids."""
    try:
        if path.suffix == ".parquet":
            table = pq.ParquetFile(path)
            schema = table.schema_arrow
            _check_column(schema, field, str(path))
            columns: Iterable[pa.Array] = (batch.column(0) for batch in table.iter_batches(1024, columns=[field]))
        else:
            with open(path, "rb") as file:
                is_file = file.read(6) == b"ARROW1"
            source = pa.memory_map(str(path))
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            _check_column(reader.schema, field, str(path))
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else reader
            columns = (batch.column(reader.schema.get_field_index(field)) for batch in batches)
        row = 0
        for column in columns:
            yield from _lists(column, field, str(path), row)
            row += len(column)
    except (pa.ArrowException, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a complete table ({reason})") from None


def read_rows(rows: Iterable[dict], field: str, name: str) -> Iterator[Tokenized]:
    """The rows of a streamed Hugging Face dataset."""
    for number, row in enumerate(rows):
        if field not in row:
            raise UserError(f"{name}: no field '{field}'; the fields are {', '.join(row) or 'none'} (set --field)")
        try:
            yield Tokenized(np.asarray(row[field], dtype=np.int64).reshape(-1), number, number + 1)
        except (TypeError, ValueError):
            raise UserError(f"{name}: row {number}: field '{field}' is no list of token ids") from None


def _check_column(schema: pa.Schema, field: str, name: str) -> None:
    if field not in schema.names:
        raise UserError(f"{name}: no column '{field}'; the columns are {', '.join(schema.names) or 'none'} (set --field)")
    if schema.names.count(field) > 1:
        raise UserError(f"{name}: {schema.names.count(field)} columns are called '{field}'; rename all but one")
    kind = schema.field(field).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_integer(kind.value_type):
        raise UserError(f"{name}: column '{field}' holds {kind}, not lists of token ids")


def _lists(column: pa.Array, field: str, name: str, row: int) -> Iterator[Tokenized]:
    for number, item in enumerate(column, row):
        ids = item.values
        if ids is None or ids.null_count:
            raise UserError(f"{name}: row {number}: column '{field}' is null, or holds a null")
        yield Tokenized(ids.to_numpy(zero_copy_only=False), number, number + 1)
