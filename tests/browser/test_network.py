"""The Network view: what it shows is what the play and the database hold; a step is played, chosen, made on request."""

import json
import re
import urllib.error
import urllib.request

import pytest

from pellucid.observe.reader import Reader
from pellucid.observe.theatre import make_theatre, theatre_path

STEP = 31  # the one before a checkpoint


@pytest.fixture(scope="module")
def play(runs):
    return json.loads(make_theatre(runs[0], STEP).read_text())


@pytest.fixture
def page(open_page, address, play):
    return open_page(f"{address}#view=network&step={STEP}", wait=".theatre .scene", reduced_motion="reduce")


def values(page, selector: str) -> list[float]:
    return [float(cell.get_attribute("data-value")) for cell in page.locator(f"{selector} [data-value]").all()]


def panel(page, title: str):
    return page.locator(f"section[aria-labelledby='{title}']")


def test_the_seven_phases_are_walked_with_buttons_and_arrow_keys(page, play, number):
    output, token = play["outputs"][-1], play["tokens"][-1]
    phases = page.locator(".stepper .phase")
    assert [p.inner_text().split()[-1] for p in phases.all()] == ["Input", "Forward", "Predict", "Loss", "Backward", "Update", "After"]
    phases.first.click()
    page.wait_for_selector(".scene.phase-input")
    assert f"tokens of row {play['row']}" in page.locator(".story").inner_text()
    for phase in ("forward", "predict", "loss", "backward", "update", "after"):
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(f".scene.phase-{phase}")
        if phase == "loss":
            formula = page.locator(".theatre .formula").inner_text()
            assert formula == f"loss = −ln p = −ln {number(output['p'])} = {number(output['loss'])}"
    page.keyboard.press("ArrowRight")
    assert "phase=6" in page.url, "the last phase stays"
    assert page.locator(".scene .loss").inner_html() == f"loss {number(output['loss'])} → {number(output['loss_after'])}"
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(".scene.phase-update")
    assert token["target_text"] is not None


def test_edges_and_tables_show_the_plays_numbers(page, play, number):
    fans = play["layers"][-1]["fans"][str(len(play["tokens"]) - 1)]
    kinds = {"expert": fans["experts"][0], "attention": fans["attention"], "router": fans["router"],
             "prediction": play["outputs"][-1]["fan"]}  # fmt: skip
    for key, fan in kinds.items():
        panel(page, "lens-title").locator(".choice button", has_text=re.compile(f"^{key}")).first.click()
        page.wait_for_selector(f".terms tfoot [data-value='{fan['value']!r}']")
        terms = [term["wa"] for term in fan["terms"]]
        shown = values(page, ".terms")
        assert shown[: len(terms)] == terms and shown[len(terms)] == fan["others"]["sum"] and shown[-1] == fan["value"]
        assert shown[-2] == pytest.approx(fan["value"], abs=1e-5 * (1 + sum(map(abs, terms))))
        assert page.locator(".terms tbody td.wa").all_inner_texts() == [number(v, True) for v in [*terms, fan["others"]["sum"]]]
    labels = page.locator(".scene .on-edge").all_text_contents()
    ordered = sorted(fans["experts"], key=lambda fan: fan["index"][0])
    assert labels == [number(term["wa"], True, 3) for fan in ordered for term in fan["terms"]]
    page.locator(".stepper .phase").nth(4).click()
    page.wait_for_selector(".scene.phase-backward")
    gradients = [play["edges"][term["edge"]]["gradient"] for fan in ordered for term in fan["terms"]]
    assert page.locator(".scene .on-edge").all_text_contents() == [number(g, True, 3) for g in gradients]


def test_a_clicked_edge_opens_its_derivation_and_proofs(page, play, number):
    fan = play["layers"][-1]["fans"][str(len(play["tokens"]) - 1)]["experts"][1]
    term = fan["terms"][2]
    edge = play["edges"][term["edge"]]
    page.locator(f".scene [data-edge='{term['edge']}'] .unit").dispatch_event("click")
    page.wait_for_url(re.compile(f"edge={term['edge']}"))
    place = f"{edge['tensor']}[{', '.join(map(str, edge['index']))}]"
    assert page.locator("#calculator-title + .answer .mono").inner_text() == place
    shown = values(page, ".derivation")
    assert shown[:4] == [edge["before"], term["a"], term["wa"], fan["slope"]] and shown[6:8] == [edge["gradient"], edge["clipped"]]
    assert shown[4] + shown[5] == pytest.approx(edge["gradient"], rel=1e-9)
    assert shown[8:11] == [edge["quantities"][name] for name in ("m", "v", "direction")]
    assert shown[11:-1] == list(edge["terms"].values()) and shown[-1] == edge["after"]
    marks = panel(page, "calculator-title").locator(".proofs b i").all_inner_texts()
    assert marks[0] == "✓" and marks[2] == "✓" and "✗" not in marks
    page.get_by_role("button", name="all digits").click()
    assert page.locator(".derivation .result td").last.inner_text() == number(edge["after"], digits=9)


