"""Object storage and web servers as sources: real ones on this machine, and a proxy that makes them fail."""

import gzip
import http.client
import http.server
import io
import json
import random
import sys
import threading
import time
from contextlib import contextmanager

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killing import BLOCK_BYTES, TOKENS_PER_SHARD, contents, killed_often
from moto.server import ThreadedMotoServer

from pellucid.config import DataConfig, SourceConfig, UserError
from pellucid.data import blocks, remote, shards
from pellucid.data.build import prepare
from pellucid.data.document import Document
from pellucid.data.sources import list_files, read_documents
from pellucid.data.workers import InThisProcess, Processes

LINES = "".join(json.dumps({"text": f"text number {n} " * 30}) + "\n" for n in range(300)).encode()


class Proxy(http.server.BaseHTTPRequestHandler):
    """Hands requests on to the storage; the next fault of `faults`, if any, happens to a GET instead."""

    faults: list[str]
    target: tuple[str, int]
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        data = self.headers.get("Range") is not None or "a." in self.path
        fault = self.faults.pop(0) if self.faults and self.command == "GET" and data else None
        if fault == "503":
            return self.answer(503, [("Content-Length", "0")], b"")
        if fault == "reset":
            self.close_connection = True
            return self.connection.close()
        if fault == "slow":
            time.sleep(3)
            self.close_connection = True
            return self.connection.close()
        upstream = http.client.HTTPConnection(*self.target)
        upstream.request(self.command, self.path, headers=dict(self.headers))
        response = upstream.getresponse()
        body = response.read()
        left_out = ("transfer-encoding", "date")
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in left_out]
        if fault == "truncated":
            self.answer(response.status, headers, body[: len(body) // 2])
            self.close_connection = True
            return self.connection.close()
        return self.answer(response.status, headers, body if self.command == "GET" else b"")

    def answer(self, status, headers, body):
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve(handler, **attributes):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), attributes))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A moto S3 server with some files; (its port, a client)."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y"), ("AWS_DEFAULT_REGION", "us-east-1")):
            patch.setenv(name, value)
        patch.setattr(remote, "PAUSE", 0.01)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        port = server._server.server_address[1]
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket="texts")
        table = tmp_path_factory.mktemp("made") / "t.parquet"
        pq.write_table(pa.table({"text": [f"row {n} " * 20 for n in range(200)]}), table, row_group_size=20)
        for name, body in (("part/a.jsonl", LINES), ("part/b.jsonl.gz", gzip.compress(LINES)), ("c.txt", b"plain text\n"),
                           ("t.parquet", table.read_bytes()), ("picture.png", b"x")):
            client.put_object(Bucket="texts", Key=name, Body=body)
        yield port, client
        server.stop()


@contextmanager
def faulty(storage, faults):
    """Options for s3:// that go through a proxy with these faults."""
    with serve(Proxy, faults=faults, target=("127.0.0.1", storage[0])) as port:
        yield {"endpoint_url": f"http://127.0.0.1:{port}", "timeout": 1, "read_timeout": 1}


def read(path, options):
    files = list_files([SourceConfig(path=path, options=options)])
    return [file.uri for file in files], [item for file in files for item in read_documents(file)]


@pytest.mark.parametrize(("path", "uris", "count"), [
    ("s3://texts/part/a.jsonl", ["part/a.jsonl"], 300),
    ("s3://texts/part/*.jsonl*", ["part/a.jsonl", "part/b.jsonl.gz"], 600),
    ("s3://texts", ["c.txt", "part/a.jsonl", "part/b.jsonl.gz", "t.parquet"], 801),
    ("s3://texts/*.parquet", ["t.parquet"], 200),
])
def test_files_patterns_and_folders_of_object_storage(storage, path, uris, count):
    found, documents = read(path, {"endpoint_url": f"http://127.0.0.1:{storage[0]}"})
    assert found == [f"s3://texts/{uri}" for uri in uris]
    assert len(documents) == count and all(isinstance(document, Document) for document in documents)


@pytest.mark.parametrize("faults", [["503"], ["503"] * 4, ["reset", "503", "truncated"], ["truncated"] * 2, ["slow"]])
def test_passing_faults_of_a_storage_are_not_seen(storage, monkeypatch, faults):
    monkeypatch.setattr(remote, "RANGE_BYTES", 40_000)
    left = list(faults)
    with faulty(storage, left) as options:
        _, documents = read("s3://texts/part/a.jsonl", options)
    assert not left
    assert [document.text for document in documents] == [json.loads(line)["text"] for line in LINES.splitlines()]


