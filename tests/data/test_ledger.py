"""A build killed at any moment goes on mid-file, to the same bytes, with any number of workers; and says how it goes."""

import bz2
import contextlib
import gzip
import io
import json
import os
import random
import signal
import sys
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killing import BLOCK_BYTES, TOKENS_PER_SHARD, Steps, contents, killed_often, start
from pyarrow import feather
from warcio import warcwriter
from warcio.statusandheaders import StatusAndHeaders

from pellucid.config import DataConfig, UserError
from pellucid.data import blocks, readers, shards
from pellucid.data.blocks import BlockWriter, finished_block
from pellucid.data.build import prepare
from pellucid.data.document import Document
from pellucid.data.pipeline import Job
from pellucid.data.ray_workers import Ray
from pellucid.data.workers import TRIES, InThisProcess, Processes

WORDS = "the of and a house river letters seven green walking quickly météo 数据 😀 through under".split()


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + "\n"


def crawl(rng: random.Random, pages: int) -> bytes:
    """A compressed WARC file, with the records that crawlers write between those with pages."""
    out = io.BytesIO()
    writer = warcwriter.WARCWriter(out, gzip=True)
    for n in range(pages):
        page = f"<html><body><nav>menu</nav><p>{text(rng, rng.randrange(1, 90))}</p></body></html>".encode()
        head = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
        when = {"WARC-Date": "2026-01-01T00:00:00Z", "WARC-Record-ID": f"<urn:uuid:{n}>"}
        for kind in ("request", "response"):
            writer.write_record(writer.create_warc_record(
                f"http://x/{n}", kind, payload=io.BytesIO(page if kind == "response" else b""), warc_headers_dict=when,
                http_headers=head if kind == "response" else StatusAndHeaders("GET / HTTP/1.1", [], is_http_request=True)))
    return out.getvalue()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Every way of reading: plain text in pieces, jsonl by spans, compressed jsonl, tables, archives, a crawl, many small files."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(1)
    (folder / "a.txt").write_text("".join(text(rng, 20) for _ in range(800)))
    lines = [json.dumps({"text": text(rng, rng.randrange(1, 120))}) + "\n" for _ in range(600)]
    (folder / "b.jsonl").write_text("".join(lines[:300]) + "nonsense\n" + "".join(lines[300:]))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[::-1]).encode()))
    rows = pa.table({"text": [text(rng, 60) for _ in range(400)]})
    pq.write_table(rows, folder / "d.parquet", row_group_size=50)
    feather.write_feather(rows, str(folder / "e.feather"), chunksize=40)
    (folder / "f.csv.bz2").write_bytes(bz2.compress(("text\n" + "".join(text(rng, 30) for _ in range(200))).encode()))
    with zipfile.ZipFile(folder / "g.zip", "w") as archive:
        archive.writestr("inner.jsonl", "".join(lines[:150]))
        archive.writestr("other.txt", text(rng, 4000))
    (folder / "h.warc.gz").write_bytes(crawl(rng, 150))
    (folder / "small").mkdir()
    for n in range(40):
        (folder / "small" / f"{n:02}.md").write_text(text(rng, rng.randrange(1, 200)))
    sources = [str(folder / "*.*"), str(folder / "small"), {"path": str(folder / "b.jsonl"), "max_documents": 77}]
    return DataConfig(sources=sources, directory=str(folder / "data"), sequence_length=64, on_error="skip",
                      tokenizer={"kind": "bpe", "vocab_size": 400}, validation_fraction=0.05)


