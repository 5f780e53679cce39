"""Picture 2, source: tables (parquet, arrow, feather, Hugging Face datasets) become documents, a row each.

A column's bytes are not contiguous, so byte_start and byte_end are row numbers. A column of lists of token ids
instead of texts is for `pellucid data import` (formats.py).
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pellucid.config import UserError
from pellucid.data.document import WHOLE, Document, SourceFile, Span, Unreadable, kind_of, repeated_column, unreadable_field
from pellucid.data.labels import read_label
from pellucid.data.remote import silence


def read_parquet(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """One row, one document. A span starts and stops at row groups (see `row_groups`)."""
    try:
        table = pq.ParquetFile(seekable(stream, file))
        problem = _wrong_column(table.schema_arrow, file)
        if problem:
            yield problem
            return
        groups = [number for number, row in enumerate(row_groups(table))
                  if row >= span.start and (span.stop is None or row < span.stop)]
        columns = list(dict.fromkeys((file.text_field, *file.label_fields)))
        batches = table.iter_batches(batch_size=256, columns=columns, row_groups=groups) if groups else ()
        yield from _rows(batches, file, span.start)
    except (pa.ArrowException, OSError) as error:
        yield _damaged(error, file)


def row_groups(table: pq.ParquetFile) -> list[int]:
    """The first row of each row group."""
    counts = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
    return [sum(counts[:number]) for number in range(len(counts))] if len(counts) < 1000 else _running(counts)


def _running(counts: list[int]) -> list[int]:
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return starts


def read_arrow(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """An Arrow file (feather v2) or an Arrow stream; one row, one document."""
    try:
        source = seekable(stream, file)
        start = source.read(6)
        source.seek(0)
        if start == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(source)
        problem = _wrong_column(reader.schema, file)
        if problem:
            yield problem
            return
        yield from _rows(batches, file, 0)
    except (pa.ArrowException, OSError, EOFError) as error:
        yield _damaged(error, file)


def read_hugging_face(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """The rows of `hf-dataset:NAME[:CONFIG[:SPLIT]]`, streamed."""
    rows = _unbroken(iter(open_hugging_face(str(file.path), file.version)), file.uri)
    for number, row in enumerate(rows):
        text = row.get(file.text_field)
        if file.text_field not in row:
            yield unreadable_field(f"{file.uri}: row {number}", file.text_field, list(row))
        elif not isinstance(text, str):
            kind = "no text" if text is None else "wrong field"
            yield Unreadable(kind, f"{file.uri}: row {number}: field '{file.text_field}' is "
                             f"{'null' if text is None else f'{kind_of(text)}, not text'}")
        else:
            label = read_label(row, file, f"{file.uri}: row {number}")
            yield label if isinstance(label, Unreadable) else Document(
                text, file.uri, file.source_index, number, number, number + 1, False, file.split, label)


def _unbroken(rows: Iterator[dict[str, Any]], uri: str) -> Iterator[dict[str, Any]]:
    """The rows; what breaks the stream off is a UserError, whatever data.on_error says: it is no bad document."""
    number = 0
    try:
        for row in rows:
            yield row
            number += 1
    except Exception as error:  # after the library's own attempts
        raise UserError(f"{uri}: the stream broke off after row {number} ({_reason(error)}); give the same command again") from None


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def open_hugging_face(name: str, version: str = "") -> Any:
    """A streaming `datasets` dataset of NAME[:CONFIG[:SPLIT]]; version is a commit of the hub, or empty.

    Raises UserError: `datasets` is missing, or has no such dataset.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"hf-dataset:{name}: Hugging Face datasets is not installed; pip install 'pellucid[hub]'") from None
    silence()
    path, config, split = [*name.split(":"), "", ""][:3]
    revision = {"revision": version} if version and "/" not in version and len(version) == 40 else {}
    try:
        return datasets.load_dataset(path, config or None, split=split or "train", streaming=True, **revision)
    except Exception as error:  # the library raises a dozen kinds over names, configurations and networks
        raise UserError(f"hf-dataset:{name}: cannot be opened ({_reason(error)})") from None


def _wrong_column(schema: pa.Schema, file: SourceFile) -> Unreadable | None:
    for field in file.label_fields:
        if field not in schema.names:
            return unreadable_field(file.uri, field, schema.names, "data.label_field")
    if file.text_field not in schema.names:
        return unreadable_field(file.uri, file.text_field, schema.names)
    if repeated := repeated_column(file, schema.names):
        return repeated
    kind = schema.field(file.text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return Unreadable("wrong field", f"{file.uri}: column '{file.text_field}' holds {kind}, not text")
    return None


def _rows(batches: Iterable[pa.RecordBatch], file: SourceFile, row: int) -> Iterator[Document | Unreadable]:
    for batch in batches:
        names = (file.text_field, *file.label_fields)
        for text, *labels in zip(*(_values(batch.column(name)) for name in names), strict=True):
            where = f"{file.uri}: row {row}"
            wrong = next((pair for pair in zip(names, (text, *labels), strict=True) if isinstance(pair[1], UnicodeDecodeError)), None)
            label = None if wrong else read_label(dict(zip(file.label_fields, labels, strict=True)), file, where)
            if wrong:
                name, error = wrong
                value = f"0x{error.object[error.start]:02x} at byte {error.start}"
                yield Unreadable("wrong encoding", f"{where}: column '{name}' is not UTF-8 ({value})")
            elif text is None:
                yield Unreadable("no text", f"{where}: column '{file.text_field}' is null")
            elif isinstance(label, Unreadable):
                yield label
            else:
                yield Document(text, file.uri, file.source_index, row, row, row + 1, False, file.split, label)
            row += 1


def _values(column: pa.Array) -> list[Any]:
    """A column's values; in the place of one that is not UTF-8, the error."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _damaged(error: Exception, file: SourceFile) -> Unreadable:
    kind = "parquet" if file.format == "parquet" else "Arrow"
    return Unreadable("damaged", f"{file.uri}: not a complete {kind} file ({_reason(error)})")


def seekable(stream: BinaryIO, file: SourceFile) -> BinaryIO:
    """The stream itself, or a temporary copy of what it decompresses to."""
    if stream.seekable() and not file.compression:
        return stream
    copy = tempfile.TemporaryFile()
    while block := stream.read(io.DEFAULT_BUFFER_SIZE * 128):
        copy.write(block)
    copy.seek(0)
    return copy
