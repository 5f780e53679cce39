"""Picture 2, source: web pages become documents: html files, and WARC archives as crawlers write them.

WARC 1.0 and 1.1 (ISO 28500): `response` and `resource` records with HTML or plain text, and `conversion` records
(Common Crawl's WET files). Byte ranges are those of the record's content in the decompressed file.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from pellucid.config import UserError
from pellucid.data.compression import DAMAGE, LARGEST_WINDOW
from pellucid.data.document import WHOLE, Document, SourceFile, Span, Unreadable

LARGEST_PAGE = 1 << 26  # bytes
DROPPED = "script, style, noscript, template, svg, nav, header, footer, iframe, select, textarea, button"
BLOCKS = ("p div section article main aside h1 h2 h3 h4 h5 h6 ul ol li dl dt dd table tr blockquote pre figure figcaption "
          "hr address").split()
CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([A-Za-z0-9_-]+)""", re.IGNORECASE)
LATIN1 = ("iso8859-1", "ascii", "cp1252")  # read as Windows-1252, as the WHATWG's Encoding Standard has it
WINDOWS_1252 = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(256))
BLANKS = re.compile(r"[ \t\f\v]+")


def read_html(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """One page, one document: its text without navigation, scripts and styles, a line per block."""
    content = stream.read(LARGEST_PAGE + 1)
    if not content and file.named:
        yield Unreadable("empty", f"{file.uri}: the file is empty")
    if not content:
        return
    if len(content) > LARGEST_PAGE:
        yield Unreadable("too large", f"{file.uri}: a page of more than {LARGEST_PAGE:,} bytes")
        return
    text = _page(content, file.uri, None)
    yield text if isinstance(text, Unreadable) else Document(
        text, file.uri, file.source_index, 0, 0, len(content), False, file.split)


def read_warc(stream: BinaryIO, file: SourceFile, span: Span = WHOLE) -> Iterator[Document | Unreadable]:
    """One record with text, one document; other records are passed over. `ordinal` counts all records."""
    position, ordinal = 0, 0
    while True:
        head, size = _header(stream)
        if head is None:
            if size:
                yield Unreadable("damaged", f"{file.uri}: not a WARC record at byte {position}")
            elif position == 0 and file.named:
                yield Unreadable("empty", f"{file.uri}: the file is empty")
            return
        length = int(head.get("content-length", "0"))
        start = position + size
        content = stream.read(min(length, LARGEST_PAGE))
        if len(content) < min(length, LARGEST_PAGE) or not _skip(stream, length - len(content)):
            yield Unreadable("damaged", f"{file.uri}: ends inside the record at byte {position}")
            return
        position = start + length
        where = f"{file.uri}: record {ordinal} ({head.get('warc-target-uri', 'no address')})"
        text = Unreadable("too large", f"{where}: more than {LARGEST_PAGE:,} bytes") if length > LARGEST_PAGE \
            else _record_text(head, content, where)
        if isinstance(text, str):
            yield Document(text, file.uri, file.source_index, ordinal, start, position, False, file.split)
        elif text is not None:
            yield text
        ordinal += 1


def _header(stream: BinaryIO) -> tuple[dict[str, str] | None, int]:
    """(fields in lower case, bytes read) of the next record; (None, 0) at the end, (None, bytes) where it is none."""
    size, line = 0, stream.readline(1 << 16)
    while line in (b"\r\n", b"\n"):  # between records
        size, line = size + len(line), stream.readline(1 << 16)
    if not line:
        return None, 0
    size += len(line)
    if not line.startswith(b"WARC/"):
        return None, size
    fields = {}
    while (line := stream.readline(1 << 16)).strip():
        size += len(line)
        name, _, value = line.decode("utf-8", "replace").partition(":")
        fields[name.strip().lower()] = value.strip()
    if not line or not re.fullmatch("[0-9]{1,18}", fields.get("content-length", "")):
        return None, size
    return fields, size + len(line)


def _skip(stream: BinaryIO, size: int) -> bool:
    while size > 0 and (block := stream.read(min(size, 1 << 20))):
        size -= len(block)
    return size == 0


def _record_text(head: dict[str, str], content: bytes, where: str) -> str | Unreadable | None:
    """The text of a record, or None where it has none to read."""
    kind, mime = head.get("warc-type", "").lower(), head.get("content-type", "").lower()
    if kind == "response" and mime.startswith("application/http"):
        if not re.match(rb"HTTP/\S+ 2\d\d", content):
            return None
        fields, *rest = re.split(rb"\r?\n\r?\n", content, maxsplit=1)  # some servers leave out the CR (RFC 9112, section 2.2)
        headers = {name.strip().lower(): value.strip() for name, _, value in
                   (line.partition(":") for line in fields.decode("latin1").split("\n")[1:])}
        mime = headers.get("content-type", "text/html").lower()
        try:
            content = _decoded_body(headers, b"".join(rest))
        except (ValueError, OSError, *DAMAGE) as error:
            encoding = headers.get("content-encoding")
            named = f"content-encoding {encoding}: " if encoding else ""
            return Unreadable("damaged", f"{where}: its body cannot be decoded ({named}{error})")
    elif kind not in ("conversion", "resource"):
        return None
    charset = re.search(r"charset=[\"']?([\w-]+)", mime)
    if "html" in mime:
        return _page(content, where, charset and charset.group(1))
    return _text(content, where, charset and charset.group(1)) if mime.startswith("text/plain") else None


def _decoded_body(headers: dict[str, str], body: bytes) -> bytes:
    if "chunked" in headers.get("transfer-encoding", "").lower() and re.match(rb"[0-9A-Fa-f]+[ \t]*[;\r]", body):
        parts = []
        while body:
            line, _, body = body.partition(b"\r\n")
            size = int(line.split(b";")[0], 16)
            if not size:
                break
            parts.append(body[:size])
            body = body[size + 2 :]
        body = b"".join(parts)
    encoding = headers.get("content-encoding", "").lower()
    if "gzip" in encoding and body[:2] == b"\x1f\x8b":
        return gzip.decompress(body)
    if encoding == "deflate":  # of zlib, though some servers send it raw (RFC 9110, section 8.4.1.2)
        zlibs = len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0
        return zlib.decompress(body, zlib.MAX_WBITS if zlibs else -zlib.MAX_WBITS)
    if "zstd" in encoding and body.startswith(b"\x28\xb5\x2f\xfd"):
        with zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).stream_reader(body, read_across_frames=True) as reader:
            return reader.read()
    if {"br", "zstd", "compress"} & set(re.split(r"[\s,]+", encoding)):  # others that servers write ("none", "utf-8") encode nothing
        try:
            body.decode()  # some crawlers decode the body and leave the header
        except UnicodeDecodeError:
            raise ValueError("known are gzip, deflate and zstd") from None
    return body


