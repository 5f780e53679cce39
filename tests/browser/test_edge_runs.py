"""What the page says of runs that are young, that went wrong, and whose answers are slow."""

import re

import numpy as np
import pytest

from pellucid.observe.columns import INDEX, PARAM, ROUTER, RUN
from pellucid.observe.store import MISSING, Record, Row, Writer
from pellucid.observe.web.feed import Feed

STEPS = 40
TENSORS = [Row("embedding.weight", None, None, "embedding", "[8, 8]", 64, "float32"),
           *(Row(f"layers.0.moe.down_proj[{e}]", 0, e, "down_proj", "[8, 8]", 64, "float32") for e in range(2))]  # fmt: skip
SLOW = """async ([question, milliseconds]) => {
    const real = window.fetch; window.asked = []; window.waiting = window.most = 0;
    window.fetch = async (path, ...rest) => {
        if (!path.includes(question)) return real(path, ...rest);
        window.asked.push(path); window.waiting++; window.most = Math.max(window.most, window.waiting);
        await new Promise((done) => setTimeout(done, milliseconds));
        try { return await real(path, ...rest); } finally { window.waiting--; }
    };
}"""


def make_run(folder, ratios, *, skipped_last: bool = False, training: str = "", every: int = 1, optimizer: str = "adamw",
             wrong: tuple[int, ...] = ()):  # fmt: skip
    """A run of 40 steps whose tensors move by `ratios` of their size, measured every so many steps from the first; its last step
    may be one that was skipped."""
    folder.mkdir(parents=True)
    tables = f"[model]\nnum_experts = 2\n[optimizer]\nname = '{optimizer}'\n[training]\nbatch_size = 4\n"
    (folder / "config.toml").write_text(tables + training)
    writer = Writer(folder)
    writer.define("run", [Row("run")], RUN, row_is="run")
    writer.define("param", TENSORS, PARAM, row_is="tensor")
    writer.define("router", [Row(f"layers.0.experts.{e}", 0, e) for e in range(2)], ROUTER, row_is="expert")
    for step in range(STEPS):
        frames = {name: np.full((rows, len(stats)), 0.5, np.float32) for name, rows, stats in
                  (("run", 1, RUN), ("param", 3, PARAM), ("router", 2, ROUTER))}  # fmt: skip
        frames["run"][0, INDEX["run"]["applied"]] = 1
        frames["param"][:, INDEX["param"]["weight_norm"]] = 10
        frames["param"][:, INDEX["param"]["update_norm"]] = 10 * np.array(ratios, np.float32)
        frames["param"][:, INDEX["param"]["update_ratio"]] = ratios
        if skipped_last and step == STEPS - 1:
            frames["run"][0, INDEX["run"]["applied"]] = 0
            frames["param"][:, INDEX["param"]["update_norm"]] = 0
            frames["param"][:, INDEX["param"]["update_ratio"]] = MISSING
        if step % every:
            del frames["param"]
            for stat in ("gradient_norm", "update_norm", "ghost", "ghost_share", "frozen"):
                frames["router"][:, INDEX["router"][stat]] = MISSING
        found = {"rule": "non_finite", "severity": "alarm", "subject": f"tensor of step {step}", "text": "3 elements", "value": 3,
                 "threshold": 0}  # fmt: skip
        writer.write(Record(step, frames, events=[found] if step in wrong else []))
    writer.close()
    return Feed(folder)


@pytest.fixture
def watched(tmp_path, serving, open_page):
    """A function: a page that shows some runs, given by their make_run arguments."""
    opened = []

    def watch(rest: str, *runs, **options):
        context = serving([make_run(tmp_path / f"run-{i}", ratios, **options) for i, ratios in enumerate(runs)])
        page = open_page(context.__enter__() + rest, wait="main .panel")
        opened.append((context, page))
        return page

    yield watch
    for context, page in opened:
        page.goto("about:blank")  # what it still asks is given up, not refused by a server that is gone
        context.__exit__(None, None, None)


def answer(page, title: str):
    return page.locator(f"#{title} + .answer")


def test_documents_are_asked_for_one_step_at_a_time_and_the_last_ones_stay_meanwhile(open_page, address):
    page = open_page(f"{address}#view=learning&step=1", wait="#documents-title")
    page.evaluate(SLOW, ["/api/step?", 400])
    for step in range(2, 12):
        page.evaluate(f"location.hash = '#view=learning&step={step}'")
        page.wait_for_timeout(40)
        assert page.locator("#documents-title").count() == 1
    page.locator("#documents-title", has_text="in step 11?").wait_for()
    assert page.evaluate("window.most") == 1
    assert page.evaluate("window.asked.length") < 8 and page.evaluate("window.asked.at(-1)").endswith("step=11")


