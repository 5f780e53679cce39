"""Results on disk: JSON any reader takes, pictures that are well-formed XML, sections for the report."""

import json
import math
from xml.etree import ElementTree

import pytest

from pellucid.config import UserError
from pellucid.measure.chart import WIDTH, draw
from pellucid.measure.outcome import Outcome, save, sections

SVG = "{http://www.w3.org/2000/svg}"
LINES = {"title": "a < b & c", "x": "x", "y": "y", "log_x": True, "level": ["chance", 0.5], "lines": [
    {"name": "one", "x": [1, 10, 100], "y": [0.1, None, 0.9], "low": [0.0, None, 0.8], "high": [0.2, None, 1.0]},
    {"name": "two", "points": True, "x": [10], "y": [0.4], "low": [0.3], "high": [0.5]}]}  # fmt: skip
HEAT = {"title": "heat", "x": "e", "rows": ["r", "s"], "columns": [0, 1, 2], "heat": [[1.0, -1.0, None], [0.5, 0.0, 0.2]]}


def outcome():
    return Outcome("context", "Title <b>", {"seed": 0}, ["It says <so>."], {"value": math.nan, "list": [math.inf, 1.0]},
                   [{"title": "t", "columns": ["a", "b"], "rows": [["x", 1234567], [None, 0.12345]]}], [LINES, HEAT])  # fmt: skip


def test_saved_results_are_strict_json_and_well_formed_pictures(tmp_path):
    path = save(outcome(), tmp_path / "new" / "folder")
    result = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["numbers"] == {"value": None, "list": [None, 1.0]} and result["settings"] == {"seed": 0}
    for number in (1, 2):
        assert ElementTree.parse(path.parent / f"context-{number}.svg").getroot().tag == f"{SVG}svg"
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".html", ".json", ".svg", ".svg"]


def test_sections_of_a_run_are_those_that_were_measured(tmp_path):
    save(outcome(), tmp_path / "measure")
    (fragment,) = sections(tmp_path)
    tree = ElementTree.fromstring(fragment)
    assert tree.tag == "section" and tree.find("p").text == "It says <so>."
    assert len(tree.findall(f"figure/{SVG}svg")) == 2
    assert [cell.text for cell in tree.findall("table/tr/td")] == ["x", "1,234,567", "–", "0.1235"]
    (tmp_path / "measure" / "context.json").write_text("{}")
    with pytest.raises(UserError, match=r"context\.json"):
        sections(tmp_path)


def test_points_lie_where_their_values_say():
    root = ElementTree.fromstring(draw({**LINES, "lines": LINES["lines"][:1]}))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.findall(f"{SVG}circle")]
    assert len(circles) == 2, "the missing value has no mark"
    (x1, y1), (x2, y2) = circles
    labels = {t.text: (float(t.get("x")), float(t.get("y"))) for t in root.findall(f"{SVG}text")}
    assert x1 == pytest.approx(labels["1"][0], abs=0.2) and x2 == pytest.approx(labels["100"][0], abs=0.2)
    assert labels["10"][0] == pytest.approx((x1 + x2) / 2, abs=0.2), "a logarithmic axis"
    scale = (labels["0.2"][1] - labels["0.8"][1]) / 0.6
    assert y1 - y2 == pytest.approx(0.8 * scale, abs=0.3)
    assert 0 < x1 < x2 < WIDTH and y2 < y1


def test_a_chart_without_spread_or_values_can_be_drawn():
    for xs, ys in (([3], [7]), ([], []), ([1, 2], [5, 5])):
        ElementTree.fromstring(draw({"title": "t", "x": "x", "y": "y", "lines": [{"name": "n", "x": xs, "y": ys}]}))


@pytest.mark.parametrize("top_left", [True, False])
def test_neither_the_legend_nor_a_level_s_name_lies_on_a_whisker(top_left):
    """Marks in a low row, whose whiskers reach into one upper corner; a level that the marks at its right end would cross."""
    reach = [0.9, 0.1] if top_left else [0.1, 0.9]
    line = {"name": "a name", "points": True, "x": [1, 10], "y": [0.1, 0.1], "low": [-0.1, -0.1], "high": reach}
    root = ElementTree.fromstring(draw({**LINES, "lines": [line], "level": ["none at all", 0.0]}))
    whisker = max((float(v) for p in root.findall(f"{SVG}path") if p.get("stroke-width") == "1.5"
                   for v in [p.get("d").split()[0][1:]]), key=lambda x: x if not top_left else -x)
    legend = next(r for r in root.findall(f"{SVG}rect") if r.get("opacity") == "0.75")
    name = next(t for t in root.findall(f"{SVG}text") if t.text == "none at all")
    left, wide = float(legend.get("x")), float(legend.get("width"))
    assert not (left - 6 <= whisker <= left + wide and float(legend.get("y")) < 100), "the tall whisker is free"
    at = [float(p.get("d").split()[0][1:]) for p in root.findall(f"{SVG}path") if p.get("stroke-width") == "1.5"]
    assert all(not float(name.get("x")) <= x <= float(name.get("x")) + 6.2 * len(name.text) for x in at)