@pytest.fixture(scope="module")
def expected(config, tmp_path_factory):
    """The unbroken build, by one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)
        patch.setattr(shards, "TOKENS_PER_SHARD", TOKENS_PER_SHARD)
        dataset = prepare(config, directory=tmp_path_factory.mktemp("whole") / "out", workers=InThisProcess())
    found = contents(dataset.directory)
    assert len([name for name in found if name.endswith(".tok")]) >= 3
    assert dataset.manifest["stages"][0]["dropped"] == {"bad JSON": 1}
    return found


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(config, expected, tmp_path, workers):
    process = start(config, tmp_path, workers)
    assert process.wait(timeout=120) == 0
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_a_dozen_times_it_goes_on_to_the_same_bytes(config, expected, tmp_path, workers):
    assert killed_often(config, tmp_path, workers, kills=12, seed=workers) >= 4
    assert contents(tmp_path / "out") == expected


def test_what_is_finished_is_not_read_again(config, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(shards, "TOKENS_PER_SHARD", TOKENS_PER_SHARD)
    done = []

    class Interrupted(InThisProcess):
        def do(self, jobs, setup):
            for number, (kind, value) in super().do(jobs, setup):
                if kind == "block":
                    done.append(value.name)
                    if len(done) == 17:
                        raise KeyboardInterrupt
                yield number, (kind, value)

    with pytest.raises(KeyboardInterrupt):
        prepare(config, directory=tmp_path / "out", workers=Interrupted())
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".out.building/blocks").glob("*.json"))) == 17
    first = set(done)
    dataset = prepare(config, directory=tmp_path / "out", workers=Interrupted())
    assert len(done) == len(set(done)) > 30 and first < set(done)
    assert contents(dataset.directory) == expected


def test_a_changed_file_alone_is_read_again(config, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": "some words here " * 100}) * 0 + "".join(
            json.dumps({"text": f"{name} {n} some words here " * 20}) + "\n" for n in range(100)))
    with open(folder / "b.jsonl", "a") as file:
        file.write("nonsense\n")
    settings = DataConfig(sources=[str(folder)], directory=str(tmp_path / "data"), tokenizer={"kind": "bytes"})
    with pytest.raises(UserError, match=r"b.jsonl:101: not a JSON object.*kept in .*building: the same command goes on"):
        prepare(settings, workers=InThisProcess())
    [work] = (tmp_path / "data").iterdir()
    kept = {p.name for p in work.glob("blocks/*.docs")}
    (folder / "b.jsonl").write_text((folder / "b.jsonl").read_text().removesuffix("nonsense\n"))
    seen = []

    class Watched(InThisProcess):
        def do(self, jobs, setup):
            for number, (kind, value) in super().do(jobs, setup):
                if kind == "block":
                    seen.append(value.path.name)
                yield number, (kind, value)

    dataset = prepare(settings, workers=Watched())
    assert len(kept) >= 2 and seen and not kept & set(seen)
    assert dataset.manifest["splits"]["train"]["documents"] + dataset.manifest["splits"]["validation"]["documents"] == 200


def documents_of(*numbers: int) -> str:
    return "".join(json.dumps({"text": text(random.Random(n), 60)}) + "\n" for n in numbers)


CHANGES = {
    "changed": lambda folder: (folder / "b.jsonl").write_text(documents_of(*range(260, 380))),  # what a repeated is in no b now
    "added before": lambda folder: (folder / "0.jsonl").write_text(documents_of(*range(40), *range(500, 560))),
    "removed": lambda folder: (folder / "b.jsonl").unlink(),
    "one text file becomes two": lambda folder: (folder / "b.txt").write_text(text(random.Random(999), 9000)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sources_that_changed_since_a_build_was_killed_give_the_bytes_of_a_clean_build(tmp_path, monkeypatch, change):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(readers, "LARGEST_PLAIN", 5000)
    folder = tmp_path / "sources"
    folder.mkdir()
    if change == "one text file becomes two":
        (folder / "a.txt").write_text("".join(text(random.Random(n), 60) for n in range(200)))
    else:
        for name, numbers in {"a": range(0, 150), "b": range(100, 220), "c": range(300, 420)}.items():
            (folder / f"{name}.jsonl").write_text(documents_of(*numbers))
    config = DataConfig(sources=[str(folder / "*.*")], sequence_length=64, tokenizer={"kind": "bpe", "vocab_size": 320},
                        validation_fraction=0.1, deduplicate={"exact": True}, decontaminate={"held_out": True})

    class Killed(InThisProcess):
        def do(self, jobs, setup):
            for number, report in super().do(jobs, setup):
                yield number, report
                if report[0] == "tokens" and len(list((setup.folder / "tokens").glob("[!.]*.json"))) == 2:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, directory=tmp_path / "out", workers=Killed())
    assert (tmp_path / ".out.building").is_dir()
    CHANGES[change](folder)
    again = prepare(config, directory=tmp_path / "out", workers=InThisProcess())
    clean = prepare(config, directory=tmp_path / "clean", workers=InThisProcess())
    assert contents(again.directory) == contents(clean.directory)


def test_a_worker_that_dies_is_replaced(config, expected, tmp_path):
    process = start(config, tmp_path, 2)
    killed: set[int] = set()
    while process.poll() is None and len(killed) < 2:
        with contextlib.suppress(OSError):
            tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
            for child in {int(pid) for task in tasks for pid in task.read_text().split()} - killed:
                time.sleep(0.15)
                os.kill(child, signal.SIGKILL)
                killed.add(child)
                break
    assert process.wait(timeout=120) == 0 and killed
    assert contents(tmp_path / "out") == expected


class DiesOnce:
    """Runs a job in a worker that is killed once, right after the job's third block (a file in `folder` remembers)."""

    def __init__(self, job, folder: Path):
        self.job, self.folder = job, folder

    def run(self, setup):
        (self.folder / f"worker-{os.getpid()}").touch()
        blocks_done = 0
        for report in self.job.run(setup):
            yield report
            blocks_done += report[0] == "block"
            if blocks_done == 3 and not (self.folder / "killed").exists():
                (self.folder / "killed").touch()
                time.sleep(0.3)  # until the caller has heard
                os.kill(os.getpid(), signal.SIGKILL)

    def after(self, report):
        return DiesOnce(self.job.after(report), self.folder)