def test_an_opened_document_belongs_to_its_step(open_page, address):
    page = open_page(f"{address}#view=learning&step=33", wait="#documents-title")
    page.locator("[aria-label='documents of the step'] button").first.click()
    page.locator("[aria-label='documents of the step'] pre").wait_for()
    page.evaluate("location.hash = '#view=learning&step=34'")
    page.locator("#documents-title", has_text="in step 34?").wait_for()
    assert page.locator("[aria-label='documents of the step'] pre").count() == 0


def test_the_rows_of_a_batch_are_not_counted_before_they_are_here(open_page, address):
    page = open_page(f"{address}#view=river&step=3", wait="#river-title")
    page.evaluate(SLOW, ["/api/step?", 800])
    page.locator("[data-stage=batch]").click()
    page.locator("section[aria-labelledby=station-title]", has_text="Reading step 3").wait_for()
    page.locator("#station-title", has_text=re.compile("fill the 8 rows of step 3")).wait_for()


def test_a_tensor_is_told_with_numbers_of_one_step_alone(open_page, long_run, serving, number):
    with serving([Feed(long_run.directory)]) as address:
        page = open_page(f"{address}#view=tensor&step=100", wait=".anatomy")
        told = lambda step: f"At step {step} it moved by {number(long_run.ratio(step))} of its size"
        answer(page, "tensor-title").filter(has_text=told(100)).wait_for()
        page.evaluate(SLOW, ["stat=update_norm", 1500])
        page.evaluate("location.hash = '#view=tensor&step=105'")
        page.wait_for_timeout(700)  # all are here but the change
        assert told(100) in answer(page, "tensor-title").inner_text()
        assert f"moved by {number(long_run.ratio(100), digits=3)} of it" in page.locator(".anatomy").inner_text()
        answer(page, "tensor-title").filter(has_text=told(105)).wait_for()
        assert f"moved by {number(long_run.ratio(105), digits=3)} of it" in page.locator(".anatomy").inner_text()


def test_the_tensor_that_differs_most_may_be_the_smaller_one(watched):
    page = watched("#compare=1", [1e-3, 2e-3, 1e-5], [1e-3, 1e-3, 1e-3])
    answer(page, "xray-title").filter(has_text="largest difference: layer 0, experts' output, expert 1").wait_for()


def test_a_cell_of_two_runs_tells_both_numbers_and_how_far_they_are_apart(watched):
    page = watched("#compare=1&tensor=embedding.weight", [4e-3, 2e-3, 1e-5], [1e-3, 1e-3, 1e-3])
    cell = page.locator(".cell", has_text="× 4")
    cell.wait_for()
    told = cell.inner_text()
    assert "0.004000" in told and "run-1" in told and "0.001000, step 39; × 4" in told
    page.locator(".xray-grid canvas").first.hover(position={"x": 20, "y": 3})
    assert "run-1: 0.001000, step" in page.locator(".tip").inner_text()


def test_a_rule_that_needs_more_steps_is_not_said_to_be_content(watched):
    page = watched("#view=verdicts", [1e-3] * 3)
    judged = page.locator(".rules li", has_text="loss spike")
    early = page.locator(".rules li", has_text="dead expert")
    assert "✓" in judged.inner_text() and "too early" not in judged.inner_text()
    assert "✓" not in early.inner_text() and "too early to judge: it takes 100 steps, 40 were done" in early.inner_text()
    ticks, rules = page.locator(".rules li", has_text="✓").count(), page.locator(".rules li").count()
    assert f"{ticks} rules judged 40 steps" in answer(page, "verdict-title").inner_text() and ticks < rules


def test_a_rule_on_held_out_text_does_not_judge_a_run_that_never_looks_at_it(watched):
    page = watched("#view=verdicts", [1e-3] * 3, training="evaluate_every = 0\n")
    rule = page.locator(".rules li", has_text="overfitting")
    assert "✓" not in rule.inner_text() and "not judged: this run looks at held-out text at its end alone" in rule.inner_text()


