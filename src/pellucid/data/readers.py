"""Picture 2, source: one file's bytes become documents. A table, `READERS`, from format to reader.

A reader gets a decompressed stream, the file, and the span to read: part of a large file where its format can be
entered in the middle, else all of it. It streams, and raises nothing over content: what cannot be read comes out
as `Unreadable`, and the caller stops or counts it. Web formats are in readers_web.py, tables in readers_tables.py.
"""

from __future__ import annotations

import csv
import io
import json
import os
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile

from pellucid.data.compression import DAMAGE, OPENERS
from pellucid.data.document import (
    WHOLE,
    Document,
    SourceFile,
    Span,
    Unreadable,
    half_surrogate,
    kind_of,
    repeated_column,
    unreadable_field,
)
from pellucid.data.labels import read_label
from pellucid.data.readers_tables import read_arrow, read_hugging_face, read_parquet, seekable
from pellucid.data.readers_web import read_html, read_warc

LOOKED_AT = 1 << 12  # bytes at a file's start; they say whether it is text
LARGEST_PLAIN = 1 << 20  # bytes; a longer plain file becomes several documents, cut at line ends
LARGEST_LINE = 1 << 28  # bytes of one line of jsonl or csv, and of one record of csv
LARGEST_JSON = 1 << 30  # bytes of one json file that is not line by line