def test_a_storage_that_stays_away_is_one_sentence_and_the_finished_part_is_kept(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(remote, "RANGE_BYTES", 40_000)
    faults: list[str] = []

    class Failing(InThisProcess):
        def do(self, jobs, setup):
            count = 0
            for report in super().do(jobs, setup):
                count += report[1][0] == "block"
                if count == 3 and not faults:
                    faults.extend(["503"] * 1000)
                yield report

    def configure(options):
        source = {"path": "s3://texts/part/a.jsonl", "options": options}
        return DataConfig(sources=[source], directory=str(tmp_path), tokenizer={"kind": "bytes"}, on_error="skip")

    with faulty(storage, faults) as options:
        config = configure(options)
        with pytest.raises(UserError, match=r"a.jsonl at byte \d+: the storage cannot be reached .*tried 5 times") as error:
            prepare(config, workers=Failing())
        assert "\n" not in str(error.value) and "the same command goes on" in str(error.value)
        [work] = tmp_path.iterdir()
        kept = {path: path.stat().st_mtime_ns for path in work.glob("blocks/*.docs")}
        assert len(kept) >= 3
        faults.clear()
        dataset = prepare(config, workers=InThisProcess())
    assert dataset.manifest["stages"][0]["documents_out"] == 300
    assert dataset.manifest["sources"][0]["uri"] == "s3://texts/part/a.jsonl" and dataset.manifest["sources"][0]["version"]


@pytest.mark.parametrize(("path", "says"), [
    ("s3://texts/none.jsonl", "no such file"), ("s3://nowhere/x.jsonl", "no such file or bucket"),
    ("s3://texts/*.jsonx", "no file matches"), ("s3://texts/picture.png", "known extension"),
    ("nonsense://x/y.txt", "cannot be read"),
])
def test_what_is_not_there_is_named(storage, path, says):
    with pytest.raises(UserError, match=r"data.sources\[0\]") as error:
        read(path, {"endpoint_url": f"http://127.0.0.1:{storage[0]}"} if path.startswith("s3") else {})
    assert says in str(error.value)


def test_nobody_listening_is_a_sentence(storage):
    with pytest.raises(UserError, match=r"data.sources\[0\].*the storage cannot be reached"):
        read("s3://texts/x.txt", {"endpoint_url": "http://127.0.0.1:9", "timeout": 1})


def test_credentials_are_refused_in_options_and_their_absence_is_a_sentence(storage, monkeypatch):
    for secret in ({"secret": "s"}, {"client_kwargs": {"aws_secret_access_key": "s"}}, {"account_key": "s"}, {"sessionToken": "s"},
                   {"client_kwargs": [{"headers": {"Authorization": "Bearer s"}}]}):
        with pytest.raises(ValueError, match=r"options\..*: credentials come from the environment"):
            SourceConfig(path="s3://a/b.txt", options=secret)
    with pytest.raises(ValueError, match="path: credentials come from the environment"):
        SourceConfig(path="https://name:s@example.org/b.txt")
    fine = {"endpoint_url": "http://127.0.0.1:9", "client_kwargs": {"region_name": "x", "headers": {"User-Agent": "me"}}, "anon": True}
    assert SourceConfig(path="s3://a/b@c.txt", options=fine).options == fine
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="credentials"):
        read("s3://texts/c.txt", {"endpoint_url": f"http://127.0.0.1:{storage[0]}", "read_timeout": 29})


def test_a_changed_object_is_built_anew_and_an_unchanged_one_is_not(storage, tmp_path):
    port, client = storage
    source = {"path": "s3://texts/changing.jsonl", "options": {"endpoint_url": f"http://127.0.0.1:{port}"}}
    config = DataConfig(sources=[source], directory=str(tmp_path), tokenizer={"kind": "bytes"}, sequence_length=16)
    body = LINES[:1000].rpartition(b"\n")[0]
    client.put_object(Bucket="texts", Key="changing.jsonl", Body=body)
    first = prepare(config)
    assert prepare(config).reused
    client.put_object(Bucket="texts", Key="changing.jsonl", Body=body.replace(b"text n", b"Text n"))
    second = prepare(config)
    client.delete_object(Bucket="texts", Key="changing.jsonl")
    assert not second.reused and second.directory != first.directory


@pytest.fixture(scope="module")
def google():
    """Options for a Google Cloud Storage emulator that holds a bucket."""
    from gcp_storage_emulator.server import create_server
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    address = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    client = storage.Client(project="x", credentials=AnonymousCredentials(), client_options={"api_endpoint": address})
    bucket = client.create_bucket("texts")
    for name, body in (("part/a.jsonl", LINES), ("part/b.jsonl.gz", gzip.compress(LINES)), ("c.txt", b"plain text\n")):
        bucket.blob(name).upload_from_string(body)
    yield {"endpoint_url": address, "anon": True}
    server.stop()