def test_all_columns_of_a_sum_are_seen_on_a_laptop(page):
    page.set_viewport_size({"width": 1280, "height": 720})
    for choice in panel(page, "lens-title").locator(".choice button").all():
        choice.click()
        page.wait_for_selector(f".lens .choice [aria-pressed=true]:text-is('{choice.inner_text()}')")
        assert page.locator(".terms").evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")


def test_the_sum_of_one_experts_answer_does_not_lie_on_it(open_page, address, play):
    """The same play as if each token had gone to its first expert alone."""
    alone = json.loads(json.dumps(play))
    for layer in alone["layers"]:
        layer["router"] |= {key: [chosen[:1] for chosen in layer["router"][key]] for key in ("chosen", "gates")}
        for fans in layer["fans"].values():
            fans["experts"] = fans["experts"][:1]
    page = open_page(address, wait=None)
    page.set_viewport_size({"width": 1280, "height": 720})
    page.route("**/api/play?*", lambda route: route.fulfill(json=alone))
    page.goto(f"{address}#view=network&step={STEP}")
    page.wait_for_selector(".theatre .scene")
    answer, total = [rect.bounding_box() for rect in page.locator(".open-layer .sum rect").all()]
    apart = lambda at, size: abs(answer[at] - total[at]) >= answer[size]
    assert apart("x", "width") or apart("y", "height"), (answer, total)


def test_token_layer_and_head_are_chosen(page, play, number):
    page.locator(".under select").select_option("2")
    page.locator(".under .choice button", has_text="layer 0").click()
    page.locator(".under .choice button", has_text="head 1").click()
    page.wait_for_selector(".scene .zone:has-text('attention, head 1')")
    chosen = play["layers"][0]["router"]["chosen"][2]
    lit = [expert.locator("text").first.text_content() for expert in page.locator(".open-layer .expert.lit").all()]
    assert sorted(lit) == sorted(f"E{e}" for e in chosen)
    before, after = page.locator(".outcome tbody tr").first.locator("[data-value]").all()
    assert [float(c.get_attribute("data-value")) for c in (before, after)] == [losses[2] for losses in play["losses"]["tokens"]]


def test_the_live_picture_shows_the_recorded_loads(page, runs):
    panel(page, "live-title").get_by_role("button", name="table").click()
    with Reader(runs[0]) as reader:
        frames = reader.frames("router", STEP - 1, STEP)[1][0]
        column = [stat["name"] for stat in reader.stats("router")].index("load")
    region = "[aria-label='load and update of every expert']"
    assert values(page, region) == [float(value) for value in frames[:, column]]
    assert page.locator(".living .pick").count() == len(frames)


def test_a_step_without_a_play_is_made_on_request(open_page, address, runs):
    step = 18
    theatre_path(runs[0], step).unlink(missing_ok=True)
    page = open_page(f"{address}#view=network&step={step}", wait=".plays")
    page.get_by_role("button", name=f"play step {step}").click()
    page.wait_for_selector(f"h2:has-text('What happens in step {step}?')", timeout=240_000)
    assert json.loads(theatre_path(runs[0], step).read_text())["step"] == step


def test_only_the_page_itself_may_ask_for_a_play(address):
    request = urllib.request.Request(f"{address}api/stage?run=0&step=5", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400 and "only the dashboard's own page" in refused.value.read().decode()


def test_a_played_step_fits_its_frame(page):
    """All of the picture from 1024 pixels on; on a telephone it is scrolled, and the page is not."""
    page.set_viewport_size({"width": 1024, "height": 768})
    box = ".theatre .scene-box"
    page.wait_for_function("(box) => document.querySelector(box).scrollWidth <= document.querySelector(box).clientWidth", arg=box)
    right = lambda selector: max(place["x"] + place["width"] for place in map(lambda e: e.bounding_box(), page.locator(selector).all()))
    assert right(f"{box} .choice-row") <= right(box)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("(box) => document.querySelector(box).scrollWidth > document.querySelector(box).clientWidth", arg=box)
    page.wait_for_function("() => document.documentElement.scrollWidth <= 390")  # once everything is laid out anew
