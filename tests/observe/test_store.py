"""run.sqlite keeps what it is given: through kills, zooming out, thinning, resuming and slow disks."""

import multiprocessing
import random
import sqlite3
import struct
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.config import UserError
from pellucid.observe import mounts, store
from pellucid.observe.reader import Reader, is_missing
from pellucid.observe.store import MISSING, Record, Row, Stat, Writer, reduce_frames, reduce_rollups

ROWS = [Row("a", layer=0, role="router", numel=4), Row("b", expert=1)]
STATS = [Stat("x", "1", meaning="an x"), Stat("y"), Stat("z")]


def open_writer(folder, meta=None, **kind) -> Writer:
    writer = Writer(folder, meta=meta)
    writer.define("param", ROWS, STATS, row_is="tensor", **kind)
    return writer


def frame(step: int) -> np.ndarray:
    return np.arange(6, dtype=np.float32).reshape(2, 3) + step


def test_frames_and_axes_come_back_as_written(tmp_path):
    writer = open_writer(tmp_path, meta={"hello": [1, 2]})
    for step in range(5):
        writer.write(Record(step, {"param": frame(step)}))
    writer.close()
    with Reader(tmp_path) as run:
        steps, frames = run.frames("param", since=1)
        assert steps.tolist() == [2, 3, 4] and (frames == np.stack([frame(s) for s in (2, 3, 4)])).all()
        steps, values = run.series("b", "y")
        assert values.tolist() == [4.0 + s for s in range(5)]
        assert run.meta["hello"] == [1, 2] and run.meta["schema_version"] == store.SCHEMA_VERSION
        assert [row["name"] for row in run.rows("param")] == ["a", "b"]
        assert run.stats("param")[0]["meaning"] == "an x"
        assert run._all("PRAGMA journal_mode")[0][0] == "wal" and run._all("PRAGMA page_size")[0][0] == 16384


def test_a_wrong_run_directory_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no run\.sqlite here"):
        Reader(tmp_path)
    (tmp_path / "run.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(UserError, match="telemetry"):
        Reader(tmp_path)
    with pytest.raises(UserError, match="telemetry"):
        Writer(tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True) | st.just(None), min_size=1, max_size=40),
    st.integers(1, 7),
)
def test_no_spike_and_no_nan_is_lost_in_any_rollup(values, chunk):
    """min, max of the finite values and the counts equal those of all values, however the values are cut up."""
    data = np.array([MISSING if v is None else v for v in values], dtype=np.float32).reshape(-1, 1, 1)
    levels = [reduce_frames(data[i : i + chunk]) for i in range(0, len(data), chunk)]
    low, high, mean, last, measured, nonfinite = reduce_rollups(np.stack(levels))[:, 0, 0]
    known = np.array([v for v in values if v is not None], dtype=np.float64)
    finite = known[np.isfinite(known)]
    assert measured == len(known) and nonfinite == len(known) - len(finite)
    assert data[-1].tobytes() == last.tobytes()
    if len(finite):
        assert low == finite.min() and high == finite.max()
        bound = 1e-5 * np.abs(finite).max() + 1e-37  # float32 rounding of each level's mean
        assert abs(mean - finite.mean()) <= bound
    else:
        assert is_missing(np.array([low, high, mean])).all()


