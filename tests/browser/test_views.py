"""Every view in a real browser: opened, used, and its numbers compared with the run's database."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

import pellucid
from pellucid.config import make_config
from pellucid.data.interchange import export_tokens, import_tokens
from pellucid.observe.reader import Reader
from pellucid.observe.trace import open_run
from pellucid.observe.web.feed import Feed
from pellucid.run import train
from pellucid.run_files import Run

VIEWS = ["xray", "network", "river", "experts", "learning", "verdicts", "tensor", "learn"]


@pytest.fixture(scope="module")
def reader(runs):
    with Reader(runs[0]) as found:
        yield found


def test_every_view_opens_from_its_link_and_from_its_address(open_page, address):
    page = open_page(address)
    links = page.locator("nav .view-link")
    keys = [link.get_attribute("href").removeprefix("#view=") for link in links.all()]
    assert keys == [view for view in VIEWS if view in keys] and len(keys) >= 6
    for position, key in enumerate(keys):
        links.nth(position).click()
        page.wait_for_selector(f"main.view-{key} .panel")
        assert key == "xray" or f"view={key}" in page.url
        page.reload()
        page.wait_for_selector(f"main.view-{key} .panel")
    page.go_back()
    page.wait_for_selector(f"main.view-{keys[-2]} .panel")


def test_xray_shows_the_recorded_value_of_a_cell(open_page, address, reader, number):
    tensor, step = "layers.1.attention.q_proj.weight", 20
    page = open_page(f"{address}#tensor={tensor}&step={step}&stat=gradient_norm")
    shown = page.locator(".inspector .value")
    steps, values = reader.series(tensor, "gradient_norm")
    recorded = float(values[list(steps).index(step)])
    assert float(shown.get_attribute("data-value")) == recorded
    assert shown.inner_text() == number(recorded)
    exactly = page.locator(".inspector dd").filter(has_text=re.compile(r"^[\d.e−]+$")).last.inner_text().replace("−", "-")
    assert np.float32(exactly) == np.float32(recorded)  # the shortest decimal that is this very float32


def test_xray_names_what_rows_too_low_for_names_are(open_page, serving, tmp_path):
    """A layer's roles, and the chosen row where a role's name would stand."""
    (tmp_path / "a.txt").write_text("the cat sees a dog. " * 200)
    many = {"model": {"hidden_size": 16, "num_hidden_layers": 4, "num_experts": 8, "num_attention_heads": 2},
            "data": {"sources": [str(tmp_path / "a.txt")], "directory": str(tmp_path / "data"), "sequence_length": 32,
                     "tokenizer": {"kind": "bytes"}},
            "training": {"max_steps": 2, "batch_size": 2, "precision": "fp32"}}  # fmt: skip
    train(make_config(many), run_dir=tmp_path / "run")
    with serving([Feed(tmp_path / "run")]) as found:
        page = open_page(f"{found}#tensor=layers.1.attention.q_proj.weight", wait=".gutter em")
        assert set(page.locator(".gutter em").all_inner_texts()) <= {"attention", "experts", "norms"}
        assert page.locator(".gutter b").all_inner_texts() == ["q_proj"]
        tops = sorted(page.locator(".gutter em, .gutter b").evaluate_all("all => all.map((e) => e.getBoundingClientRect().top)"))
        assert len(tops) > 8 and min(np.diff(tops)) >= 10


def test_xray_cells_are_chosen_zoomed_and_opened(open_page, address, reader):
    page = open_page(address)
    canvas = page.locator(".field canvas")
    box = canvas.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + 4)
    page.wait_for_url(re.compile("tensor=embedding.weight"))
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60, steps=4)
    page.mouse.up()
    page.wait_for_url(re.compile("from="))
    span = dict(part.split("=") for part in page.url.split("#")[1].split("&"))
    last = reader.latest_step()
    assert abs(int(span["from"]) - last * 0.25) <= 1 and abs(int(span["to"]) - last * 0.5) <= 1
    page.get_by_role("button", name="all steps").click()
    page.mouse.dblclick(box["x"] + box["width"] * 0.5, box["y"] + 4)
    page.wait_for_selector("main.view-tensor .panel")


def test_xray_colours_follow_the_recorded_values(open_page, address, reader):
    """Pixels of the canvas, read back: a brighter one is a larger value, on the fixed scale of the statistic."""
    page = open_page(f"{address}#stat=learning_rate")
    page.wait_for_selector('.field canvas[data-painted]')
    steps, rates = reader.series("embedding.weight", "learning_rate")
    colours = page.evaluate("""() => { const c = document.querySelector('.field canvas'), w = c.width;
        const d = c.getContext('2d').getImageData(0, 3, w, 1).data;
        return Array.from({length: w}, (_, x) => [d[4*x], d[4*x+1], d[4*x+2]]); }""")
    of = [colours[int((step + 0.5) / len(steps) * len(colours))] for step in steps]
    groups = {}
    for rate, colour in zip(rates.tolist(), of, strict=True):
        groups.setdefault(round(math.log10(rate), 3), set()).add(tuple(colour))
    assert all(len(found) == 1 for found in groups.values())
    green = [next(iter(groups[key]))[1] for key in sorted(groups)]
    assert green == sorted(green) and green[0] < green[-1]  # viridis grows greener


def test_keyboard_moves_through_the_xray_and_opens_a_tensor(open_page, address):
    page = open_page(address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator(".field canvas").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")  # from the last row, that of all parameters, past the final norm
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    page.wait_for_url(re.compile("step=1"))
    page.wait_for_selector(".heatmap [aria-live]:has-text('step 1')")
    assert re.match(r"layer 1, .* · step 1 · ", page.locator(".heatmap [aria-live]").inner_text())
    page.keyboard.press("Enter")
    page.wait_for_selector("main.view-tensor .panel")
    page.locator(".track input").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(re.compile("step=0|step=1"))


def test_two_runs_are_compared(open_page, address, runs):
    page = open_page(address)
    page.locator(".runs select").nth(1).select_option("1")
    page.wait_for_selector(f"h2:has-text('Where does {runs[0].name} differ from {runs[1].name}?')")
    page.locator("nav .view-link", has_text="Learning").click()
    page.wait_for_selector(f"figcaption:has-text('{runs[1].name}, training')")


def test_experts_show_the_recorded_loads(open_page, address, reader):
    step = 30
    page = open_page(f"{address}#view=experts&step={step}", wait=".ledger")
    frames = reader.frames("router", step - 1, step)[1][0]
    column = [stat["name"] for stat in reader.stats("router")].index("load")
    shown = [float(cell.get_attribute("data-value")) for cell in page.locator(".expert-cell").all()]
    assert shown == [float(value) for value in frames[:, column]]
    page.locator(".expert-cell").nth(5).click()
    page.wait_for_selector("h2:has-text('What about expert 1 of layer 1?')")
    for name in ("credit", "update / weight", "ghost share"):
        page.locator(".choice button", has_text=name).first.click()
        assert page.locator(".ledger").count() == 1
    assert {cell.get_attribute("data-value") for cell in page.locator(".expert-cell").all()} == {"0"}, "none moves without tokens"


def test_learning_shows_losses_documents_and_texts(open_page, address, reader, number):
    step = 33
    page = open_page(f"{address}#view=learning&step={step}", wait="#documents-title")
    steps, losses = reader.series("run", "loss", stream="run")
    loss = float(losses[list(steps).index(step)])
    assert f"the batch's loss is {number(loss)} nats" in page.locator("#loss-title + .answer").inner_text()
    recorded = reader.document_losses(step)
    cells = page.locator("[aria-label='documents of the step'] tbody tr td:nth-child(4)").all_inner_texts()
    assert cells[: len(recorded)] == [number(document["loss"]) for document in recorded]
    written = [event["step"] for event in reader.events() if event["rule"] == "text_sample"]
    assert written == [-1, 15, 31, 47]  # with each evaluation: before training, after 16 and 32 steps, at the end
    page.wait_for_selector("h3:has-text('before training')")
    shown = page.locator("[aria-label='texts the model wrote'] h3").all_inner_texts()
    assert shown == [f"after step {at}" for at in (47, 31, 15)] + ["before training"]
    held = reader.series("held-out", "loss", stream="evaluation")
    at = float(held[1][list(held[0]).index(31)])  # the newest at or before the selected step
    assert f"Held-out: {number(at)} after step 31" in page.locator("#loss-title + .answer").inner_text()
    page.locator("figure button", has_text="table").first.click()
    assert number(float(losses[-1])) in page.locator(".lines table").first.inner_text()


def test_a_space_that_was_not_expected_is_seen(open_page, address, reader, feeds):
    worst = reader.query("SELECT step, target FROM worst_token ORDER BY step")
    step = next(token["step"] for token in worst if feeds[0].river.token_text(token["target"]) == " ")
    page = open_page(f"{address}#view=learning&step={step}", wait=".worst mark")
    assert "␣" in page.locator(".worst mark").all_inner_texts()


def test_verdicts_tell_what_the_rules_found_and_open_the_documents(open_page, address, runs):
    page = open_page(f"{address}#view=verdicts&run=1", wait=".verdict")
    with Reader(runs[1]) as wild:
        found = {event["rule"] for event in wild.events() if event["severity"] in ("alarm", "warning")}
    assert found  # a learning rate of 0.3 is noticed
    titles = set(page.locator(".verdict h3").all_inner_texts())
    assert titles == {rule.replace("_", " ") for rule in found}
    page.locator(".verdict button", has_text="documents of step").first.click()
    page.wait_for_selector("main.view-learning #documents-title")


def test_tensor_shows_norms_and_histograms(open_page, address, reader, number):
    tensor = "layers.0.attention.k_proj.weight"
    page = open_page(f"{address}#view=tensor&tensor={tensor}&step=40", wait=".anatomy")
    steps, values = reader.series(tensor, "weight_norm")
    at = max(step for step in steps if step <= 40)
    last = "[...document.querySelectorAll('.anatomy li b')].at(-1)"
    page.wait_for_function(f"() => {last}.innerText !== '–'")  # the step's own values come after the page
    shown = page.locator(".anatomy li b").all_inner_texts()
    assert shown[-1] == number(float(values[list(steps).index(at)]))
    page.locator(".choice button", has_text="gradient").click()
    page.locator(".tensor-picker").select_option("embedding.weight")
    page.wait_for_selector("h2:has-text('How does token embedding change?')")


def test_river_counts_what_the_stages_counted(open_page, address, runs, feeds):
    manifest = feeds[0].river.dataset.manifest
    page = open_page(f"{address}#view=river", wait=".station")
    names = [button.get_attribute("data-stage") for button in page.locator(".station").all()]
    assert names == ["source", "read", "normalize", "length", "deduplicate", "split", "augment", "tokenize", "pack", "batch", "loop"]
    made = next(stage for stage in manifest["stages"] if stage["name"] == "augment")
    said = page.locator(".station[data-stage=augment]").inner_text()
    assert f"{made['documents_out']} versions" in said and f"+{made['bytes_out']:,} bytes" in said
    for stage in manifest["stages"]:
        page.locator(f".station[data-stage={stage['name']}]").click()
        page.wait_for_selector(".panel h2:has-text('did')")
        text = page.locator("#station-title + .answer").inner_text()
        assert f"{stage['documents_in']} " in text and f"{stage['documents_out']}" in text
    page.locator(".station[data-stage=length]").click()
    assert "too short" in page.locator(".station-detail").inner_text()
    page.locator(".station[data-stage=normalize]").click()
    assert "someone" in page.locator(".specimens").inner_text() or "␍" in page.locator(".specimens").inner_text()
    assert page.locator(".specimens del").count() > 0
    page.locator(".station[data-stage=pack]").click()
    page.wait_for_selector(".rows .row")
    assert page.locator(".rows .row").count() == 8


def test_river_ring_is_as_long_as_the_recorded_milliseconds(open_page, address, reader, number):
    page = open_page(f"{address}#view=river&stage=loop&step=20", wait="tr[data-phase]")
    frame = reader.frames("run", 19, 20)[1][0][0]
    names = [stat["name"] for stat in reader.stats("run")]
    for row in page.locator("tr[data-phase]").all():
        seconds = float(frame[names.index(row.get_attribute("data-phase"))])
        assert row.locator("td").nth(1).inner_text() == f"{number(seconds * 1000)} ms"


def test_river_follows_a_document_from_its_file_to_the_steps_that_read_it(open_page, address, feeds):
    split = feeds[0].river.dataset.split("train", 0)
    origins = split.reader.provenance(list(range(len(split.reader.lengths))))
    contact = next(i for i, origin in enumerate(origins) if "contact" in origin["source"] and not origin["augmentation"])
    page = open_page(f"{address}#view=river&document={contact}", wait=".journey")
    text = page.locator(".journey").inner_text()
    assert "contact.txt" in text and "<email>" in text
    assert "has the very hash that was trained on" in page.locator("#follow-title + .answer").inner_text()
    steps = split.steps_with(split.rows_of_document(contact), 48, 8)
    shown = [int(chip.removeprefix("step ")) for chip in page.locator(".journey .chip").all_inner_texts()]
    assert shown == steps[:40]
    version = next(i for i, origin in enumerate(origins) if origin["augmentation"])
    page.locator(".pager input").fill(str(version))
    page.evaluate("location.hash += '&step=3'")  # what is being typed outlives a new picture, as a live run draws five a second
    page.wait_for_timeout(100)
    page.locator(".pager input").press("Enter")
    page.wait_for_selector(".journey h3:has-text('Augment')")
    assert "has the very hash that was trained on" in page.locator("#follow-title + .answer").inner_text()


def test_epochs_are_those_of_the_data_in_every_view(open_page, address, changed):
    """A source of weight 2 makes an epoch of more rows than there are different ones."""
    page = open_page(address)
    changed(page, "river", lambda answer: answer | {"rows_per_epoch": 100})
    said = [("learning", ".epochs", "3.280 epochs"), ("river", ".station.loop", "3.28 epochs"),
            ("learn", "section[aria-labelledby=idea-data]", "3.28 epochs")]  # fmt: skip
    for view, place, epochs in said:
        page.goto(f"{address}#view={view}&step=40")
        page.locator(place, has_text=epochs).wait_for()


def test_a_document_read_often_lists_the_steps_around_the_chosen_one(open_page, address, changed):
    page = open_page(address)
    changed(page, "document", lambda answer: answer | {"steps": list(range(0, 2000, 2)), "step_count": 1000})
    page.goto(f"{address}#view=river&step=30")
    page.wait_for_selector(".journey .chip")
    assert page.locator(".journey .chip").all_inner_texts() == [f"step {step}" for step in range(0, 80, 2)]
    assert "1,000 steps of this run have read from it; the 40 around step 30:" in page.locator(".journey").inner_text()
    assert "It is read again in step 32." in page.locator("#follow-title + .answer").inner_text()


def test_two_runs_fit_a_telephone(open_page, address):
    page = open_page(address)
    page.set_viewport_size({"width": 390, "height": 800})
    for view, last in (("learning", "#written-title"), ("river", ".journey"), ("tensor", ".anatomy")):
        page.goto(f"{address}#view={view}")
        page.wait_for_selector(last)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
        link = page.locator("nav [aria-current]").bounding_box()
        assert link["x"] >= 0 and link["x"] + link["width"] <= 390, f"{view}: the chosen view is seen among the others"
    page.wait_for_function("() => [...document.querySelectorAll('.anatomy b')].at(-1).innerText !== '–'")
    assert page.evaluate("[...document.querySelectorAll('.anatomy b')].every((b) => b.scrollWidth <= b.clientWidth)"), "whole numbers"
    axis, hint = page.locator(".spread .step-axis").bounding_box(), page.locator(".spread .hint").bounding_box()
    assert hint["y"] >= axis["y"] + axis["height"]
    status = page.locator(".status").bounding_box()
    for picker in page.locator(".runs select").all():
        box = picker.bounding_box()
        assert status["y"] + status["height"] <= box["y"] or status["x"] >= box["x"] + box["width"]


def test_imported_tokens_are_not_tokenised_again(open_page, runs, tmp_path, serving):
    """Tokens of another trainer's file: no station tokenises them, and no text is looked for."""
    export_tokens(Run(runs[0]).dataset(), "megatron", tmp_path / "theirs")
    import_tokens(str(tmp_path / "theirs"), tmp_path / "data", sequence_length=64)
    small = {"model": {"hidden_size": 32, "num_hidden_layers": 1, "num_experts": 2, "num_attention_heads": 2},
             "data": {"prepared": str(tmp_path / "data"), "sequence_length": 64},
             "training": {"max_steps": 2, "batch_size": 2, "precision": "fp32"}}  # fmt: skip
    train(make_config(small), run_dir=tmp_path / "run")
    with serving([Feed(tmp_path / "run")]) as found:
        page = open_page(f"{found}#view=river", wait=".journey")
        stations = [button.get_attribute("data-stage") for button in page.locator(".station").all()]
        assert stations == ["source", "import", "split", "pack", "batch", "loop"]
        assert "Taken in as tokens: there is no text to read again" in page.locator(".journey").inner_text()


