"""Names become files, and files become documents; every bad input is one sentence."""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather

from pellucid.config import SourceConfig, UserError
from pellucid.data import readers
from pellucid.data.document import Document, Unreadable
from pellucid.data.parts import Part, scan
from pellucid.data.sources import list_files, read_documents

TEXTS = ["First text.\nSecond line.\n", "Ünïcödé 😀\n", "third"]


def read(path, **settings):
    files = list_files([SourceConfig(path=str(path), **settings)])
    return [item for file in files for item in read_documents(file)]


def compress(data: bytes, compression: str) -> bytes:
    return {"": lambda b: b, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, ".bz2": bz2.compress,
            ".xz": lzma.compress}[compression](data)


def warc(*records: tuple[str, str, bytes]) -> bytes:
    """(type, content type, content) of each record, with the plain line ends of the standard."""
    return b"".join(
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://example.org/{n}\r\nContent-Type: {mime}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n" for n, (kind, mime, body) in enumerate(records))


def content(extension: str, folder: Path) -> bytes:
    if extension in ("jsonl", "ndjson"):
        return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)).encode()
    if extension == "json":
        return json.dumps([{"text": text} for text in TEXTS], indent=1).encode()
    if extension in ("csv", "tsv"):
        out = io.StringIO()
        csv.writer(out, delimiter="\t" if extension == "tsv" else ",").writerows(
            [["id", "text"], *([n, text] for n, text in enumerate(TEXTS))])
        return out.getvalue().encode()
    table = pa.table({"text": TEXTS, "id": [1, 2, 3]})
    made = folder / "made.tmp"
    if extension == "parquet":
        pq.write_table(table, made)
    elif extension == "feather":
        feather.write_feather(table, made)
    elif extension == "arrow":
        with pa.ipc.new_stream(str(made), table.schema) as writer:
            writer.write_table(table)
    elif extension == "wet":
        return warc(("warcinfo", "text/plain", b"x"), *(("conversion", "text/plain", text.encode()) for text in TEXTS))
    else:
        return "".join(TEXTS).encode()
    return made.read_bytes()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("extension", [
    "txt", "md", "py", "rst", "jsonl", "ndjson", "json", "csv", "tsv", "parquet", "feather", "arrow", "wet"])
def test_every_format_in_every_compression_gives_the_same_texts(tmp_path, extension, compression):
    path = tmp_path / f"a.{extension}{compression}"
    path.write_bytes(compress(content(extension, tmp_path), compression))
    texts = [document.text for document in read(path)]
    assert texts == (["".join(TEXTS)] if extension in ("txt", "md", "py", "rst") else TEXTS)


@pytest.mark.parametrize(("header", "delimiter"), [("id;text", ";"), ("text", ";"), ("id,text", ","), ('"a;b",text', ",")])
def test_semicolons_separate_where_the_header_has_no_comma(tmp_path, header, delimiter):
    """As spreadsheets write it where numbers have commas. Of a header with one name, the separator cannot be told: commas."""
    texts = ["1,5 kg; a lot", 'he said "no"', "two\nlines"]
    rows = [["7", text] if "," in header or ";" in header else [text] for text in texts]
    out = io.StringIO(header + "\n")
    out.seek(0, io.SEEK_END)
    csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(rows)
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + out.getvalue().encode())
    documents = read(tmp_path / "a.csv")
    assert [document.text for document in documents] == texts
    assert documents[0].byte_start == 3 + len(header) + 1 and documents[-1].byte_end == (tmp_path / "a.csv").stat().st_size