def _text(content: bytes, where: str, charset: str | None) -> str | Unreadable:
    if charset and not content.startswith(codecs.BOM_UTF8):  # that mark says UTF-8, whatever is named
        with contextlib.suppress(LookupError, UnicodeError):  # there is a codec called "undefined"
            if codecs.lookup(charset).name in LATIN1:
                return codecs.charmap_decode(content, "strict", WINDOWS_1252)[0]
            text = content.decode(charset)
            text.encode()  # UTF-7 may hold half of a surrogate pair
            return text
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        value = f"0x{content[error.start]:02x} at byte {error.start}"
        named = f"nor the encoding it names ({charset})" if charset else "and it names no encoding"
        return Unreadable("wrong encoding", f"{where}: not UTF-8 ({value}), {named}")


def _page(content: bytes, where: str, charset: str | None) -> str | Unreadable:
    if not charset and (named := CHARSET.search(content[:4096])):
        charset = named.group(1).decode()
    markup = _text(content, where, charset)
    return markup if isinstance(markup, Unreadable) else html_text(markup)


def html_text(markup: str) -> str:
    """The text of a page: main content if marked, blocks on lines of their own, `pre` as it stands."""
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError:
        raise UserError("HTML is read with selectolax, which is not installed; pip install 'pellucid[html]'") from None
    tree = LexborHTMLParser(markup)
    for node in tree.css(DROPPED):
        node.decompose()
    parts: list[str] = []
    for node in tree.css("main")[:1] or tree.css("article:not(article article)") or tree.css("body"):
        _walk(node, parts, False)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", "".join(parts)))
    return text.replace("\r", "\n").strip("\n \t")


def _walk(root: object, parts: list[str], inside_pre: bool) -> None:
    """Text in document order; an explicit stack, for pages nest deep."""
    stack: list = [(root, inside_pre)]
    while stack:
        node, pre = stack.pop()
        if isinstance(node, str):
            parts.append(node)
            continue
        tag = node.tag
        if tag == "-text":
            text = node.text_content or ""
            if pre:
                text = text.replace("\n", "\r")  # a line end that stays
            else:
                text = BLANKS.sub(" ", text.replace("\n", " ").replace("\r", " "))
                text = text.lstrip() if not parts or parts[-1].endswith(("\n", " ", "\t")) else text
            if text:
                parts.append(text)
            continue
        if tag == "br":
            parts.append("\n")
            continue
        children = []
        child = node.child
        while child is not None:
            children.append((child, pre or tag == "pre"))
            child = child.next
        if tag in BLOCKS:
            parts.append("\n")
            stack.append(("\n", pre))
        elif tag in ("td", "th"):
            stack.append(("\t", pre))
        stack.extend(reversed(children))