def read_plain(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """A text file is one document; one longer than LARGEST_PLAIN becomes several, cut after a line end."""
    start, ordinal = span.start, span.ordinal
    for block in plain_cuts(stream, span):
        skip = 3 if start == 0 and block.startswith(BOM_UTF8) else 0  # a byte order mark is no text
        text, end = _decode(block[skip:], file, start + skip), start + len(block)
        yield text if isinstance(text, Unreadable) else Document(
            text, file.uri, file.source_index, ordinal, start + skip, end, True, file.split)
        start, ordinal = end, ordinal + 1
    if start == 0 and file.named:
        yield Unreadable("empty", f"{file.uri}: the file is empty")


def plain_cuts(stream: BinaryIO, span: Span = WHOLE) -> Iterator[bytes]:
    """A plain text stream, cut as read_plain does."""
    start, rest = span.start, b""
    while span.stop is None or start < span.stop:
        block = rest + stream.read(LARGEST_PLAIN - len(rest))
        if not block:
            return
        size = len(block)
        if size == LARGEST_PLAIN:
            size = block.rfind(b"\n") + 1 or block.rfind(b"\r") + 1 or _whole_characters(block)
        yield block[:size]
        start, rest = start + size, block[size:]


def read_jsonl(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """One JSON object a line, its text in `text_field`; blank lines are passed over."""
    start, number = span.start, span.ordinal
    while (span.stop is None or start < span.stop) and (line := stream.readline(LARGEST_LINE)):
        number += 1
        size, body = len(line), line.rstrip(b"\r\n")
        first = 3 if start == 0 and body.startswith(BOM_UTF8) else 0  # a byte order mark is no part of the line
        if size == LARGEST_LINE and not line.endswith(b"\n"):
            size += sum(len(more) for more in _rest_of_line(stream))
            yield _line_too_long(f"{file.uri}:{number}", size)
        elif body[first:].strip():
            found = _json_text(body[first:], f"{file.uri}:{number}", file)
            yield found if isinstance(found, Unreadable) else Document(
                found[0], file.uri, file.source_index, number - 1, start + first, start + len(body), False, file.split, found[1])
        start += size
    if start == 0 and file.named:
        yield Unreadable("empty", f"{file.uri}: the file is empty")


def read_json(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """A list of objects, or one object, or one object a line. Documents of a list are numbered, without byte ranges."""
    content = stream.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        yield Unreadable("too large", f"{file.uri}: more than {LARGEST_JSON:,} bytes of one JSON value; write one object a "
                         "line instead (.jsonl)")
        return
    try:
        value = _json(content)
    except (ValueError, RecursionError):
        wrong = no_text(content[:LOOKED_AT], file)
        yield from [wrong] if wrong else read_jsonl(io.BytesIO(content), file)  # its messages name the line
        return
    for number, record in enumerate(value if isinstance(value, list) else [value]):
        found = _record_text(record, f"{file.uri}: item {number}", file)
        yield found if isinstance(found, Unreadable) else Document(
            found[0], file.uri, file.source_index, number, 0, len(content), False, file.split, found[1])


def read_csv(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """A table with a header line; one record, one document. Tabs separate the fields of a .tsv, and semicolons those of a .csv whose
    header has them and no comma: spreadsheets write it where the comma is the decimal one."""
    csv.field_size_limit(LARGEST_LINE)
    records = _csv_records(_CsvLines(stream, file))
    header, _, start = next(records, (None, 0, 0))
    if header is None:
        if file.named:
            yield Unreadable("empty", f"{file.uri}: the file is empty")
        return
    if isinstance(header, Unreadable):
        yield replace(header, message=f"{header.message}; without its header the file is left out")
        return
    if file.text_field not in header:
        yield unreadable_field(file.uri, file.text_field, header)
        return
    if repeated := repeated_column(file, header):
        yield repeated
        return
    column = header.index(file.text_field)
    for number, (row, line, end) in enumerate(records):
        where = f"{file.uri}:{line}"
        if isinstance(row, Unreadable):
            yield row
        elif row and len(row) != len(header):
            yield Unreadable("bad CSV", f"{where}: {len(row)} fields where the header has {len(header)}")
        elif row:
            label = read_label(dict(zip(header, row, strict=True)), file, where) if file.label_fields else None
            yield label if isinstance(label, Unreadable) else Document(
                row[column], file.uri, file.source_index, number, start, end, False, file.split, label)
        start = end


def _csv_records(lines: _CsvLines) -> Iterator[tuple[list[str] | Unreadable, int, int]]:
    """(fields, the line where they begin, the byte where they end) of each record; after a bad one the next."""
    semicolons = b";" in lines.first and b"," not in lines.first
    delimiter = "\t" if lines.file.format == "tsv" else ";" if semicolons else ","
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.held, lines.problem, first = 0, None, lines.number + 1
        try:
            row = next(rows, None)
        except csv.Error as error:  # the csv module begins anew at the next line
            reason, at = str(error), lines.number
            if "new-line" in reason:
                reason = "a CR in the middle of it, not in quotes; where lines end so: tr '\\r' '\\n'"
            if lines.ended:
                reason, at = f"a quote is not closed in {lines.held:,} bytes; the rest of the file is left out", first
            row = Unreadable("bad CSV", f"{lines.file.uri}:{at}: not a CSV record ({reason})")
        if row is None:
            return
        yield row if lines.ended else lines.problem or row, first, lines.position
        if lines.ended:
            return


class _CsvLines:
    """Decoded lines for the csv module, which end where a record grows larger than LARGEST_LINE.

    A line that cannot be read becomes one that opens or closes the same quotes, so that its record still ends where
    it ends, and is the `problem` of that record. `position` counts the bytes given out, `held` those of this record.
    """

    def __init__(self, stream: BinaryIO, file: SourceFile):
        self.stream, self.file, self.problem = stream, file, None
        self.position = self.number = self.held = 0
        self.ended = False
        self.first = self.ahead = stream.readline(LARGEST_LINE)

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line, self.ahead = self.ahead or self.stream.readline(LARGEST_LINE), b""
        self.number += 1
        self.position += len(line)
        if len(line) == LARGEST_LINE and not line.endswith(b"\n"):
            size, quotes = len(line), line.count(b'"')
            for more in _rest_of_line(self.stream):
                size, quotes, self.position = size + len(more), quotes + more.count(b'"'), self.position + len(more)
            self.problem = _line_too_long(f"{self.file.uri}:{self.number}", size)
            line = b'"\n' if quotes % 2 else b"\n"  # RFC 4180: a quote inside a field is doubled
        if not line or self.held + len(line) > LARGEST_LINE:
            self.ended = True
            raise StopIteration
        self.held += len(line)
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            value = f"0x{error.object[error.start]:02x} at column {error.start + 1}"
            self.problem = self.problem or Unreadable(
                "wrong encoding", f"{self.file.uri}:{self.number}: not UTF-8 ({value}); convert it: iconv -f latin1 -t utf-8")
            return line.decode("utf-8", "replace")


def _rest_of_line(stream: BinaryIO) -> Iterator[bytes]:
    while more := stream.readline(1 << 20):
        yield more
        if more.endswith(b"\n"):
            return


def _line_too_long(where: str, size: int) -> Unreadable:
    return Unreadable("line too long", f"{where}: a line of {size:,} bytes, longer than {LARGEST_LINE:,}; split it, or leave it out")


def read_zip(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """Every member of a known kind, in the order of names, but for hidden ones; its documents bear the uri ARCHIVE!MEMBER."""
    try:
        archive = ZipFile(seekable(stream, file))
    except (BadZipFile, NotImplementedError, ValueError) as error:  # the last: a name that is not in the encoding it says
        yield Unreadable("damaged", f"{file.uri}: not a zip archive that can be read ({error})")
        return
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        known = known_format(info.filename)
        if known is None or known[0] == "zip" or any(map(_hidden, info.filename.split("/"))):
            continue
        member = replace(file, uri=f"{file.uri}!{info.filename}", format=known[0], compression=known[1], named=False)
        try:
            with archive.open(info) as raw, OPENERS[member.compression](raw) as inner:
                yield from READERS[member.format](inner, member)
        except (BadZipFile, RuntimeError, NotImplementedError, UnicodeDecodeError, OSError, *DAMAGE) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the archive, not of what it holds
            yield Unreadable("damaged", f"{member.uri}: cannot be read ({error}); pack it again")  # damaged; encrypted; unknown method


def _hidden(part: str) -> bool:
    """Whether a part of a path says that all behind it is no content: .git, and what macOS puts beside each file."""
    return part == "__MACOSX" or (part.startswith(".") and part not in (".", ".."))


def read_topics(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """The help texts of this Python (`pydoc_data.topics`), one document each; ranges are within the topic."""
    from pydoc_data.topics import topics

    for ordinal, (name, text) in enumerate(sorted(topics.items())):
        size = len(text.encode())
        yield Document(text, f"{file.uri}/{name}", file.source_index, ordinal, 0, size, True, file.split)


def read_folder(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """A folder whose files could not be listed, in their place."""
    why = "it could not when files were listed"
    try:
        os.scandir(os.path.join(file.path, ".")).close()
    except OSError as error:
        why = error.strerror
    yield Unreadable("unreadable folder", f"{file.uri}: the folder cannot be read ({why})")


def _looked_at(reader: Callable) -> Callable:
    """A reader that first looks at a file's first bytes, so that a binary one is one sentence and not one a line."""
    def read(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
        wrong = None if span.start else no_text(stream.peek(LOOKED_AT)[:LOOKED_AT], file)
        yield from [wrong] if wrong else reader(stream, file, span)

    return read


def no_text(block: bytes, file: SourceFile) -> Unreadable | None:
    """Why a file that begins with this block is UTF-16 or no text at all: NULs among other bytes than UTF-8, or many of them.

    A stray NUL in a text is no reason: in JSON it costs its line, elsewhere normalizing takes it out.
    """
    if block.startswith((b"\xff\xfe", b"\xfe\xff")):
        value = f"0x{block[0]:02x} at byte 0"
        return Unreadable("wrong encoding", f"{file.uri}: UTF-16, not UTF-8 ({value}); convert it: iconv -f utf-16 -t utf-8")
    count = block.count(b"\0")
    if count > len(block) / 20 or (count and not _is_utf8(block)):
        return Unreadable("binary", f"{file.uri}: a binary file, not text (a NUL byte at byte {block.find(0)})")
    return None


def _is_utf8(block: bytes) -> bool:
    """Whether a block, which may end inside a character, is UTF-8."""
    try:
        getincrementaldecoder("utf-8")().decode(block)
    except UnicodeDecodeError:
        return False
    return True


def _decode(block: bytes, file: SourceFile, start: int) -> str | Unreadable:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        value = f"0x{block[error.start]:02x} at byte {start + error.start}"
        return Unreadable("wrong encoding", f"{file.uri}: not UTF-8 ({value}); convert it: iconv -f latin1 -t utf-8")


def _json_text(body: bytes, where: str, file: SourceFile) -> tuple[str, str | None] | Unreadable:
    try:
        record = _json(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable("wrong encoding", f"{where}: not UTF-8 (0x{body[error.start]:02x} at column {error.start + 1})")
    except (json.JSONDecodeError, RecursionError) as error:
        reason = "nested too deep"
        if isinstance(error, json.JSONDecodeError):  # "Unterminated string starting at", "Expecting value"
            what = error.msg.removesuffix(" at").removesuffix(" starting")
            reason = f"{what[:1].lower()}{what[1:]} at column {error.colno}"
        return Unreadable("bad JSON", f"{where}: not a JSON object ({reason})")
    return _record_text(record, where, file)


def _json(content: str | bytes) -> object:
    """json.loads, but an integer of more digits than int() takes is a float: nobody asked for it."""
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        return json.loads(content, parse_int=_integer)


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _record_text(record: object, where: str, file: SourceFile) -> tuple[str, str | None] | Unreadable:
    """(text, label) of a JSON value."""
    if not isinstance(record, dict):
        return Unreadable("bad JSON", f"{where}: {kind_of(record)}, not a JSON object with a '{file.text_field}'")
    if file.text_field not in record:
        return unreadable_field(where, file.text_field, list(record))
    text = record[file.text_field]
    if text is None:
        return Unreadable("no text", f"{where}: field '{file.text_field}' is null")
    if not isinstance(text, str):
        return Unreadable("wrong field", f"{where}: field '{file.text_field}' is {kind_of(text)}, not text")
    if wrong := half_surrogate(text, f"{where}: field '{file.text_field}'"):
        return wrong
    label = read_label(record, file, where)
    return label if isinstance(label, Unreadable) else (text, label)


def _whole_characters(block: bytes) -> int:
    """The longest prefix of a block (cut anywhere) that does not end inside a UTF-8 character."""
    size = len(block)
    while size > len(block) - 4 and block[size - 1] & 0xC0 == 0x80:
        size -= 1
    return size - 1 if block[size - 1] >= 0xC0 else size


READERS: dict[str, Callable[[BinaryIO, SourceFile, Span], Iterator[Document | Unreadable]]] = {
    "txt": _looked_at(read_plain), "md": _looked_at(read_plain), "py": _looked_at(read_plain), "rst": _looked_at(read_plain),
    "jsonl": _looked_at(read_jsonl), "ndjson": _looked_at(read_jsonl), "json": read_json,
    "csv": _looked_at(read_csv), "tsv": _looked_at(read_csv),
    "parquet": read_parquet, "arrow": read_arrow, "feather": read_arrow,
    "html": _looked_at(read_html), "htm": _looked_at(read_html), "warc": read_warc, "wet": read_warc, "zip": read_zip,
    "topics": read_topics, "hf": read_hugging_face, "folder": read_folder,
}
PLAIN = ("txt", "md", "py", "rst")
EXTENSIONS = tuple(name for name in READERS if name not in ("topics", "hf", "folder"))


def known_format(name: str) -> tuple[str, str] | None:
    """("jsonl", ".gz") for "x.jsonl.gz"; None where no reader knows the name."""
    stem, compression = name.lower(), ""
    for suffix in OPENERS:
        if suffix and stem.endswith(suffix):
            stem, compression = stem.removesuffix(suffix), suffix
            break
    extension = PurePosixPath(stem).suffix.removeprefix(".")
    return (extension, compression) if extension in EXTENSIONS else None
