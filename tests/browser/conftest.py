"""A real headless Chromium before the real server, showing real runs trained here.

Every page handed to a test watches itself: a console error, an uncaught exception, a failed request or one that leaves
this machine fails the test that caused it.
"""

import math
import random
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pellucid.config import make_config
from pellucid.observe.columns import EVALUATION, INDEX, LAYER, LOSS, PARAM, ROUTER, RUN
from pellucid.observe.store import Record, Row, Writer
from pellucid.observe.web.feed import Feed
from pellucid.run import train

ROOT = Path(__file__).parents[2]
STEPS = 48


# ------------------------------------------------------------------------------------------------------ runs


def write_corpus(folder: Path) -> Path:
    """Sentences in two sources, a duplicate, a document too short, one with e-mail addresses and wide characters."""
    rng = random.Random(0)
    subjects, verbs = ["the cat", "a dog", "my friend", "the old king", "naïve owls", "our ship"], ["sees", "likes", "finds"]
    sentence = lambda: f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(subjects)}."
    for source in ("letters", "notes"):
        (folder / source).mkdir(parents=True)
        for n in range(40):
            text = "\r\n".join(sentence() for _ in range(rng.randint(5, 11)))
            (folder / source / f"{n:02}.txt").write_text(f"{text}\r\nnumber {n} of {source}\r\n", newline="")
    shutil.copy(folder / "letters" / "03.txt", folder / "letters" / "copy.txt")
    (folder / "letters" / "short.txt").write_text("too short")
    (folder / "letters" / "contact.txt").write_text("write to someone@example.org about 日本語 and naïve owls.\n" * 4)
    return folder