def test_a_rule_on_adam_s_averages_does_not_judge_a_run_without_them(watched):
    page = watched("#view=verdicts", [1e-3] * 3, optimizer="lion")
    for name in ("gradients grew faster than Adam", "impossible step"):
        rule = page.locator(".rules li").filter(has_text=name)
        assert "✓" not in rule.inner_text() and "not judged: lion keeps no averages as Adam does" in rule.inner_text()
    assert "✓" in page.locator(".rules li", has_text="learning rate high").inner_text()


def test_of_a_skipped_step_the_page_says_that_it_was_skipped(watched):
    page = watched("#view=tensor", [1e-3] * 3, skipped_last=True)
    answer(page, "tensor-title").filter(has_text="Step 39 was skipped, as its loss or gradient was not finite").wait_for()
    assert "moved by" not in page.locator(".anatomy").inner_text()
    page.evaluate("location.hash = '#view=xray'")
    answer(page, "xray-title").filter(has_text="not measured at step 39: the step was skipped").wait_for()
    answer(page, "xray-title").locator("a").click()
    page.wait_for_selector("main.view-verdicts .panel")


def test_the_network_is_coloured_by_its_legend(watched):
    page = watched("#view=network", [0, np.nan, MISSING])
    page.locator(".living .pick").first.wait_for()
    fills = page.eval_on_selector_all(".living .pick circle", "found => found.map((circle) => circle.getAttribute('fill'))")
    assert fills == ["url(#hatched)", "url(#dotted)"]
    assert page.locator(".living .part rect").first.get_attribute("fill") == "#F3F3F1"  # exactly 0, as in the legend


def test_an_update_that_was_not_measured_is_left_out_of_the_sentence(watched):
    page = watched("#view=network", [MISSING] * 3)
    sentence = answer(page, "live-title").filter(has_text="carries most").inner_text()
    assert "its fair share." in sentence and "–" not in sentence


def test_the_history_of_experts_says_that_a_column_is_a_mean(open_page, long_run, serving):
    with serving([Feed(long_run.directory)]) as address:
        page = open_page(f"{address}#view=experts", wait="#movie-title")
        assert "steps in a column you see the mean" in answer(page, "movie-title").inner_text()


def test_what_experts_learned_is_told_of_the_newest_step_that_measured_it(watched):
    page = watched("#view=experts", [1e-3] * 3, every=8)
    page.locator(".choice button", has_text="gradient per token").click()
    page.locator(".ledger-grid .inspector", has_text="Shown at step 32.").wait_for()
    assert page.locator(".expert-cell").all_inner_texts() == ["1", "1"]  # a norm of 0.5 over half a token
    facts = page.locator("#expert-title").locator("xpath=ancestor::section").locator("dl")
    assert facts.locator("dt", has_text="ghost share (at step 32)").count() == 1
    assert facts.locator("dt", has_text="tokens").inner_text() == "tokens", "that is counted at every step"


@pytest.mark.parametrize(("optimizer", "rule", "source"), [
    ("lion", "sign(β₁ m + (1−β₁) g)", "Chen"), ("adafactor", "u ← g / √v, divided by max(1, RMS(g / √v))", "Shazeer"),
    ("muon", "√max(1, out/in) · orthogonal(μ b + (1−μ) g)", "Jordan"),
    ("sgd", "η (g + μ b)", "Rumelhart")])  # fmt: skip
def test_the_update_is_told_by_the_rule_of_the_run(watched, optimizer, rule, source):
    page = watched("#view=learn", [1e-3] * 3, optimizer=optimizer)
    card = page.locator("section[aria-labelledby='idea-update']").inner_text()
    assert rule in card and source in card and f"This run uses {optimizer}" in card


def test_a_long_name_of_a_file_is_broken_on_a_telephone(open_page, address, changed):
    page = open_page(f"{address}#view=river", wait=".journey")
    changed(page, "document", lambda answer: answer | {"source": "/a" * 60 + "/tiny.txt"})
    page.set_viewport_size({"width": 390, "height": 800})
    page.reload()
    page.locator(".journey", has_text="/a/a/a/a").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_of_values_that_are_not_finite_the_first_is_told(watched):
    page = watched("#view=verdicts", [1e-3] * 3, wrong=(5, 9))
    card = page.locator(".verdict").inner_text()
    assert "Step 5, tensor of step 5" in card and "documents of step 5" in card and "all 2 findings" in card


def test_a_learning_rate_of_muon_says_whose_it_is(watched):
    page = watched("#view=learning", [1e-3] * 3, optimizer="muon")
    answer(page, "rate-title").filter(has_text="the learning rate of Muon's matrices is 0.5").wait_for()
