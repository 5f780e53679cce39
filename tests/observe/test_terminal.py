"""`watch --terminal`: what a summary says is what the file holds, at every stage of a run's life."""

import time

import numpy as np
import pytest
from rich.console import Console

from pellucid.config import UserError
from pellucid.observe.columns import INDEX, LAYER, PARAM, ROUTER, RUN
from pellucid.observe.store import MISSING, Record, Row, Writer
from pellucid.observe.terminal import BARS, summarize, watch_terminal
from pellucid.training.lock import only_trainer


def write_run(folder, losses, max_steps=None, events=()) -> Writer:
    writer = Writer(folder, meta={"max_steps": max_steps})
    for stream, rows, stats in (("run", 1, RUN), ("param", 2, PARAM), ("router", 4, ROUTER), ("layer", 1, LAYER)):
        writer.define(stream, [Row(f"{stream}{i}") for i in range(rows)], stats, row_is="x")
    for step, loss in enumerate(losses):
        frames = {s: np.full((rows, len(INDEX[s])), MISSING) for s, rows in (("run", 1), ("param", 2), ("router", 4), ("layer", 1))}
        set_ = lambda stream, name, value, frames=frames: frames[stream][..., INDEX[stream][name]].__setitem__(..., value)
        set_("run", "loss", loss)
        set_("run", "step_seconds", 0.5)
        set_("param", "update_ratio", [1e-9, 2e-3])
        set_("router", "load", [0.5, 1.75, 1, 0.75])
        set_("layer", "idle_experts", 1)
        writer.write(Record(step, frames, events=[e for e in events if e["step"] == step]))
    writer.flush()
    return writer


def shown(folders) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    watch_terminal(folders, once=True, console=console)
    return console.export_text()


def test_a_summary_holds_the_last_step_of_a_run_while_it_trains_and_after_it_was_killed(tmp_path, monkeypatch):
    alarm = {"step": 2, "rule": "loss_spike", "severity": "alarm", "subject": "run", "text": "loss 9", "detail": "{}"}
    writer = write_run(tmp_path / "one", [4.0, 3.0, 9.0, 2.5], max_steps=10, events=[alarm])
    s = summarize(tmp_path / "one")
    assert (s.state, s.step, s.max_steps, s.numbers["loss"]) == ("training", 3, 10, 2.5)
    assert (s.update_ratio, s.busiest, s.idle) == (pytest.approx(2e-3), 1.75, 1)
    assert s.trend == "▂▁█▁" and s.events[0]["rule"] == "loss_spike"
    assert "mfu" not in s.numbers and s.held_out is None, "not measured is absent"
    text = shown([tmp_path / "one"])
    assert "4 of 10 steps" in text and "step 4" not in text, "how many are done; their numbers begin with 0, as for `trace --step`"
    assert "step 2: loss_spike" in text and "2.5000" in text and max(map(len, text.splitlines())) <= 80
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 300)
    assert summarize(tmp_path / "one").state == "silent for 5 min"
    with only_trainer(tmp_path / "one"):  # a slow step
        assert summarize(tmp_path / "one").state == "training"
    monkeypatch.setattr(time, "time", lambda: now)
    assert summarize(tmp_path / "one").state == "stopped"
    writer.close()


def test_a_finished_run_and_one_not_begun_stand_side_by_side(tmp_path):
    write_run(tmp_path / "done", [3.0, 2.0], max_steps=2).close()
    (tmp_path / "new").mkdir()
    text = shown([tmp_path / "done", tmp_path / "new"])
    assert "done  finished" in text and "new  no telemetry yet" in text and "no alarms" in text
    with pytest.raises(UserError, match=r"absent: no such run"):
        watch_terminal([tmp_path / "absent"], once=True)


def test_no_spike_and_no_nan_is_lost_in_the_trend_of_a_long_run(tmp_path):
    losses = np.full(2300, 2.0)
    losses[700], losses[1900] = 50.0, np.nan
    write_run(tmp_path, losses).close()
    s = summarize(tmp_path)
    assert s.trend.count("x") == 1 and s.trend.count(BARS[-1]) == 1 and s.state == "training"
    assert s.trend.index(BARS[-1]) == 700 * 24 // 2300 and s.trend.index("x") == 1900 * 24 // 2300