def test_a_worker_that_dies_in_the_middle_of_a_file_loses_no_block_and_repeats_none(config, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, str(Path(__file__).parent)]))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(shards, "TOKENS_PER_SHARD", TOKENS_PER_SHARD)
    found = []

    class Watched(Processes):
        def do(self, jobs, setup):
            for number, (kind, value) in super().do([DiesOnce(job, tmp_path) for job in jobs], setup):
                found.extend([value.name] if kind == "block" else [])
                yield number, (kind, value)

    dataset = prepare(config, directory=tmp_path / "out", workers=Watched(1))
    assert (tmp_path / "killed").exists() and len(found) == len(set(found))
    assert contents(dataset.directory) == expected


@pytest.fixture
def ray_here(monkeypatch):
    """Ray, for a cluster of two small workers on this machine that knows the jobs of this file; stopped afterwards."""
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray
    ray.shutdown()


def test_a_ray_cluster_that_loses_a_worker_writes_the_same_bytes(ray_here, config, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(shards, "TOKENS_PER_SHARD", TOKENS_PER_SHARD)

    class Watched(Ray):
        def do(self, jobs, setup):
            return super().do([DiesOnce(job, tmp_path) for job in jobs], setup)

    dataset = prepare(config, directory=tmp_path / "out", workers=Watched("local", 2))
    assert (tmp_path / "killed").exists() and len(list(tmp_path.glob("worker-*"))) >= 3  # two, and one instead of the dead
    assert contents(dataset.directory) == expected
    with pytest.raises(UserError, match=r"b.jsonl:301: not a JSON object"):
        prepare(config.model_copy(update={"on_error": "stop"}), directory=tmp_path / "other", workers=Ray("local", 2))


def test_no_ray_cluster_is_a_sentence(monkeypatch):
    with pytest.raises(UserError, match="ray job submit"):
        Ray("ray://somewhere:10001")
    with pytest.raises(UserError, match=r"--ray 127.0.0.1:9: no Ray cluster answers there .*refused"):
        list(Ray("127.0.0.1:9").do([Job()], None))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'pellucid\[ray\]'"):
        Ray("auto")


class Fatal(Job):
    """A job that kills its worker."""

    def run(self, setup):
        os.kill(os.getpid(), signal.SIGKILL)
        yield


class Faulty(Job):
    def run(self, setup):
        yield "position", 1
        raise ZeroDivisionError("ours")


def test_work_that_kills_every_worker_is_a_sentence_and_a_fault_of_ours_is_shown(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, str(Path(__file__).parent)]))
    with pytest.raises(UserError, match="a worker process died 3 times"):
        list(Processes(2).do([Fatal()], None))
    with pytest.raises(RuntimeError, match="ZeroDivisionError: ours"):
        list(Processes(1).do([Faulty()], None))