def test_a_zip_archive_is_its_members(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("b/x.jsonl", "a.txt", "c.jsonl.gz", "picture.png"):
            data = content(name.split(".")[1], tmp_path)
            archive.writestr(name, gzip.compress(data) if name.endswith("gz") else data)
    documents = read(tmp_path / "a.zip")
    assert [document.text for document in documents] == ["".join(TEXTS), *TEXTS, *TEXTS]
    assert [document.source for document in documents[:2]] == [f"{tmp_path}/a.zip!a.txt", f"{tmp_path}/a.zip!b/x.jsonl"]


PAGE = """<!doctype html><html><head><title>T</title><style>p {}</style><script>x()</script></head><body><nav>Menu</nav>
<main><h1>A   title</h1><p>One <b>bold</b>
word.</p><pre>kept   as
  it is</pre><ul><li>first</li><li>second<br>line</li></ul></main><footer>End</footer></body></html>"""


def test_a_web_page_is_its_text(tmp_path):
    (tmp_path / "a.html").write_text(PAGE)
    [document] = read(tmp_path / "a.html")
    lines = [line for line in document.text.split("\n") if line.strip()]
    assert lines == ["A title", "One bold word.", "kept   as", "  it is", "first", "second", "line"]
    latin = "<html><head><meta charset='iso-8859-1'></head><body><p>café</p></body></html>".encode("latin1")
    (tmp_path / "b.htm").write_bytes(latin)
    assert read(tmp_path / "b.htm")[0].text.strip() == "café"
    deep = "<div>" * 20_000 + "inside" + "</div>" * 20_000
    (tmp_path / "c.html").write_text(f"<body>{deep}</body>")
    assert "inside" in read(tmp_path / "c.html")[0].text


@pytest.mark.parametrize(("page", "text"), [
    ("<article>one</article><p>between</p><article>two<article>three</article></article>", "one\n\ntwo\nthree"),
    ("<form><p>A page</p><select><option>1<option>2</select><button>Send</button></form>", "A page"),
    ("<p>code</p><pre>a  \n\n\n\n  b</pre>\n\n\n<p>after</p>", "code\n\na  \n\n\n\n  b\n\nafter"),
])
def test_all_articles_forms_and_code_of_a_page_stay_as_they_are(tmp_path, page, text):
    (tmp_path / "a.html").write_text(page)
    assert [document.text for document in read(tmp_path / "a.html")] == [text]


@pytest.mark.parametrize("label", ["iso-8859-1", "ISO-8859-1", "latin1", "us-ascii", "windows-1252"])
def test_a_page_that_names_latin_1_is_read_as_browsers_do(tmp_path, label):
    """https://encoding.spec.whatwg.org/#names-and-labels: Windows-1252, whose five holes are control characters."""
    (tmp_path / "a.html").write_bytes(f"<meta charset={label}>".encode() + b"\x93caf\xe9\x94 \x80 5\x81")
    assert [document.text for document in read(tmp_path / "a.html")] == ["“café” € 5\x81"]


def test_the_encoding_of_a_record_is_the_one_its_mark_or_its_header_names(tmp_path):
    http = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n\r\n"
    page = "\ufeff<title>T</title><p>é</p>".encode()
    (tmp_path / "a.warc").write_bytes(warc(
        ("response", "application/http", http % b"text/html; charset=utf-8" + page),
        ("response", "application/http", http % b"text/html; charset=latin1" + page),
        ("response", "Application/HTTP", http % b"Text/HTML; Charset=KOI8-R" + "<p>да</p>".encode("koi8-r")),
        ("resource", "Text/Plain; charset=utf-8", "\ufeffé".encode()),
        ("resource", "text/plain; charset=utf-7", b"half +2AA- of a pair"),
    ))
    (tmp_path / "b.html").write_bytes(b"\xef\xbb\xbf<meta charset=utf-8><title>T</title><p>\xc3\xa9</p>")
    assert [document.text for document in read(tmp_path)] == ["é", "é", "да", "é", "half +2AA- of a pair", "é"]


def test_a_crawl_archive_gives_the_pages_it_holds(tmp_path):
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
    page = "<p>Ünïcödé page</p>".encode()
    raw, frames = zlib.compressobj(wbits=-15), b"".join(map(zstandard.compress, (page[:9], page[9:])))
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n0\r\n\r\n" % (len(page), page)
    data = warc(
        ("request", "application/http", b"GET / HTTP/1.1\r\n\r\n"),
        ("response", "application/http; msgtype=response", http + b"\r\n" + page),
        ("response", "application/http", http + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(page)),
        ("response", "application/http", http + b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(page)),
        ("response", "application/http", http + b"Content-Encoding: deflate\r\n\r\n" + raw.compress(page) + raw.flush()),
        ("response", "application/http", http + b"Content-Encoding: zstd\r\n\r\n" + frames),
        ("response", "application/http", http + chunks),
        ("response", "application/http", http + chunks.replace(b"%x\r\n" % len(page), b"%x  \r\n" % len(page))),  # some servers pad
        ("response", "application/http", b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n\r\n<p>gone</p>"),
        ("response", "application/http", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n\x89PNG"),
        ("resource", "text/plain", b"a resource"),
    )
    (tmp_path / "a.warc").write_bytes(data)
    documents = read(tmp_path / "a.warc")
    assert [document.text for document in documents] == ["Ünïcödé page"] * 7 + ["a resource"]
    assert data[documents[7].byte_start : documents[7].byte_end] == b"a resource"
    members = b"".join(gzip.compress(part) for part in (data[:300], data[300:]))  # a member per record, in real ones
    (tmp_path / "b.warc.gz").write_bytes(members)
    assert [document.text for document in read(tmp_path / "b.warc.gz")] == [document.text for document in documents]


@pytest.mark.parametrize("http", [
    b"HTTP/1.0 200 OK\nContent-Type: text/plain\n\n", b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\n", b"HTTP/1.0 200 OK\r\n\r\n",
], ids=["LF", "mixed", "no header"])
def test_a_page_of_a_server_that_is_loose_about_line_ends_is_not_lost(tmp_path, http):
    """RFC 9112, section 2.2: a recipient may take a single LF as a line end."""
    (tmp_path / "a.warc").write_bytes(warc(("response", "application/http", http + b"one\n\ntwo\r\n\r\nthree")))
    [document] = read(tmp_path / "a.warc")
    assert document.text.split() == ["one", "two", "three"]


def test_a_body_in_an_encoding_that_is_not_read_is_named(tmp_path):
    page = "<p>Ünïcödé page</p>".encode() * 20
    bodies = {"br": bytes(range(128, 256)), "compress": b"\x1f\x9d" + bytes(range(128, 256)), "zstd": bytes(range(128, 256))}
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=latin1\r\nContent-Encoding: %s\r\n\r\n"  # in which all bytes are text
    (tmp_path / "a.warc").write_bytes(warc(*(
        ("response", "application/http", head % name.encode() + body) for name, body in bodies.items())))
    for problem, name in zip(read(tmp_path / "a.warc"), bodies, strict=True):
        assert problem.reason == "damaged" and f"its body cannot be decoded (content-encoding {name}" in problem.message
    crawler = head.replace(b"latin1", b"utf-8") % b"br" + page  # some decode the body and leave the header
    server = head % b"none" + page.decode().encode("latin1")
    (tmp_path / "b.warc").write_bytes(warc(*(("response", "application/http", http) for http in (crawler, server))))
    assert [document.text.startswith("Ünïcödé page") for document in read(tmp_path / "b.warc")] == [True, True]


def test_warc_records_agree_with_warcio(tmp_path):
    from warcio import archiveiterator, warcwriter
    from warcio.statusandheaders import StatusAndHeaders

    with open(tmp_path / "a.warc.gz", "wb") as file:
        writer = warcwriter.WARCWriter(file, gzip=True)
        for n in range(20):
            payload = io.BytesIO(f"<html><body><p>page {n} {'x' * n}</p></body></html>".encode())
            head = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
            writer.write_record(writer.create_warc_record(f"http://x/{n}", "response", payload=payload, http_headers=head))
    with open(tmp_path / "a.warc.gz", "rb") as file:
        theirs = [r.content_stream().read() for r in archiveiterator.ArchiveIterator(file) if r.rec_type == "response"]
    ours = [document.text for document in read(tmp_path / "a.warc.gz")]
    assert len(ours) == len(theirs) == 20
    assert all(text.encode() in body for text, body in zip(ours, theirs, strict=True))


def test_a_hugging_face_dataset_is_streamed_by_name(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {text}"}) + "\n" for text in TEXTS))
    documents = read(f"hf-dataset:{folder}")
    assert [document.text for document in documents] == [f"train {text}" for text in TEXTS]
    assert [(d.byte_start, d.byte_end) for d in documents] == [(0, 1), (1, 2), (2, 3)]
    assert read(f"hf-dataset:{folder}::test")[0].text.startswith("test")
    assert read(f"hf-dataset:{folder}", text_field="body")[0].reason == "wrong field"
    before = list_files([SourceConfig(path=f"hf-dataset:{folder}")])
    (folder / "train.jsonl").write_text("{}\n")
    assert list_files([SourceConfig(path=f"hf-dataset:{folder}")]) != before
    with pytest.raises(UserError, match="hf-dataset:/nowhere/at/all: cannot be opened"):
        read("hf-dataset:/nowhere/at/all")


@given(lines=st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=30),
                      max_size=60),
       block=st.integers(10, 300))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_read_in_spans_is_the_file_read_whole(tmp_path, monkeypatch, lines, block):
    monkeypatch.setattr(readers, "LARGEST_PLAIN", 50)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "b.txt").write_text("\n".join(lines))
    pq.write_table(pa.table({"text": pa.array(lines, pa.string())}), tmp_path / "c.parquet", row_group_size=7)
    for file in list_files([SourceConfig(path=str(tmp_path / "*.*"))]):
        parts = scan(Part(((0, file),)), block)
        pieces = [document for part in parts for document in read_documents(file, span=part.span)]
        assert pieces == list(read_documents(file))


def test_byte_ranges_point_at_the_text_in_the_decompressed_file(tmp_path):
    lines = content("jsonl", tmp_path)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    for document in read(tmp_path / "a.jsonl.gz"):
        assert json.loads(lines[document.byte_start : document.byte_end])["text"] == document.text
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    assert [(d.byte_start, d.byte_end) for d in read(tmp_path / "a.parquet")] == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("separator", ["\n", "", "é"])
def test_long_plain_files_are_cut_without_losing_a_byte(tmp_path, monkeypatch, separator):
    monkeypatch.setattr(readers, "LARGEST_PLAIN", 50)
    text = separator.join(f"line {n} 😀" for n in range(100))
    (tmp_path / "a.txt").write_bytes(text.encode())
    documents = read(tmp_path / "a.txt")
    assert "".join(d.text for d in documents) == text
    assert all(d.text == text.encode()[d.byte_start : d.byte_end].decode() for d in documents)
    assert [d.ordinal for d in documents] == list(range(len(documents)))
    assert max(d.byte_end - d.byte_start for d in documents) <= 50
    if separator == "\n":
        assert all(d.text.endswith("\n") for d in documents[:-1])


def test_zstd_frames_one_after_another_are_one_file(tmp_path):
    frames = b"".join(zstandard.ZstdCompressor().compress(text.encode()) for text in TEXTS)
    (tmp_path / "a.txt.zst").write_bytes(frames)
    assert read(tmp_path / "a.txt.zst")[0].text == "".join(TEXTS)


@pytest.mark.parametrize("window_log", [28, 31])
def test_zstd_files_of_any_long_window_are_read(tmp_path, window_log):
    """As `zstd --long=28` writes them: the header asks for that much, whatever there is."""
    size = (window_log - 10) << 3  # RFC 8878, 3.1.1.1.2: the exponent of the window, of a frame that does not tell its size
    raw_block = (len(b"text") << 3 | 1).to_bytes(3, "little") + b"text"
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([size]) + raw_block)
    assert [document.text for document in read(tmp_path / "a.txt.zst")] == ["text"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    [document] = read(tmp_path / "a.txt")
    assert (document.text, document.byte_start, document.byte_end) == ("hello", 3, 8)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_a_byte_order_mark_does_not_hide_the_first_line(tmp_path, name):
    data = b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(data)
    documents = read(tmp_path / name)
    assert [document.text for document in documents] == ["one", "two"]
    assert [json.loads(data[d.byte_start : d.byte_end].decode()) for d in documents] == [{"text": "one"}, {"text": "two"}]


def test_folders_are_read_in_sorted_order_without_hidden_or_unknown_files(tmp_path):
    for name in ["b/2.txt", "b/1.md", "a.py", "c.docx", ".git/x.txt", "z.txt.gz"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(gzip.compress(b"x") if name.endswith("gz") else b"x")
    names = [Path(f.uri).relative_to(tmp_path).as_posix() for f in list_files([SourceConfig(path=str(tmp_path))])]
    assert names == ["a.py", "b/1.md", "b/2.txt", "z.txt.gz"]
    found = list_files([SourceConfig(path=str(tmp_path / "**/*.txt"))])
    assert [Path(f.uri).name for f in found] == ["2.txt"]


def test_links_give_each_file_once(tmp_path):
    """As a folder and as a glob: a link to the folder itself, to a folder beside it, to a file, and to nothing."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "c.txt").write_text("c")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "b.txt").write_text("b")
    for name, target in {"loop": ".", "other": "../beside", "link.txt": "deep/b.txt", "gone.txt": "nowhere"}.items():
        (folder / name).symlink_to(target)
    (folder / "deep" / "up").symlink_to("..")
    for path in (folder, folder / "**" / "*.txt"):
        found = list_files([SourceConfig(path=str(path))])
        assert [Path(file.uri).relative_to(folder).as_posix() for file in found] == ["a.txt", "link.txt", "other/c.txt"]


@pytest.mark.parametrize("pattern", [
    "*.txt", "**/*.txt", "**", "a/**", "a/**/*.txt", "**/b/*.txt", "**/b/**/*.txt", "a*/**/*.txt", "**/.h/*.txt",
    "[[]x]/**/*.txt", "x**/*.txt"])
def test_a_glob_matches_what_the_library_matches_where_there_are_no_links(tmp_path, monkeypatch, pattern):
    for name in ("1.txt", "a/2.txt", "a/b/3.txt", "b/4.txt", "b/b/5.txt", ".h/6.txt", "[x]/7.txt", "x/y/8.txt", "a/.h/9.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    expected = sorted({os.path.abspath(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)})
    for path in (pattern, str(tmp_path / pattern)):
        found = [file.uri for file in list_files([SourceConfig(path=path)])] if expected else []
        assert found == expected


@pytest.mark.parametrize("path", ["", "**/*.txt", "*/*.txt"])
def test_a_folder_that_may_not_be_read_stands_for_its_files(tmp_path, monkeypatch, path):
    for name in ("a/1.txt", "b/2.txt", ".hidden/3.txt", "lost+found/4.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("text")
    scandir, access, shut = os.scandir, os.access, ("b", ".hidden", "lost+found")

    def guarded(path="."):
        if Path(path).name in shut:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name not in shut and access(path, mode))
    document, problem = read(tmp_path / path)
    assert document.source == str(tmp_path / "a" / "1.txt")
    assert (problem.reason, problem.message) == (
        "unreadable folder", f"{tmp_path}/b: the folder cannot be read (Permission denied)")
    (tmp_path / "a" / "1.txt").unlink()
    assert read(tmp_path / path) == [problem], "no word of extensions"


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    for path in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(UserError, match=r"data.sources\[0\]: the file name b'.*caf\\xe9.txt' is not UTF-8; rename the file"):
            list_files([SourceConfig(path=str(path))])


def test_empty_files_in_a_folder_are_no_mistake_but_a_named_one_is(tmp_path):
    (tmp_path / "__init__.py").write_bytes(b"")
    assert read(tmp_path) == []
    [problem] = read(tmp_path / "__init__.py")
    assert problem.reason == "empty"


def test_the_standard_library_is_a_corpus():
    files = list_files([SourceConfig(path="builtin:python")])
    total = sum(file.path.stat().st_size for file in files)
    assert len(files) > 300 and total > 5e6
    library = sysconfig.get_paths()["stdlib"]
    assert all(str(file.path).startswith(library) for file in files)
    parts = {part for file in files for part in Path(file.uri).parts}
    assert not parts & {"test", "tests", "site-packages", "__pycache__", "idle_test"}
    assert "builtin:python/json/decoder.py" in {file.uri for file in files}


def test_the_help_topics_are_a_corpus():
    documents = read("builtin:python-topics")
    assert len(documents) > 50 and any("lambda" in d.text for d in documents)


@pytest.mark.parametrize(("name", "data", "reason", "says"), [
    ("a.txt", b"abc\0def", "binary", "NUL byte at byte 3"),
    ("a.txt", "caf\xe9 au lait".encode("latin1"), "wrong encoding", "not UTF-8 (0xe9 at byte 3)"),
    ("a.txt", "hello".encode("utf-16"), "wrong encoding", "UTF-16, not UTF-8 (0xff at byte 0)"),
    ("a.csv", "text\nhello\n".encode("utf-16"), "wrong encoding", "UTF-16, not UTF-8 (0xff at byte 0)"),
    ("a.csv", b"id,text\n1,a\0b\n", "binary", "NUL byte at byte 11"),
    ("a.html", b"<p>a\0b</p>", "binary", "NUL byte at byte 4"),
    ("a.json", b'{\n"text": "a\0b"\n}', "binary", "NUL byte at byte 12"),
    ("a.jsonl.gz", gzip.compress(b"\x80\n\x81\n\0\n", mtime=0), "binary", "NUL byte at byte 4"),
    ("a.txt", b"", "empty", "empty"),
    ("a.txt.gz", b"", "empty", "empty"),
    ("a.txt.zst", b"", "empty", "empty"),
    ("a.txt.gz", gzip.compress(b"hello " * 1000, mtime=0)[:-12], "damaged", "not a complete gzip file"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' + b'{"text": "two"}\n' * 9999, mtime=0)[:-20], "damaged",
     "not a complete gzip file"),
    ("a.txt.gz", b"no gzip at all", "damaged", "not a complete gzip file"),
    ("a.txt.zst", zstandard.ZstdCompressor().compress(bytes(range(65, 91)) * 99)[:-6], "damaged", "not a complete zstd"),
    ("a.txt.zst", b"no zstd at all", "damaged", "not a complete zstd file"),
    ("a.parquet", b"PAR1 not really", "damaged", "not a complete parquet file"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "bad JSON", "a.jsonl:2: not a JSON object"),
    ("a.jsonl", b'{"text": "ok', "bad JSON", "a.jsonl:1: not a JSON object (unterminated string at column 10)"),
    ("a.jsonl", b"[1, 2]\n", "bad JSON", "a.jsonl:1: a list, not a JSON object with a 'text'"),
    ("a.jsonl", b'{"body": "x", "title": "y"}\n', "wrong field", "the fields are 'body', 'title'"),
    ("a.jsonl", b'{"text": 7}\n', "wrong field", "is an integer, not text"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "wrong encoding", "surrogate pair (U+D800)"),
    ("a.jsonl", b'{"\\ud800": "x"}\n', "wrong field", r"the fields are '\ud800'"),
    ("a.jsonl", b'{"text": "\xff"}\n', "wrong encoding", "a.jsonl:1: not UTF-8"),
    ("a.jsonl", b"[" * 100000 + b"\n", "bad JSON", "nested too deep"),
    ("a.jsonl", b'{"text": null}\n', "no text", "a.jsonl:1: field 'text' is null"),
    ("a.txt.bz2", bz2.compress(b"hello " * 9999)[:-9], "damaged", "not a complete bzip2 file"),
    ("a.txt.bz2", b"no bzip2 at all", "damaged", "not a complete bzip2 file"),
    ("a.txt.xz", lzma.compress(b"hello " * 9999)[:-9], "damaged", "not a complete xz file"),
    ("a.txt.xz", b"no xz at all", "damaged", "not a complete xz file"),
    ("a.zip", b"PK no zip", "damaged", "not a zip archive"),
    ("a.csv", b"id,text\n1,good\n2\n", "bad CSV", "a.csv:3: 1 fields where the header has 2"),
    ("a.csv", b'text\n"unclosed\n', "bad CSV", "not a CSV record"),
    ("a.csv", b"id,text\r1,good\r", "bad CSV", r"a.csv:1: not a CSV record (a CR in the middle of it, not in quotes; where lines "
     r"end so: tr '\r' '\n')"),
    ("a.csv", b"text\ncaf\xe9\n", "wrong encoding", "a.csv:2: not UTF-8 (0xe9"),
    ("a.csv", b"body\nx\n", "wrong field", "the fields are 'body'"),
    ("a.json", b'{"text": "x"', "bad JSON", "a.json:1: not a JSON object"),
    ("a.json", b'[{"text": "x"}, 3]', "bad JSON", "a.json: item 1: an integer, not a JSON object"),
    ("a.arrow", b"ARROW1 not really", "damaged", "not a complete Arrow file"),
    ("a.feather", b"", "damaged", "not a complete Arrow file"),
    ("a.warc", b"not a record\r\n", "damaged", "not a WARC record at byte 0"),
    ("a.warc", "WARC/1.0\r\nContent-Length: \u00b2\r\n\r\n".encode(), "damaged", "not a WARC record at byte 0"),
    ("a.warc", b"WARC/1.0\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", "damaged", "not a WARC record at byte 0"),
    ("a.warc", warc(("conversion", "text/plain", b"text " * 99))[:-90], "damaged", "ends inside the record at byte 0"),
    ("a.wet", warc(("conversion", "text/plain", b"caf\xe9")), "wrong encoding", "record 0 (http://example.org/0)"),
    ("a.html", b"<p>caf\xe9</p>", "wrong encoding", "not UTF-8 (0xe9 at byte 6), and it names no encoding"),
    ("a.html", b"<meta charset=cp932>\xe9", "wrong encoding", "not UTF-8 (0xe9 at byte 20), nor the encoding it names (cp932)"),
    ("a.html", b"<meta charset=undefined>\xe9", "wrong encoding", "nor the encoding it names (undefined)"),
    ("a.html", b"", "empty", "empty"),
])
def test_bad_content_is_one_sentence_that_names_the_file(tmp_path, name, data, reason, says):
    (tmp_path / name).write_bytes(data)
    [problem] = [item for item in read(tmp_path / name) if isinstance(item, Unreadable)]
    assert problem.reason == reason
    assert name in problem.message and says in problem.message and "\n" not in problem.message


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_parquet_file_cut_short_is_one_sentence(tmp_path, share):
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(5000)]}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: int(len(whole) * share)])
    [problem] = read(tmp_path / "a.parquet")
    assert problem.reason == "damaged" and "a.parquet: not a complete parquet file" in problem.message


GIGABYTE_LINE = """
import re, sys
from pathlib import Path
from pellucid.config import DataConfig
from pellucid.data.build import prepare
config = DataConfig(sources=[sys.argv[1]], directory=sys.argv[2], tokenizer={"kind": "bytes"}, sequence_length=8,
                    validation_fraction=0, on_error="skip")
dataset = prepare(config)
print(dataset.manifest["stages"][0]["dropped"], dataset.manifest["stages"][0]["samples"][0]["message"])
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())  # ru_maxrss would count the parent's, too
print([dataset.train.document(n)["text"] for n in range(2)], int(peak[1]) // 1000)
"""


@pytest.mark.parametrize(("name", "before", "after", "says"), [
    ("a.jsonl", b'{"text": "the first"}\n%s{"text": "', b'"}\n{"text": "the last"}\n', "a.jsonl:9002: a line of 1,073,741,837 bytes"),
    ("a.csv", b"id,text\n1,the first\n%s2,", b"\n3,the last\n", "a.csv:9003: a line of 1,073,741,827 bytes"),
])
def test_a_line_of_a_gigabyte_is_left_out_counted_and_never_in_memory(tmp_path, name, before, after, says):
    with open(tmp_path / name, "wb") as file:
        file.write(before % (b"\n" * 9000))  # a NUL sooner would say that the file is binary
        file.seek(1 << 30, os.SEEK_CUR)  # a hole: nothing is stored
        file.write(after)
    done = subprocess.run([sys.executable, "-c", GIGABYTE_LINE, str(tmp_path / name), str(tmp_path / "data")],
                          capture_output=True, text=True, check=True)
    dropped, documents = done.stdout.splitlines()
    assert dropped.startswith("{'line too long': 1}") and says in dropped
    assert documents.startswith("['the first', 'the last']") and int(documents.split()[-1]) < 1000  # MB


def test_a_long_text_whose_lines_end_with_cr_alone_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_PLAIN", 50)
    (tmp_path / "a.txt").write_bytes(b"a line of words\r" * 20)
    documents = read(tmp_path / "a.txt")
    assert len(documents) == 7 and all(document.text == "a line of words\r" * (len(document.text) // 16) for document in documents)
    assert "".join(document.text for document in documents) == "a line of words\r" * 20


def test_parquet_names_its_columns_when_the_text_field_is_wrong(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    assert "the fields are 'body', 'n'" in read(tmp_path / "a.parquet")[0].message
    assert "holds int64, not text" in read(tmp_path / "a.parquet", text_field="n")[0].message
    assert read(tmp_path / "a.parquet", text_field="body")[0].text == "x"


def test_two_columns_of_one_name_are_one_sentence(tmp_path):
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"]), pa.array(["z"])], names=["text", "text", "body"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        [problem] = read(tmp_path / name)
        assert problem.reason == "wrong field" and f"{name}: 2 columns are called 'text'" in problem.message
        assert [document.text for document in read(tmp_path / name, text_field="body")] == ["z"]
    (tmp_path / "c.csv").write_text("text,text,body,body,kind\nx,y,z,w,k\n")
    config = SourceConfig(path=str(tmp_path / "c.csv"), text_field="text")
    for text_field, label, twice in (("text", "kind", "text"), ("kind", "body", "body"), ("kind", "kind", None)):
        config.text_field = text_field
        [item] = read_documents(list_files([config], labels=((label,), "category"))[0])
        assert item.message.endswith(f"c.csv: 2 columns are called '{twice}'; rename all but one") if twice else item.text == "k"


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_a_line_too_long_is_left_out_and_the_next_is_read(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(readers, "LARGEST_LINE", 1000)
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("one", "x" * 5000, "two"))
    (tmp_path / f"a.jsonl{compression}").write_bytes(compress(lines, compression))
    first, problem, last = read(tmp_path / f"a.jsonl{compression}")
    assert (first.text, last.text, last.ordinal) == ("one", "two", 2)
    assert problem.reason == "line too long" and ":2: a line of 5,013 bytes" in problem.message


@pytest.mark.parametrize(("bad", "reason", "says"), [
    (b"2," + b"x" * 5000 + b"\n", "line too long", ":3: a line of 5,003 bytes"),
    (b'2,"' + b"x" * 5000 + b'\n""still, quoted""\n"\n', "line too long", ":3: a line of 5,004 bytes"),
    (b'2,"begun\n' + b"x" * 5000 + b'\nstill, quoted"\n', "line too long", ":4: a line of 5,001 bytes"),
    (b"2,caf\xe9\n", "wrong encoding", ":3: not UTF-8 (0xe9 at column 6)"),
    (b'2,"begun\n\n caf\xe9\nstill, quoted"\n', "wrong encoding", ":5: not UTF-8 (0xe9 at column 5)"),
    (b'2,"a"b\n', "bad CSV", ":3: not a CSV record"),
    (b"2,a\rb\n", "bad CSV", ":3: not a CSV record"),
])
def test_a_bad_record_of_a_table_does_not_hide_the_good_ones(tmp_path, monkeypatch, bad, reason, says):
    monkeypatch.setattr(readers, "LARGEST_LINE", 1000)
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,one\n" + bad + b'3,"three\n3"\n')
    first, problem, last = read(tmp_path / "a.csv")
    assert (first.text, last.text, last.ordinal) == ("one", "three\n3", 2)
    assert problem.reason == reason and f"a.csv{says}" in problem.message


@pytest.mark.parametrize("rest", [b"", b"3,three\n" * 200])
def test_where_a_table_cannot_be_read_on_the_sentence_says_so(tmp_path, monkeypatch, rest):
    monkeypatch.setattr(readers, "LARGEST_LINE", 1000)
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,one\n2,"two\n' + rest)
    first, problem = read(tmp_path / "a.csv")
    assert first.text == "one" and problem.reason == "bad CSV"
    assert "a.csv:3: not a CSV record (a quote is not closed" in problem.message
    assert "the rest of the file is left out" in problem.message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_an_integer_of_any_length_does_not_hide_the_text_beside_it(tmp_path, name):
    record = b'{"text": "one", "n": ' + b"1" * 5000 + b"}"
    (tmp_path / name).write_bytes(record + b"\n" if name == "a.jsonl" else b"[" + record + b"]")
    assert [document.text for document in read(tmp_path / name)] == ["one"]
    [problem] = read(tmp_path / name, text_field="n")
    assert problem.reason == "wrong field" and "field 'n' is a number, not text" in problem.message


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_row_that_is_not_utf8_does_not_hide_the_good_ones(tmp_path, name):
    offsets, data = pa.py_buffer(np.array([0, 3, 6, 9], np.int32)), pa.py_buffer(b"onex\xff\xfetwo")
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    first, problem, last = read(tmp_path / name)
    assert (first.text, last.text, last.ordinal) == ("one", "two", 2)
    assert problem.reason == "wrong encoding" and f"{name}: row 1: column 'text' is not UTF-8 (0xff at byte 1)" in problem.message


def test_an_encrypted_zip_is_a_sentence(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[6] |= 1  # the flags of the member, there and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    [problem] = read(tmp_path / "a.zip")
    assert problem.reason == "damaged" and "encrypted" in problem.message


def test_a_bad_member_of_an_archive_does_not_hide_the_good_ones(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.txt", "b.txt", "./c.txt", "e.txt.bz2", "é.txt"):
            archive.writestr(name, f"the text of {name}")
    data = (tmp_path / "a.zip").read_bytes().replace(b"text of b.txt", b"TEXT of b.txt")  # no longer what its checksum says
    (tmp_path / "a.zip").write_bytes(data.replace("é.txt".encode(), b"\xff\xff.txt", 1))  # the name before the member alone
    found = read(tmp_path / "a.zip")
    assert [item.text for item in found if isinstance(item, Document)] == ["the text of ./c.txt", "the text of a.txt"]
    problems = [item for item in found if isinstance(item, Unreadable)]
    assert [(item.reason, item.message.partition(":")[0]) for item in problems] == [
        ("damaged", f"{tmp_path}/a.zip!{name}") for name in ("b.txt", "e.txt.bz2", "é.txt")]


def test_what_macos_and_git_hide_in_an_archive_is_not_read_and_a_name_that_occurs_twice_is_read_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "first")
        archive.writestr("__MACOSX/._a.txt", b"\0\5\x16\7\0")
        archive.writestr("x/.git/b.txt", "hidden")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.txt", "second")
    assert [document.text for document in read(tmp_path / "a.zip")] == ["first", "second"]


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
def test_a_compressed_archive_is_read_like_any_other(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "made", "w") as archive:
        archive.writestr("a.txt", "text")
    (tmp_path / f"a.zip{compression}").write_bytes(compress((tmp_path / "made").read_bytes(), compression))
    assert [document.text for document in read(tmp_path / f"a.zip{compression}")] == ["text"]


@pytest.mark.parametrize(("name", "data", "texts"), [
    ("a.txt", b"some text\0 and more of it", ["some text\0 and more of it"]),
    ("a.jsonl", b'{"text": "the first"}\n{"text": "a stray \0 here"}\n{"text": "the last"}\n', ["the first", None, "the last"]),
    ("a.csv", b"id,text\n1,the first\n2,a stray \0 here\n3,the last\n", ["the first", "a stray \0 here", "the last"]),
    ("a.html", b"<p>the first, and then a stray \0 here</p>", ["the first, and then a stray here"]),
    ("a.txt", b"\0" + b"x" * 4093 + "é".encode() + b"more", ["\0" + "x" * 4093 + "émore"]),  # 4 KiB end inside a character
])
def test_a_stray_nul_does_not_make_a_file_binary(tmp_path, name, data, texts):
    (tmp_path / name).write_bytes(data)
    found = [document.text if isinstance(document, Document) else None for document in read(tmp_path / name)]
    assert [text and " ".join(text.split()) if name == "a.html" else text for text in found] == texts


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_large_binary_file_is_one_sentence_however_it_is_cut(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "LARGEST_PLAIN", 1000)
    (tmp_path / name).write_bytes(b"\x89PNG\0\n" + b"an ASCII line in it\n" * 1000)
    [file] = list_files([SourceConfig(path=str(tmp_path / name))])
    [part] = scan(Part(((0, file),)), 2000)
    [problem] = read_documents(file, span=part.span)
    assert problem.reason == "binary" and part.span.stop is None


def test_a_bad_line_does_not_hide_the_good_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nnonsense\n\n{"text": "two"}\n')
    kinds = [type(item) for item in read(tmp_path / "a.jsonl")]
    assert kinds == [Document, Unreadable, Document]


@pytest.mark.parametrize(("path", "says"), [
    ("missing/*.txt", "data.sources[0]: no file matches"),
    ("builtin:pyton", "did you mean 'builtin:python'?"),
])
def test_sources_that_match_nothing_are_named(path, says):
    with pytest.raises(UserError, match="sources") as error:
        list_files([SourceConfig(path=path)])
    assert says in str(error.value)


def test_unknown_extensions_are_named_with_the_known_ones(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"x")
    for path in (tmp_path / "a.docx", tmp_path, tmp_path / "*"):
        with pytest.raises(UserError, match=r"known extension.*\.jsonl"):
            list_files([SourceConfig(path=str(path))])