def test_files_patterns_and_folders_of_google_cloud_storage(google, monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "RANGE_BYTES", 40_000)
    everything = ["c.txt", "part/a.jsonl", "part/b.jsonl.gz"]
    for path, uris, count in (("gs://texts/part/a.jsonl", everything[1:2], 300), ("gs://texts/part/*.gz", everything[2:], 300),
                              ("gs://texts", everything, 601)):  # fmt: skip
        found, documents = read(path, google)
        assert found == [f"gs://texts/{uri}" for uri in uris]
        assert len(documents) == count and all(isinstance(document, Document) for document in documents)
    with pytest.raises(UserError, match="no such file or bucket"):
        read("gs://texts/none.jsonl", google)
    config = DataConfig(sources=[{"path": "gs://texts/part", "options": google}], directory=str(tmp_path), tokenizer={"kind": "bytes"})
    assert prepare(config, workers=Processes(2)).manifest["sources"][0]["version"] and prepare(config).reused


def test_a_build_from_object_storage_killed_often_goes_on_to_the_same_bytes(storage, tmp_path, monkeypatch):
    port, client = storage
    client.create_bucket(Bucket="kill")
    rng = random.Random(3)
    words = ["river", "数据", "seven", "walks"]
    lines = [json.dumps({"text": f"{n} {' '.join(rng.choices(words, k=40))}"}) + "\n" for n in range(700)]
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {n} " * 20 for n in range(900)]}), table, row_group_size=50)
    head = "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: text/plain\r\nContent-Length: "
    web = "".join(f"{head}{len(page)}\r\n\r\n{page}\r\n\r\n" for page in (f"page {n} " * 30 for n in range(300)))
    for name, body in (("a.jsonl", "".join(lines).encode()), ("b.jsonl.gz", gzip.compress("".join(lines[::-1]).encode())),
                       ("t.parquet", table.getvalue()), ("w.warc.gz", gzip.compress(web.encode()))):  # fmt: skip
        client.put_object(Bucket="kill", Key=name, Body=body)
    config = DataConfig(sources=[{"path": "s3://kill", "options": {"endpoint_url": f"http://127.0.0.1:{port}"}}], sequence_length=64,
                        directory=str(tmp_path / "data"), tokenizer={"kind": "bytes"})
    assert killed_often(config, tmp_path, 2, kills=5, seed=1) >= 2
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(shards, "TOKENS_PER_SHARD", TOKENS_PER_SHARD)
    whole = prepare(config, directory=tmp_path / "whole", workers=InThisProcess())
    assert whole.manifest["stages"][0]["documents_out"] == 2600 and contents(whole.directory) == contents(tmp_path / "out")


class Web(http.server.BaseHTTPRequestHandler):
    """A web server without ranges that answers its first requests with `statuses`."""

    statuses: list[int]

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        status = self.statuses.pop(0) if self.statuses else 200
        body = LINES if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.mark.parametrize("status", [503, 429])
def test_a_busy_web_server_is_asked_again(monkeypatch, status):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    statuses = [status] * 3
    with serve(Web, statuses=statuses) as port:
        _, documents = read(f"http://127.0.0.1:{port}/folder/a.jsonl?version=3", {})
    assert len(documents) == 300 and not statuses


@pytest.mark.parametrize(("status", "says", "left"), [
    (404, "there is no such file", 98), (410, "there is no such file", 98), (403, "403", 98),
    (503, "cannot be reached .*503.*tried 5 times", 90),
])
def test_a_web_server_that_refuses_is_one_sentence(monkeypatch, status, says, left):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    statuses = [status] * 100
    with serve(Web, statuses=statuses) as port, pytest.raises(UserError, match=rf"data.sources\[0\].*a.jsonl': .*{says}") as error:
        read(f"http://127.0.0.1:{port}/a.jsonl", {})
    assert "\n" not in str(error.value) and len(statuses) == left  # a HEAD and a GET each time


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/a.jsonl", "http://127.0.0.1:9/*.jsonl", "gs://texts/a.jsonl"])
def test_a_server_that_is_not_there_is_one_sentence_and_no_more(monkeypatch, path, capfd):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with pytest.raises(UserError, match=r"data.sources\[0\].*the storage cannot be reached .*127.0.0.1:9.*tried 5 times"):
        read(path, {"endpoint_url": "http://127.0.0.1:9", "anon": True} if path.startswith("gs") else {})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ranges", [True, False])
def test_web_servers_with_and_without_ranges(ranges, monkeypatch):
    monkeypatch.setattr(remote, "RANGE_BYTES", 40_000)

    class Ranges(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            wanted = self.headers.get("Range") if ranges else None
            first, _, last = (wanted or f"bytes=0-{len(LINES) - 1}").removeprefix("bytes=").partition("-")
            body = LINES[int(first) : int(last) + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(body)))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(LINES)}")
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with serve(Ranges) as port:
        _, documents = read(f"http://127.0.0.1:{port}/folder/a.jsonl", {})
    assert len(documents) == 300 and documents[-1].byte_end == len(LINES) - 1


def test_without_the_library_of_web_servers_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    for known in ("http", "https"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, known, raising=False)
    with pytest.raises(UserError, match=r"pip install 'pellucid\[remote\]'"):
        remote.list_remote("https://localhost/a.jsonl", (), "data.sources[0]")