def test_rollups_in_the_file_equal_those_of_all_frames_with_gaps_and_thinning(tmp_path):
    rng = np.random.default_rng(0)
    steps = [s for s in range(1200) if s % 7 != 3 and not 300 < s < 420]
    data = {s: rng.standard_normal((2, 3)).astype(np.float32) for s in steps}
    data[steps[500]][1, 2], data[steps[501]][0, 0], data[steps[700]][0, 1] = 1e9, np.nan, -np.inf
    writer = open_writer(tmp_path, dense_steps=100, keep_every=10)
    for s in steps:
        writer.write(Record(s, {"param": data[s]}))
    writer.close()
    with Reader(tmp_path) as run:
        kept, _ = run.frames("param")
        recorder = steps[-1] - store.RECORDER
        first = {s // 10: s for s in reversed(steps)}
        assert kept.tolist() == [s for s in steps if s <= 100 or s > recorder or s == first[s // 10]]
        assert_rollups_have_seen(run, data)
        for level in (1, 2, 3):
            buckets, parts = run.rollup("param", level)
            expected = buckets.tolist()
            for low, high in ((-1, 3), (1, expected[-1]), (2, expected[-1] + 5), (expected[-1], None)):
                some, their = run.rollup("param", level, low, high)
                inside = [i for i, b in enumerate(expected) if low < b <= (2**62 if high is None else high)]
                assert some.tolist() == [expected[i] for i in inside]
                np.testing.assert_array_equal(their, parts[inside])


def test_steps_that_are_measured_seldom_are_not_thinned_out_altogether(tmp_path):
    """Parameters at steps 7, 15, 23, ...: none of them is a tenth. What the experts' frames hold of them stays with them."""
    writer = open_writer(tmp_path, dense_steps=100, keep_every=10)
    writer.define("router", ROWS, STATS, row_is="expert", dense_steps=100, keep_every=10)
    for s in range(1200):
        writer.write(Record(s, ({"param": frame(s)} if s % 8 == 7 else {}) | {"router": frame(s)}))
    writer.close()
    with Reader(tmp_path) as run:
        kept = [s for s in run.frames("param")[0].tolist() if 100 < s <= 1199 - store.RECORDER]
        assert kept == list({s // 10: s for s in range(687, 100, -8)}.values())[::-1]
        beside = [s for s in run.frames("router")[0].tolist() if 100 < s <= 1199 - store.RECORDER]
        assert beside == sorted({*kept, *range(110, 688, 10)})


def assert_rollups_have_seen(run: Reader, data: dict[int, np.ndarray]) -> None:
    """All levels equal what the frames `data` (by step) give when reduced at once."""
    for level in (1, 2, 3):
        size = store.FAN**level
        buckets, parts = run.rollup("param", level)
        assert buckets.tolist() == sorted({s // size for s in data})
        for bucket, part in zip(buckets, parts, strict=True):
            whole = reduce_frames(np.stack([data[s] for s in sorted(data) if s // size == bucket]))
            for i in (0, 1, 3, 4, 5):
                np.testing.assert_array_equal(part[i], whole[i])
            np.testing.assert_allclose(part[2], whole[2], rtol=1e-5, atol=1e-6)  # float32 means of means


@pytest.mark.parametrize("point", [1005, 1008, 1024])
def test_rollups_have_seen_every_frame_after_a_resume_from_a_checkpoint_in_thinned_steps(tmp_path, point):
    """The spike and the NaN lie in frames that were thinned out long before the resume."""
    data = {s: frame(s) for s in range(1800)}
    data[1003][0, 0], data[1004][1, 1] = 1e5, np.nan
    writer = open_writer(tmp_path, keep_every=10)
    for s in data:
        if s == point:
            writer.flush()
            writer.resume_points = {500, point}
        writer.write(Record(s, {"param": data[s]}))
    writer.close()
    for stop in (point, point + 1, point + 300):
        writer = open_writer(tmp_path, keep_every=10)
        writer.resume_points = {500, point}
        writer.delete_after(point - 1)
        data = {s: data[s] if s < point else -frame(s) for s in range(stop)}
        for s in range(point, stop):
            writer.write(Record(s, {"param": data[s]}))
        writer.close()
        with Reader(tmp_path) as run:
            assert 985 not in run.frames("param")[0], "only the bucket that the checkpoint cuts is kept whole"
            assert_rollups_have_seen(run, data)


def test_a_rollup_that_lost_frames_to_a_resume_from_elsewhere_says_so_by_its_count(tmp_path):
    writer = open_writer(tmp_path, keep_every=10)
    for s in range(1800):
        writer.write(Record(s, {"param": frame(s)}))
    writer.delete_after(1004)
    for s in range(1005, 1100):
        writer.write(Record(s, {"param": frame(s)}))
    writer.close()
    with Reader(tmp_path) as run:
        buckets, parts = run.rollup("param", 1)
        counts = dict(zip(buckets.tolist(), parts[:, 4, 0, 0].tolist(), strict=True))
        assert counts.pop(1005 // 16) == 4, "1000 is left, 1005 to 1007 are new"
        assert set(counts.values()) == {16, 1100 % 16}
        assert run.rollup("param", 2)[1][1005 // 256, 4, 0, 0] == 256 - 12


ALARM = {"rule": "spike", "severity": "alarm", "subject": "a", "value": 9.0, "threshold": 1.0, "text": "!"}


def test_an_alarm_pins_the_flight_recorder(tmp_path):
    writer = open_writer(tmp_path, dense_steps=0, keep_every=100)
    for s in range(1, 1700):
        writer.write(Record(s, {"param": frame(s)}, events=[ALARM] if s == 900 else []))
    writer.close()
    with Reader(tmp_path) as run:
        kept = set(run.frames("param")[0].tolist())
        assert set(range(900 - 511, 901)) <= kept
        assert 950 not in kept and 1000 in kept and 201 not in kept and 388 not in kept
        assert run.events()[0]["step"] == 900 and run.events(since_id=1) == []


def test_a_resumed_run_keeps_the_frames_of_its_alarms_but_not_of_those_it_forgot(tmp_path):
    writer = open_writer(tmp_path, dense_steps=0, keep_every=100)
    for s in range(1, 1040):
        warning = {**ALARM, "severity": "warning"}
        writer.write(Record(s, {"param": frame(s)}, events=[ALARM] if s in (1000, 1030) else [warning] if s == 400 else []))
    writer.close()
    writer = open_writer(tmp_path, dense_steps=0, keep_every=100)
    writer.delete_after(1010)
    for s in range(1011, 1711):
        writer.write(Record(s, {"param": frame(s)}))
    writer.close()
    with Reader(tmp_path) as run:
        old = [s for s in run.frames("param")[0].tolist() if s <= 1710 - 512]
        assert old == [1, 100, 200, 300, 400, *range(1000 - 511, 1001), 1100]


def test_resuming_deletes_what_came_after_the_checkpoint(tmp_path):
    writer = open_writer(tmp_path)
    for s in range(40):
        writer.write(Record(s, {"param": frame(s)}, events=[{"rule": "r", "text": str(s)}]))
    writer.close()
    writer = open_writer(tmp_path)
    writer.delete_after(20)
    with Reader(tmp_path) as run:
        assert run.latest_step("param") == 20 and run.events()[-1]["step"] == 20
        assert run.rollup("param", 1)[0].tolist() == [0, 1]
    for s in range(21, 40):
        writer.write(Record(s, {"param": frame(s) * 2}))
    writer.close()
    with Reader(tmp_path) as run:
        steps, frames = run.frames("param")
        assert steps.tolist() == list(range(40)) and frames[30, 0, 0] == 60
        _, parts = run.rollup("param", 1)
        assert parts[1, 0, 0, 0] == 16 and parts[1, 1, 0, 0] == 62  # min before, max after the resume
    with pytest.raises(UserError, match="another model"):
        Writer(tmp_path).define("param", ROWS[:1], STATS, row_is="tensor")


def test_a_file_whose_stages_have_no_tokens_in_still_opens_and_can_be_resumed(tmp_path):
    run = sqlite3.connect(tmp_path / "run.sqlite")
    run.executescript("""CREATE TABLE stream (name TEXT PRIMARY KEY, rows INTEGER, columns INTEGER, row_is TEXT, about TEXT,
        dense_steps INTEGER, keep_every INTEGER);
        CREATE TABLE stage (id INTEGER PRIMARY KEY, name TEXT, documents_in INTEGER, documents_out INTEGER, bytes_in INTEGER,
        bytes_out INTEGER, tokens_out INTEGER, detail TEXT); INSERT INTO stage VALUES (0, 'read', 9, 8, 70, 60, NULL, '{}');""")
    run.close()
    with Reader(tmp_path) as run:
        assert run.stages()[0]["documents_in"] == 9 and run.stages()[0]["tokens_in"] is None
    writer = open_writer(tmp_path)
    writer.insert("INSERT INTO stage (id, name, tokens_in, tokens_out, detail) VALUES (?, ?, ?, ?, ?)", [(1, "pack", 5, 4, "{}")])
    writer.close()
    with Reader(tmp_path) as run:
        assert [(s["name"], s["tokens_in"], s["tokens_out"]) for s in run.stages()] == [("read", None, None), ("pack", 5, 4)]


def write_until_killed(folder, start, announced):
    """Steps from `start` on; each is announced when the writer has taken it."""
    writer = Writer(folder)
    writer.delete_after(start - 1)
    writer.define("param", [Row(str(i)) for i in range(266)], [Stat(str(i)) for i in range(24)], row_is="tensor")
    for step in range(start, 10**9):
        writer.write(Record(step, {"param": np.full((266, 24), step, np.float32)}, events=[{"rule": "r", "text": "t"}]))
        announced.send(step)


def test_thirty_kills_at_random_moments_lose_at_most_the_last_step_each_and_never_harm_the_file(tmp_path):
    rng, context = random.Random(3), multiprocessing.get_context("fork")
    start = 0
    for _ in range(30):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=write_until_killed, args=(tmp_path, start, there))
        process.start()
        there.close()
        last = here.recv()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        try:
            while True:
                last = here.recv()
        except EOFError:
            pass
        with Reader(tmp_path) as run:
            assert run._all("PRAGMA integrity_check")[0][0] == "ok"
            steps, frames = run.frames("param")
            assert steps.tolist() == list(range(len(steps))) and len(steps) >= last
            assert (frames == steps[:, None, None]).all() and len(run.events()) == len(steps)
            buckets, parts = run.rollup("param", 1)
            assert (parts[:, 0, 0, 0] == buckets * store.FAN).all(), "every rollup begins at its first step"
            assert parts[:, 4, 0, 0].sum() == len(steps), "and together they cover each step once"
        start = max(0, len(steps) - rng.randrange(3))


def test_network_file_systems_get_a_rollback_journal_and_batched_commits(tmp_path, monkeypatch):
    monkeypatch.setattr(mounts, "_mounts", lambda: [("/", "ext4"), (str(tmp_path), "nfs4")])
    assert mounts.is_network(tmp_path) and not mounts.is_network(tmp_path.parent)
    slow = threading.Event()
    monkeypatch.setattr(store.time, "sleep", lambda seconds: slow.wait(60))  # the second in which commits are gathered
    writer = open_writer(tmp_path)
    for s in range(50):
        writer.write(Record(s, {"param": frame(s)}))  # returns though nothing is in the file yet
    assert Reader(tmp_path).latest_step("param") is None, "the training thread does not wait for the network"
    slow.set()
    writer.close()
    with Reader(tmp_path) as run:
        assert run.latest_step("param") == 49 and run.meta["journal"] == "delete"
        assert run._all("PRAGMA journal_mode")[0][0] == "delete"


def test_a_failing_disk_stops_telemetry_not_training(tmp_path, capsys):
    writer = open_writer(tmp_path)
    writer.submit(lambda: 1 / 0)
    writer.write(Record(1, {"param": frame(1)}))
    writer.flush()
    assert "ZeroDivisionError" in writer.error and "training goes on" in capsys.readouterr().err
    writer.close()


def test_a_reader_during_training_sees_every_committed_frame(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(Record(0, {"param": frame(0)}))
    writer.flush()
    with Reader(tmp_path) as run:
        for s in range(1, 50):
            writer.write(Record(s, {"param": frame(s)}))
            writer.flush()
            assert run.latest_step("param") == s
    writer.close()


def test_plain_sql_decodes_every_kind_of_float(tmp_path):
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 300, dtype=np.uint32)
    special = [0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0x7F800000, 0xFF800000]
    bits[: len(special) + 2] = [*special, 0x7FC00000, store.MISSING_BITS]
    writer = Writer(tmp_path)
    writer.define("param", [Row(f"r{i}") for i in range(30)], [Stat(f"s{i}") for i in range(10)], row_is="tensor")
    writer.write(Record(3, {"param": bits.view(np.float32).reshape(30, 10)}))
    writer.close()
    run = sqlite3.connect(tmp_path / "run.sqlite")
    for row, stat, value, state in run.execute("SELECT row, stat, value, state FROM value WHERE stream = 'param'"):
        pattern = int(bits[int(row[1:]) * 10 + int(stat[1:])])
        (expected,) = struct.unpack("<f", struct.pack("<I", pattern))
        if np.isfinite(expected):
            assert value == expected and state == "finite"
        else:
            kind = "missing" if pattern == store.MISSING_BITS else str(expected).replace("inf", "+inf").replace("-+", "-")
            assert value is None and state == kind


def test_a_full_disk_is_one_sentence(tmp_path):
    writer = Writer(tmp_path)
    pages = writer._connection.execute("PRAGMA page_count").fetchone()[0]
    writer._connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(UserError, match=r"run\.sqlite: the disk is full; free some space"):
        writer.define("param", [Row(f"tensor {n}") for n in range(20_000)], STATS, row_is="tensor")
    writer.close()
