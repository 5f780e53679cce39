"""The report: one file, opened from the disk in a browser that has no network."""

import re

import numpy as np
import pytest

from pellucid.config import UserError
from pellucid.measure.outcome import section
from pellucid.observe.reader import Reader
from pellucid.observe.web import report
from pellucid.observe.web.report import write_report


@pytest.fixture(scope="module")
def file(runs, tmp_path_factory):
    return write_report(runs[0], tmp_path_factory.mktemp("report") / "run.html")


def test_report_is_one_small_file_that_names_no_other_host(file):
    text = file.read_text(encoding="utf-8")
    assert file.stat().st_size < report.BUDGET
    assert [p.name for p in file.parent.iterdir()] == ["run.html"]
    assert not re.findall(r"""(?:src|href)=["'](?!data:)(?!#)[^"']+""", text)


def test_every_view_of_the_report_works_offline_with_the_run_s_numbers(open_page, file, runs, number):
    page = open_page(file.as_uri(), wait=None, offline=True)
    page.wait_for_selector("main .panel")
    for link in page.locator("nav .view-link").all():
        link.click()
        page.wait_for_selector(f"main.view-{link.get_attribute('href').removeprefix('#view=')} .panel")
        page.wait_for_timeout(200)
    with Reader(runs[0]) as reader:
        steps, values = reader.series("embedding.weight", "update_ratio")
        _, losses = reader.series("run", "loss", stream="run")
    page.goto(file.as_uri() + "#tensor=embedding.weight&step=30")
    shown = page.locator(".inspector .value")
    assert shown.inner_text() == number(float(values[list(steps).index(30)]))
    page.goto(file.as_uri() + "#view=learning&step=30")
    assert f"loss is {number(float(losses[30]))} nats" in page.locator("#loss-title + .answer").inner_text()


def test_a_long_run_is_told_more_coarsely_within_the_budget(runs, tmp_path, open_page):
    whole = write_report(runs[0], tmp_path / "whole.html").stat().st_size
    assets = write_report(runs[0], tmp_path / "bare.html", budget=0).stat().st_size
    small = write_report(runs[0], tmp_path / "small.html", budget=assets + (whole - assets) // 3)
    assert small.stat().st_size <= assets + (whole - assets) // 3
    page = open_page(small.as_uri(), offline=True)
    assert page.locator(".field canvas").count() == 1


def test_a_report_of_a_long_run_says_which_steps_it_sums_up(long_run, tmp_path, open_page, number):
    """It holds the screen's columns alone, of 16 steps each; of the newest step it has the own numbers."""
    address = write_report(long_run.directory, tmp_path / "long.html").as_uri()
    shown = lambda rest: open_page(f"{address}#{rest}", offline=True).locator("#app").inner_text()
    of = lambda values: number(float(np.mean([values(step) for step in range(1504, 1520)])))
    learning = shown("view=learning&step=1505")
    assert f"On average over steps 1,504 to 1,519 the batch's loss is {of(long_run.loss)}" in learning
    assert f"On average over steps 1,504 to 1,519 the loss after 1 tokens of context is {of(long_run.position)}" in learning
    assert f"steps 1,504 to 1,519\nmean loss {of(long_run.loss)}" in learning
    assert "On average over steps 1,328 to 1,343 it moved by NaN" in shown("view=tensor&step=1337")
    assert f"At step 2,599 it moved by {number(long_run.ratio(2599))} of its size" in shown("view=tensor")
    learn = shown("view=learn&step=1505")
    assert "on average over steps 1,472 to 1,503" in learn
    assert f"The held-out loss was {number(long_run.held_out(1499))} nats per token after step 1,499" in learn


def test_what_was_measured_follows_the_dashboard(runs, tmp_path, open_page):
    chart = {"title": "t", "x": "x", "y": "y", "lines": [{"name": "n", "x": [1, 2], "y": [3, 4]}]}
    fragment = section({"name": "context", "title": "Use of <context>", "findings": ["It helps."], "charts": [chart], "tables": []})
    page = open_page(write_report(runs[0], tmp_path / "run.html", sections=[fragment]).as_uri(), wait=None, offline=True)
    page.wait_for_selector("main .panel")
    assert page.locator("#measure-context h2").inner_text() == "Use of <context>"
    assert page.locator("#measure-context svg circle").count() == 2
    box, app = page.locator("#measure-context").bounding_box(), page.locator("#app").bounding_box()
    assert box["y"] >= app["y"] + app["height"] - 1, "below, not over it"


def test_report_refuses_what_is_no_run_and_leaves_nothing_behind(tmp_path, runs):
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(runs[0], tmp_path / "file" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
