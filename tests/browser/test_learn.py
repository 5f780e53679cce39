"""The Learn view tells the ideas with the run's own numbers, and cites what docs/learn cites."""

import json
import math
from pathlib import Path

import pytest

from pellucid.observe.reader import Reader
from pellucid.observe.theatre import make_theatre

STEP = 31


@pytest.fixture(scope="module")
def play(runs):
    return json.loads(make_theatre(runs[0], STEP).read_text())


@pytest.fixture
def page(open_page, address, play):
    return open_page(f"{address}#view=learn&step={STEP}", wait="#idea-update ~ p b[data-value]")


def shown(page, idea: str) -> list[float]:
    section = page.locator(f"section[aria-labelledby='{idea}']")
    return [float(b.get_attribute("data-value")) for b in section.locator("[data-value]").all()]


def test_every_idea_has_this_runs_numbers(page, play, runs, feeds):
    with Reader(runs[0]) as reader:
        losses = reader.series("run", "loss", stream="run")[1]
        held_steps, held = reader.series("held-out", "loss", stream="evaluation")
        router = reader.frames("router", STEP - 1, STEP)[1][0]
        loads = router[:, [stat["name"] for stat in reader.stats("router")].index("load")]
    output = play["outputs"][-1]
    assert shown(page, "idea-forward")[-1] == output["p"]
    assert shown(page, "idea-loss")[:2] == [output["p"], output["loss"]]
    assert shown(page, "idea-loss")[2:5] == [pytest.approx(math.log(play["shape"]["vocab_size"])), losses[0], losses[STEP]]
    assert {float(loads.max()), float(loads.min())} <= set(shown(page, "idea-experts"))
    fan = play["layers"][-1]["fans"][str(len(play["tokens"]) - 1)]["experts"][0]
    edge, term = play["edges"][fan["terms"][0]["edge"]], fan["terms"][0]
    backward = shown(page, "idea-backward")
    assert backward[:3] == [fan["slope"], term["a"], pytest.approx(fan["slope"] * term["a"])] and backward[-1] == edge["gradient"]
    assert edge["before"] in shown(page, "idea-update") and edge["after"] in shown(page, "idea-update")
    stages = feeds[0].river.dataset.manifest["stages"]
    counts = [n for stage in stages for n in (stage["documents_in"], stage["documents_out"])]
    assert shown(page, "idea-data")[: len(counts)] == counts
    assert float(held[held_steps <= STEP][-1]) in shown(page, "idea-generalise")


def test_sources_and_formulas_are_those_of_the_docs(page):
    docs = {path.name: path.read_text() for path in (Path(__file__).parents[2] / "docs/learn").glob("*.md")}
    links = page.locator(".sources a").all()
    assert len(links) == 10
    for link in links:
        assert link.get_attribute("href") in docs["README.md"] and link.inner_text() in docs["README.md"]
    told = {"idea-loss": "2-loss.md", "idea-attention": "1-forward.md", "idea-backward": "3-backward.md", "idea-data": "6-data.md"}
    for idea, name in told.items():
        line = page.locator(f"section[aria-labelledby='{idea}'] .formula").inner_text().split("\n")[0]
        assert " ".join(line.split()) in " ".join(docs[name].replace("`", "").split()), (line, name)


def test_links_lead_to_the_views(page, play):
    page.get_by_role("link", name="Play it").click()
    page.wait_for_selector(".theatre .scene.phase-update")
    assert f"step={play['step']}" in page.url


def test_what_is_said_of_memorising_follows_from_the_losses(page, open_page, address, feeds):
    text = page.locator("#idea-generalise ~ p").nth(1)
    gained, held = shown(page, "idea-generalise")[-2:]
    assert 0 < gained < 6 and 0.5 < held <= 1 and "of that holds for new text" in text.inner_text()
    page.goto(f"{address}#view=learn&step=3")
    page.locator("section[aria-labelledby=idea-generalise]", has_text="Then nothing was learned yet.").wait_for()
    told = """async (cases) => { const m = await import("/page/views/learn.js"); return cases.map(m.verdict); }"""
    guessing = {"guess": {"value": 6.2, "label": "guessing"}}
    cases = [{**guessing, "out": 7e8, "train": 6e8, "first": 6.24},
             {"guess": {"value": 1, "label": "the mean"}, "out": 1.3, "train": 0.01, "first": 1.1},
             {"guess": None, "out": 0.5, "train": 0.4, "first": 0.5}, {"guess": None, "out": 0.5, "train": 0.4, "first": None},
             {**guessing, "out": "nan", "train": 2, "first": 6.3}]  # fmt: skip
    assert page.evaluate(told, cases) == [
        "Training is no better than guessing: there is nothing that could hold for new text.",
        *(f"On new text that is no better than {than}: what it gained on the training text, it only remembers."
          for than in ("always saying the mean", "the first measure")), "", ""]  # fmt: skip


def test_explanations_are_those_of_the_runs_settings(open_page, address, changed):
    def other(runs):
        for run in runs:
            run["config"]["optimizer"]["name"], run["config"]["training"]["balance_loss"] = "sgd", "none"
            run["config"]["data"]["cross_document_attention"] = True
        return runs

    page = open_page(address)
    section = lambda idea: page.locator(f"section[aria-labelledby='{idea}']").inner_text()
    for as_usual in (True, False):
        if not as_usual:
            changed(page, "runs", other)
        page.goto("about:blank")
        page.goto(f"{address}#view=learn&run=1")
        page.wait_for_selector("#idea-update")
        assert ("Adam keeps" in section("idea-update")) is ("Kingma" in section("idea-update")) is as_usual
        assert ("A balance loss keeps all of them in use" in section("idea-experts")) is as_usual
        assert ("or another document" in section("idea-attention")) is as_usual
