"""`pellucid watch` on runs that live, were killed, are broken or not there: a sentence each, and no training disturbed."""

import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest

from pellucid.config import UserError
from pellucid.observe.reader import Reader
from pellucid.observe.store import Record, Row, Stat, Writer
from pellucid.observe.terminal import summarize
from pellucid.observe.web import server
from pellucid.observe.web.feed import Feed, answer
from pellucid.observe.web.report import _questions
from pellucid.run_files import Run
from pellucid.training.lock import only_trainer

from_cli = "from pellucid.cli import main; main()"


def get(address: str, path: str):
    with urllib.request.urlopen(address + path, timeout=20) as response:
        return response.read(), dict(response.headers)


@contextmanager
def watching(*arguments):
    """`pellucid watch` as a user starts it; gives (address, first lines)."""
    process = subprocess.Popen([sys.executable, "-c", from_cli, "watch", "--no-browser", *map(str, arguments)],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if "http://" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:\d+/", "".join(lines))
        assert found, "".join(lines)
        yield found[0], "".join(lines)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130, -2)


def make_run(folder, steps: int, config: str = ""):
    """A run directory whose telemetry is written here, step by step, as an observer does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config)
    writer = Writer(folder)
    writer.define("run", [Row("run")], [Stat("loss")], row_is="run")
    for step in range(steps):
        writer.write(Record(step, {"run": np.array([[1.0 / (step + 1)]], np.float32)}))
    writer.flush()
    return writer


def problem_of(*folders) -> str:
    with pytest.raises(UserError) as raised:
        list(map(Feed, folders))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_command_serves_the_page_with_a_strict_policy_and_passes_over_a_taken_port(runs):
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with watching(runs[0], "--port", port) as (address, said):
        assert f"port {port} is in use" in said and str(port) not in address
        body, headers = get(address, "")
        assert b'<div id="app">' in body
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'" and "unsafe" not in headers["content-security-policy"]
        assert json.loads(get(address, "api/runs")[0])[0]["latest"] == 47
        listening = subprocess.run(["ss", "-ltn"], capture_output=True, text=True, check=False).stdout if shutil.which("ss") else ""
        assert f"0.0.0.0:{address.split(':')[2][:-1]}" not in listening
        request = urllib.request.Request(address + "api/runs", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):  # a name that was made to point here
            urllib.request.urlopen(request)
    taken.close()


@pytest.mark.parametrize("arguments, sentence", [
    (["absent"], "absent: no such run directory"),
    (["."], "not a run directory"),
    ([], "there is no run under runs/"),
])  # fmt: skip
def test_the_command_refuses_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    from pellucid import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pellucid", "watch", "--no-browser", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_telemetry_of_a_newer_version_is_refused_by_its_number(tmp_path):
    writer = make_run(tmp_path / "run", 2)
    writer.set_meta({"schema_version": 99})
    writer.close()
    assert "schema 99" in problem_of(tmp_path / "run") and "newer Pellucid" in problem_of(tmp_path / "run")


def test_a_run_without_telemetry_says_so_and_a_half_written_one_is_tried_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    feed = Feed(folder)
    assert "has no telemetry" in feed.pulse()["problem"]
    (folder / "run.sqlite").write_bytes(b"SQLite format 3\0half")
    assert "cannot be read" in feed.pulse()["problem"]
    (folder / "run.sqlite").unlink()
    make_run(folder, 3).close()
    assert feed.pulse() == {"step": 2, "event": 0, "files": [False, 0], "training": None, "problem": None}


def test_the_header_says_whether_a_process_trains_the_run_not_whether_it_is_quiet(open_page, tmp_path, serving):
    folder = tmp_path / "run"
    make_run(folder, 3).close()
    with sqlite3.connect(folder / "run.sqlite") as telemetry:
        telemetry.execute("UPDATE frame SET time = time - 300")
    says = lambda page, text: page.locator(".status").get_by_text(text).wait_for()
    with serving([Feed(folder)]) as address:
        page = open_page(address, wait=".status")
        says(page, "quiet since step 2")  # never trained here: nothing can be told
        with only_trainer(folder):
            says(page, "busy since step 2")
        says(page, "stopped at step 2")
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        says(page, "ended at step 2")


def test_the_page_waits_for_the_first_step_and_goes_on_by_itself(open_page, tmp_path, serving):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    with serving([Feed(folder)]) as address:
        page = open_page(address, wait=".banner")
        assert "has no telemetry" in page.locator(".banner").inner_text()
        writer = make_run(folder, 1)
        page.wait_for_selector("[data-step='0']")
        writer.write(Record(1, {"run": np.array([[0.25]], np.float32)}))
        page.wait_for_selector("[data-step='1']")
        page.locator(".where", has_text="0.2500").wait_for()  # its number comes just after its name
        writer.close()


def test_the_axis_of_a_run_of_one_step_ends_at_it(open_page, tmp_path, serving, chromium):
    make_run(tmp_path / "run", 1).close()
    with serving([Feed(tmp_path / "run")]) as address:
        page = open_page(address, wait=".nothing")
        page.evaluate("""window.drawn = [];
            const draw = CanvasRenderingContext2D.prototype.fillText;
            CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
                window.drawn.push(text); draw.call(this, text, ...rest); };
            null""")
        page.locator("nav .view-link", has_text="Learning").click()
        page.wait_for_function("window.drawn.length > 0")
        drawn = page.evaluate("window.drawn")
        assert "0" in drawn and "100" not in drawn, drawn


def test_a_locked_database_is_one_sentence_and_the_page_recovers(tmp_path, monkeypatch):
    monkeypatch.setattr("pellucid.observe.store.is_network", lambda folder: True)  # a journal that locks readers out
    writer = make_run(tmp_path / "run", 3)
    feed = Feed(tmp_path / "run")
    feed.reader.query("PRAGMA busy_timeout = 50")
    lock = sqlite3.connect(tmp_path / "run" / "run.sqlite", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    assert "busy" in feed.pulse()["problem"]
    with pytest.raises(UserError, match="busy"):
        answer([feed], "events", {"run": "0"})
    lock.execute("ROLLBACK")
    assert feed.pulse()["step"] == 2
    writer.close()


def test_a_network_file_system_is_looked_at_seldom_and_said(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run", 2).close()
    monkeypatch.setattr(server, "is_network", lambda folder: True)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    server.watch([tmp_path / "run"], open_browser=False)
    assert "network file system: looked at every 2 seconds" in capsys.readouterr().err


def damage(path, kept: int):
    content = bytearray(path.read_bytes())
    content[kept:] = os.urandom(len(content) - kept)
    path.write_bytes(content)


def test_a_damaged_database_is_one_sentence(tmp_path):
    make_run(tmp_path / "run", 400).close()
    damage(tmp_path / "run" / "run.sqlite", 16384)  # all but the first page
    problem = Feed(tmp_path / "run").pulse()["problem"]
    assert problem and "\n" not in problem and str(tmp_path / "run") in problem
    summary = summarize(tmp_path / "run")
    assert summary.step is None and str(tmp_path / "run") in summary.state


def test_what_is_damaged_later_is_one_sentence_in_the_report_and_leaves_the_other_runs_on_the_page(tmp_path):
    """The page that is asked for first is whole: the feed opens, and fails at a later question."""
    make_run(tmp_path / "well", 9).close()
    make_run(tmp_path / "run", 400).close()
    feed = Feed(tmp_path / "run")
    broken = sqlite3.DatabaseError("database disk image is malformed")
    broken.sqlite_errorcode = sqlite3.SQLITE_CORRUPT

    class Broken:
        def execute(self, query, *rest):
            if "FROM hist" in query or "FROM event WHERE id" in query:
                raise broken
            return whole.execute(query, *rest)

        def close(self):
            whole.close()

    whole, feed.reader._run = feed.reader._run, Broken()
    described = json.loads(answer([feed, Feed(tmp_path / "well")], "runs", {})[0])
    assert "damaged" in described[0]["problem"] and described[1]["problem"] is None and described[1]["latest"] == 8
    with pytest.raises(UserError, match=r"run\.sqlite: the telemetry file is damaged"):
        list(_questions(feed))


def test_a_run_begun_anew_shows_its_own_data_and_experts(tmp_path):
    make_run(tmp_path / "run", 3).close()
    feed = Feed(tmp_path / "run")
    river = feed.river
    feed._preferences = (3, {"of": "the run before"})
    assert feed.pulse()["step"] == 2 and feed.river is river
    shutil.rmtree(tmp_path / "run")
    make_run(tmp_path / "run", 2).close()
    assert feed.pulse()["step"] == 1
    assert feed.river is not river and feed._preferences == (None, {})


def test_a_run_begun_anew_in_the_same_place_is_opened_anew(tmp_path):
    make_run(tmp_path / "run", 9).close()
    feed = Feed(tmp_path / "run")
    assert feed.pulse()["step"] == 8
    shutil.rmtree(tmp_path / "run")
    assert "is gone" in feed.pulse()["problem"]
    make_run(tmp_path / "run", 2).close()
    assert feed.pulse()["step"] == 1


def test_a_copied_run_opens_where_its_data_is_missing(runs, tmp_path, open_page, serving):
    copy = tmp_path / "elsewhere"
    shutil.copytree(runs[0], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["data"]["directory"] = "/not/on/this/machine"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with serving([Feed(copy)]) as address:
        page = open_page(address)
        page.goto(address + "#view=river")
        page.wait_for_selector("text=The prepared data is not on this machine")
        names = [button.get_attribute("data-stage") for button in page.locator(".station").all()]
        assert names == ["read", "normalize", "length", "deduplicate", "split", "augment", "tokenize", "pack", "batch", "loop"]
        splits = Run(runs[0]).dataset().manifest["splits"]  # the counts come from the telemetry
        page.locator(".station[data-stage=split]").click()
        page.wait_for_selector(f".answer:has-text('{splits['validation']['documents']} document')")
        page.locator(".station[data-stage=tokenize]").click()
        page.wait_for_selector(".panel h2:has-text('How does text become numbers?')")
        assert f"{splits['train']['packing']['rows']:,} rows" in page.locator(".station[data-stage=pack]").inner_text()
        page.locator(".station[data-stage=pack]").click()
        page.wait_for_selector(".panel h2:has-text('How do documents fill the rows?')")
        page.goto(address + "#view=learning&step=20")
        page.wait_for_selector("text=The prepared data is not on this machine")


def test_a_killed_run_opens_with_every_step_it_wrote(tmp_path, runs):
    script = ("import sys, time, numpy as np\nfrom pellucid.observe.store import *\nw = Writer(sys.argv[1])\n"
              "w.define('run', [Row('run')], [Stat('loss')], row_is='run')\n"
              "for s in range(10**6):\n w.write(Record(s, {'run': np.array([[1.0]], np.float32)})); print(s, flush=True)")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 200:
            break
    feed = Feed(folder)  # while it lives
    assert feed.pulse()["step"] >= 198
    process.kill()
    process.wait()
    newest = Feed(folder).pulse()["step"]
    assert newest >= 199
    window, _ = answer([Feed(folder)], "window", {"run": "0", "stream": "run", "stat": "*"})
    assert json.loads(window[4 : 4 + int.from_bytes(window[:4], "little")])["shape"][1] == newest + 1


def test_a_step_whose_frames_were_all_thinned_out_is_told_by_the_sixteen_around_it(tmp_path):
    """Measured at every eighth step, of which the first of each hundred is kept: of the old ones around step 1059 there is none."""
    writer = make_run(tmp_path, 1)
    writer.define("param", [Row("a")], [Stat("size")], row_is="tensor", dense_steps=100, keep_every=100)
    for step in range(1, 2000, 8):
        writer.write(Record(step, {"param": np.array([[step]], np.float32)}))
    writer.close()

    def told(until: int):
        body = Feed(tmp_path).window("param", "size", until=until, newest=1)
        size = int.from_bytes(body[:4], "little")
        header = json.loads(body[4 : 4 + size])
        values = np.frombuffer(body[-4 * math.prod(header["shape"]) :], "<f4")
        return np.frombuffer(body, "<i4", 1, 4 + size)[0], dict(zip(header["parts"], values.tolist(), strict=True))

    first, parts = told(1059)
    assert (first, parts["mean"], parts["min"], parts["max"], parts["measured"]) == (1056, 1061, 1057, 1065, 2)
    assert told(1995) == (1993, {"value": 1993}), "a frame that is kept is told as it is"


def test_many_readers_never_disturb_the_writer(tmp_path, serving):
    """Readers that ask without pause, and one that goes away amid an answer: every step is written, none late by a lock."""
    writer = make_run(tmp_path / "run", 50)
    ended = threading.Event()
    with serving([Feed(tmp_path / "run")]) as address:
        def ask():
            while not ended.is_set():
                get(address, "api/window?run=0&stream=run&stat=*")
                get(address, "api/runs")

        def leave():
            while not ended.is_set():
                with socket.create_connection(("127.0.0.1", int(address.split(":")[2][:-1]))) as gone:
                    gone.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                    gone.recv(64)

        threads = [threading.Thread(target=target) for target in (ask, ask, leave)]
        [thread.start() for thread in threads]
        for step in range(50, 400):
            writer.write(Record(step, {"run": np.array([[1.0]], np.float32)}))
        writer.flush()
        ended.set()
        [thread.join() for thread in threads]
        assert json.loads(get(address, "api/runs")[0])[0]["latest"] == 399  # it still serves
    assert writer.error is None
    writer.close()
    with Reader(tmp_path / "run") as reader:
        assert len(reader.frames("run")[0]) == 400


def test_the_dashboard_says_what_is_missing_without_its_javascript(monkeypatch, tmp_path):
    monkeypatch.setattr(server, "VENDOR", tmp_path)
    with pytest.raises(UserError, match="preact"):
        server.check_assets()


def test_questions_that_make_no_sense_are_answered_with_a_sentence(feeds):
    for path, query in [("window", {"run": "7"}), ("window", {"run": "0", "stream": "nonsense", "stat": "loss"}),
                        ("window", {"run": "0"}), ("step", {"run": "0", "step": "x"}), ("nothing", {"run": "0"}),
                        ("document", {"run": "0", "split": "train", "index": "999999"}), ("capsule", {"run": "0", "step": "1"})]:
        with pytest.raises(UserError) as raised:
            answer(feeds, path, query)
        assert "\n" not in str(raised.value)