def test_the_chosen_theme_is_kept_and_both_follow_the_system(open_page, address):
    page = open_page(address, theme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.emulate_media(color_scheme="light")
    page.wait_for_function("() => document.documentElement.dataset.theme === 'light'")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
    page.locator("button.theme").click()
    page.reload()
    page.wait_for_selector("main .panel")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_is_accessible(open_page, address, axe, theme):
    """axe-core finds nothing wrong: names, roles, contrast, keyboard reach."""
    page = open_page(address, theme=theme)
    keys = [link.get_attribute("href") for link in page.locator("nav .view-link").all()]
    found = []
    for key in keys:
        page.goto(f"{address}{key}&step=40")
        page.wait_for_selector(f"main.view-{key.removeprefix('#view=')} .panel")
        page.wait_for_timeout(600)
        page.evaluate(axe)
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        found += [f"{key} {v['id']}: {v['help']}: {[node['html'][:120] for node in v['nodes'][:3]]}" for v in result["violations"]]
    assert not found, "\n".join(found)


def test_json_of_the_feed_never_hides_a_non_finite_number(feeds):
    from pellucid.observe.web.feed import _plain

    assert json.dumps(_plain([float("nan"), -math.inf, 1.5])) == '["nan", "-inf", 1.5]'


def test_experts_show_the_tokens_their_newest_checkpoint_sends_them(open_page, address, runs, number):
    """Counted a second time: every held-out token through the model of the run, routed by the plain rule."""
    model, tokenizer = pellucid.load(runs[0])
    _, dataset = open_run(runs[0])
    batch = dataset.validation.rows(0, 64)
    _, routings = model.hidden_states(batch.tokens_BT, segment_ids=batch.segment_ids_BT, positions=batch.positions_BT)
    page = open_page(f"{address}#view=experts&layer=1&expert=2", wait=".preferred span")
    shown = page.locator(".preferred span").first
    text, times = shown.locator("code").inner_text(), int(shown.get_attribute("title").split(" ")[0].replace(",", ""))
    chosen = routings[1].expert_index_Nk.view(*batch.tokens_BT.shape, -1)
    counted = 0
    for tokens, segments, experts in zip(batch.tokens_BT.tolist(), batch.segment_ids_BT.tolist(), chosen.tolist(), strict=True):
        for token, segment, taken in zip(tokens, segments, experts, strict=True):
            name = {tokenizer.eos_token_id: "<eos>"}.get(token) or tokenizer.token_bytes(token).decode("utf-8", "replace")
            shown_as = re.sub("^ | $", "␣", name.replace("\n", "⏎").replace("\t", "⇥"))
            counted += segment > 0 and 2 in taken and shown_as == text
    assert counted == times > 0
    assert "the checkpoint after step 47;" in page.locator(".hint", has_text="checkpoint").inner_text()
    stacked = (model.layers[1].moe.gate_up_proj.detach(), model.layers[1].moe.down_proj.detach())
    rows = [torch.cat([p[e].flatten() for p in stacked]) for e in range(4)]
    cosines = {e: float(torch.cosine_similarity(rows[2].double(), rows[e].double(), dim=0)) for e in (0, 1, 3)}
    nearest = max(cosines, key=cosines.get)
    said = page.locator(".sibling").inner_text()
    assert f"expert {nearest}, cosine {number(cosines[nearest], signed=True)}" in said


def test_experts_of_a_run_without_a_checkpoint_say_so(open_page, runs, tmp_path, serving):
    """A normal state of a young run, so no failed request: one would fail this test."""
    copy = shutil.copytree(runs[0], tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints"))
    with serving([Feed(copy)]) as found:
        open_page(f"{found}#view=experts", wait=".nothing:has-text('no checkpoint is kept yet')")


# ------------------------------------------------------------------ a run that is longer than the page is wide

STEP = 1505  # its frames of tensors and experts were thinned out: the newest before it are those of step 1500


@pytest.fixture(scope="module")
def long_address(long_run, serving):
    with serving([Feed(long_run.directory)]) as found:
        yield found


@pytest.fixture
def long_page(open_page, long_address):
    return lambda rest: open_page(f"{long_address}#step={STEP}&{rest}")


def says(page, title: str, text: str):
    """The answer of a panel holds this text, once its numbers are here."""
    page.locator(f"#{title} + .answer", has_text=text).wait_for()


def test_the_loss_said_at_a_step_is_that_steps_own(long_page, long_run, number):
    loss = number(long_run.loss(STEP))
    page = long_page("view=learning")
    says(page, "loss-title", f"At step 1,505 the batch's loss is {loss} nats")
    says(page, "loss-title", f"Held-out: {number(long_run.held_out(1499))} after step 1,499.")
    page.locator(".where", has_text=f"loss {loss}").wait_for()
    assert page.locator(".where b").inner_text() == "step 1,505"
    page = long_page("view=learning&from=2&to=5")  # zoomed in elsewhere
    says(page, "loss-title", f"At step 1,505 the batch's loss is {loss} nats")
    says(page, "loss-title", f"Held-out: {number(long_run.held_out(1499))} after step 1,499.")


def test_what_was_thinned_out_is_told_of_the_step_that_was_kept(long_page, long_run, number):
    page = long_page("view=experts")
    says(page, "ledger-title", "At step 1,500 expert 0 of layer 0 does 1.20 times its fair share")
    shown = [float(cell.get_attribute("data-value")) for cell in page.locator(".expert-cell").all()]
    assert shown == pytest.approx(long_run.load(1500))
    mean = np.mean([long_run.load(step)[0] for step in range(long_run.steps)])
    says(page, "expert-title", f"Over the run its load is {number(mean, digits=3)} on average, 0 at least and 1.50 at most.")
    ratio = number(long_run.ratio(1500))
    says(long_page("view=tensor"), "tensor-title", f"At step 1,500 it moved by {ratio} of its size")
    says(long_page("view=xray"), "xray-title", f"At step 1,500 the middle tensor has {ratio}")
    text = f"At step 1,500 expert 0 of layer 0 carries most, 1.20 times its fair share; its weights moved by {ratio} of their size."
    says(long_page("view=network"), "live-title", text)


def test_means_are_of_the_steps_that_they_name(long_page, long_run, number):
    page = long_page("view=learning")
    near = np.mean([long_run.position(step) for step in range(1410, 1501, 10)])
    says(page, "position-title", f"On average over steps 1,410 to 1,500 the loss after 1 tokens of context is {number(near)}")
    hint = page.locator("section[aria-labelledby='position-title'] .hint").inner_text()
    assert hint == "Bar: on average over steps 1,410 to 1,500. Mark: on average over steps 0 to 9."
    page = long_page("view=learn")
    page.locator("section[aria-labelledby='idea-generalise']", has_text="on average over steps 1,468 to 1,499").wait_for()
    page.locator("section[aria-labelledby='idea-loss']", has_text="at step 1,505").wait_for()
    shown = lambda idea: [float(b.get_attribute("data-value")) for b in
                          page.locator(f"section[aria-labelledby='{idea}'] p b[data-value]").all()]  # fmt: skip
    assert shown("idea-loss")[1:3] == pytest.approx([long_run.loss(0), long_run.loss(STEP)])
    train = np.mean([long_run.loss(step) for step in range(1468, 1500)])  # up to where held-out text was measured
    assert shown("idea-generalise")[:3] == pytest.approx([long_run.held_out(1499), long_run.held_out(99), train])


def test_a_cell_and_a_line_of_many_steps_say_which(long_page, long_run, number):
    page = long_page("view=xray&tensor=embedding.weight")
    page.wait_for_selector(".inspector .value")
    cell = page.locator(".inspector .cell").inner_text()
    assert "steps 1,504 to 1,519" in cell and f"largest\n{number(long_run.ratio(1519))}" in cell
    chart = long_page("view=learning").locator("figure[aria-label^='loss:']")
    chart.locator("button", has_text="table").click()
    row = chart.locator("tbody tr").first.locator("th, td").all_inner_texts()
    assert row[0] == "step 2,599" and row[2] == number(long_run.held_out(2599))
    mean = np.mean([long_run.loss(step) for step in range(2592, 2600)])
    assert f"training {number(mean)} nats on average over steps 2,592 to 2,599" in chart.get_attribute("aria-label")


def test_a_run_is_not_compared_with_a_step_that_the_other_never_did(open_page, long_run, runs, serving):
    """The other run has 48 steps: its last one stands for none after it, in words and in pixels."""
    with serving([Feed(long_run.directory), Feed(runs[0])]) as found:
        page = open_page(f"{found}#compare=1&step=300&to=99&from=0&tensor=embedding.weight", wait=".field canvas[data-painted]")
        says(page, "xray-title", "calm has no step 300: its newest is step 47.")
        colours = page.evaluate("""() => { const c = document.querySelector('.field canvas'), w = c.width;
            const d = c.getContext('2d').getImageData(0, 3, w, 1).data;
            return Array.from({length: w}, (_, x) => d[4*x+3]); }""")
        drawn = [colours[int((step + 0.5) / 100 * len(colours))] > 0 for step in range(100)]
        assert drawn[:48] == [True] * 48 and sum(drawn[48:]) < 10, "nothing but the sparse dots of what was not measured"