def settings(folder: Path, **tables):
    """A model that trains in seconds, on data that passes through every stage."""
    return make_config({
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4, "num_attention_heads": 2},
        "data": {"sources": [str(folder / "letters"), str(folder / "notes")], "directory": str(folder / "data"),
                 "sequence_length": 64, "validation_fraction": 0.1, "tokenizer": {"kind": "bytes"},
                 "normalize": {"whitespace": "trim", "pii": ["email"]}, "filter": {"length": {"min_characters": 60}},
                 "deduplicate": {"exact": True}, "augment": [{"name": "keyboard", "rate": 0.05}]},
        "training": {"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 4, "precision": "fp32",
                     "evaluate_every": 16, "evaluate_rows": 8},
        "optimizer": {"name": "adamw", "learning_rate": 3e-3}, "schedule": {"warmup_steps": 5},
        "checkpoint": {"every_steps": 16}, "observe": {"budget": 1.0}, **tables,
    })  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Two finished runs on the same data; the first has an explained step, the second a learning rate far too high."""
    from pellucid.observe.explain import explain

    folder = tmp_path_factory.mktemp("watched")
    write_corpus(folder)
    first = train(settings(folder), run_dir=folder / "calm").directory
    explain(first, STEPS - 4)
    wild = {"optimizer": {"name": "adamw", "learning_rate": 3e-1}, "training": {"max_steps": 24, "batch_size": 8}}
    return [first, train(settings(folder, **wild), run_dir=folder / "wild").directory]


class LongRun:
    """A run longer than the page is wide, whose numbers are plain functions of the step."""

    directory: Path
    steps = 2600
    loss = staticmethod(lambda s: 5 + s % 97 / 100)
    load = staticmethod(lambda s: (s % 16 / 10, 2 - s % 16 / 10))  # of the two experts: the first is idle in one step of 16
    ratio = staticmethod(lambda s: 1e-3 * (1 + s % 16))
    held_out = staticmethod(lambda s: 6 - s / 10000)
    position = staticmethod(lambda s: 3 + s / 1000)


@pytest.fixture(scope="session")
def long_run(tmp_path_factory):
    """A LongRun: thinned out from step 500 on, held-out loss every 100 steps; one NaN, at step 1337."""
    folder = tmp_path_factory.mktemp("long") / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("[model]\nnum_experts = 2\n[optimizer]\nname = 'adamw'\n[training]\nbatch_size = 4\n")
    writer, thin = Writer(folder), {"dense_steps": 500, "keep_every": 10}
    tensors = [Row("embedding.weight", None, None, "embedding", "[8, 8]", 64, "float32"),
               *(Row(f"layers.0.moe.down_proj[{e}]", 0, e, "down_proj", "[8, 8]", 64, "float32") for e in range(2))]
    writer.define("run", [Row("run")], RUN, row_is="run")
    writer.define("param", tensors, PARAM, row_is="tensor", **thin)
    writer.define("router", [Row(f"layers.0.experts.{e}", 0, e) for e in range(2)], ROUTER, row_is="expert", **thin)
    writer.define("layer", [Row("layers.0", 0)], LAYER, row_is="layer", **thin)
    writer.define("position", [Row("0"), Row("1")], LOSS, row_is="position", **thin)
    writer.define("evaluation", [Row("held-out")], EVALUATION, row_is="run")
    for step in range(LongRun.steps):
        frames = {name: np.full((rows, len(stats)), 0.5, np.float32) for name, rows, stats in
                  (("run", 1, RUN), ("param", 3, PARAM), ("router", 2, ROUTER), ("layer", 1, LAYER), ("position", 2, LOSS))}
        frames["run"][0, INDEX["run"]["loss"]] = LongRun.loss(step)
        frames["param"][:, INDEX["param"]["update_ratio"]] = LongRun.ratio(step) if step != 1337 else np.nan
        frames["param"][:, INDEX["param"]["weight_norm"]] = 10
        frames["param"][:, INDEX["param"]["update_norm"]] = 10 * LongRun.ratio(step)
        frames["router"][:, INDEX["router"]["load"]] = LongRun.load(step)
        frames["router"][:, [INDEX["router"]["ghost"], INDEX["router"]["frozen"]]] = 0
        frames["position"][:, INDEX["position"]["loss"]] = LongRun.position(step)
        if step % 100 == 99:
            frames["evaluation"] = np.full((1, len(EVALUATION)), LongRun.held_out(step), np.float32)
        writer.write(Record(step, frames))
    writer.close()
    LongRun.directory = folder
    return LongRun


@pytest.fixture(scope="session")
def feeds(runs):
    return [Feed(run) for run in runs]


# ---------------------------------------------------------------------------------------------------- server


@pytest.fixture(scope="session")
def serving():
    """A function: a context that serves some feeds."""
    pytest.importorskip("starlette"), pytest.importorskip("uvicorn")
    return _serving


@contextmanager
def _serving(feeds):
    """The dashboard's server in this process; gives its address."""
    from pellucid.observe.web.server import bind, check_assets, make_server

    check_assets()
    listener, _ = bind(18384)
    server = make_server(feeds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def address(feeds, serving):
    with serving(feeds) as found:
        yield found


# --------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="session")
def chromium():
    """A started browser. --lang: uPlot refuses a POSIX locale; canvases: software GL stalls on many accelerated ones."""
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    options = ["--lang=en-US", "--no-sandbox", "--disable-accelerated-2d-canvas", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """A function: a page of its own, at `url`; what goes wrong in it fails the test."""
    wrong, contexts = [], []

    def open_one(url: str, *, theme: str = "light", wait: str | None = "main .panel", tolerate: tuple[str, ...] = (), **options):
        context = chromium.new_context(viewport={"width": 1440, "height": 900}, color_scheme=theme, **options)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        note = lambda text: None if any(word in text for word in tolerate) else wrong.append(text)
        page.on("console", lambda message: message.type in ("error", "warning") and note(f"console: {message.text}"))
        page.on("pageerror", lambda error: note(f"exception: {error}"))
        page.on("requestfailed", lambda request: request.failure == "net::ERR_ABORTED" or note(f"failed: {request.url}"))
        page.on("response", lambda response: response.status >= 400 and note(f"{response.status}: {response.url}"))
        origin = url.split("#")[0].rsplit("/", 1)[0]
        page.on("request", lambda request: request.url.startswith((origin, "data:", "blob:")) or note(f"outside: {request.url}"))
        page.goto(url)
        if wait:
            page.wait_for_selector(wait)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not wrong, wrong


@pytest.fixture
def changed():
    """A function: from now on a page gets the answers of `question` as `change` makes them."""

    def change_answers(page, question: str, change):
        def answer(route):
            response = route.fetch()
            route.fulfill(response=response, json=change(response.json()))

        page.route(f"**/api/{question}*", answer)

    return change_answers


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str:
    """axe-core, of the version in package-lock.json."""
    sys.path.insert(0, str(ROOT))
    try:
        from hatch_build import npm_ci
    finally:
        sys.path.remove(str(ROOT))
    folder = tmp_path_factory.mktemp("axe")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(ROOT / name, folder)
    try:
        npm_ci(folder)
    except RuntimeError as error:
        pytest.skip(f"axe-core cannot be fetched: {error}")
    return (folder / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def number():
    return _number


def _number(value: float, signed: bool = False, digits: int = 4) -> str:
    """The page's way of writing a number, told a second time: four significant digits, true minus."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e5 or size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif float(value).is_integer():
        text = str(int(value))
    else:
        whole = len(str(int(size))) if size >= 1 else -math.floor(math.log10(size)) - 1
        text = f"{value:.{max(0, digits - whole) if size >= 1 else digits + whole}f}"
    return ("+" if signed and value > 0 else "") + text.replace("-", "−")