def test_a_worker_may_die_often_as_long_as_the_work_gets_on(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, str(Path(__file__).parent)]))
    reports = [value for _, (kind, value) in Processes(1).do([Steps(TRIES + 1)], None) if kind == "step"]
    assert len(reports) == TRIES + 1


def test_stopping_does_not_wait_for_work_that_says_nothing(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, str(Path(__file__).parent)]))
    reports = Processes(2).do([Steps(1, silent=True), Steps(1, silent=True)], None)
    next(reports)
    reports.close()  # as Ctrl-C does; the work would take ten minutes
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = {pid for task in tasks for pid in task.read_text().split()}
    assert not [pid for pid in children if "pellucid.data.worker" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize(("program", "says"), [("/bin/false", "exit code 1"), ("/nowhere/python", "No such file")])
def test_workers_that_cannot_start_are_a_sentence(monkeypatch, program, says):
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(UserError, match=f"a worker process died 3 times .*{says}"):
        list(Processes(1).do([Job()], Document("x" * (1 << 20), "", 0, 0, 0, 0)))


def test_two_builds_of_the_same_data_become_one(config, tmp_path):
    first, second = start(config, tmp_path, 1), start(config, tmp_path, 1)
    assert first.wait(timeout=120) == 0 and second.wait(timeout=120) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", "config.json"}


def test_a_block_exists_only_when_complete(tmp_path):
    writer = BlockWriter(tmp_path, "x")
    writer.add(Document("hello", "a.txt", 0, 0, 0, 5), b"hello", b"0" * 16)
    assert finished_block(tmp_path, "x") is None
    block = writer.finish(last=True)
    found = finished_block(tmp_path, "x")
    assert found.facts == block.facts and [document.text for document, _ in found] == ["hello"]
    block.path.write_bytes(block.path.read_bytes()[:-1])
    assert finished_block(tmp_path, "x") is None
    BlockWriter(tmp_path, "y").abandon()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.docs", "x.json"]


def test_a_cap_takes_the_first_documents_only(tmp_path):
    lines = "".join(json.dumps({"text": f"text number {n}"}) + "\n" for n in range(100))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(lines)
    for cap, count in (({"max_documents": 130}, 130), ({"max_bytes": 500}, 37)):
        config = DataConfig(sources=[{"path": str(tmp_path / "*.jsonl"), **cap}], directory=str(tmp_path / "data"),
                            sequence_length=8, validation_fraction=0, tokenizer={"kind": "bytes"})
        split = prepare(config).train
        texts = [split.document(n)["text"] for n in range(split.reader.ends.size)]
        assert texts == [f"text number {n % 100}" for n in range(count)]


def test_progress_tells_documents_bytes_speed_and_what_was_dropped(config, tmp_path):
    said = []
    prepare(config, directory=tmp_path / "out", progress=lambda *call: said.append(call))
    reading = [detail for stage, *_, detail in said if stage == "reading"][-1]
    assert "documents" in reading and "MB/s" in reading and "dropped 1 bad JSON" in reading
    tokenizing = [detail for stage, *_, detail in said if stage == "tokenizing"][-1]
    assert "tokens" in tokenizing
