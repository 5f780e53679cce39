"""Speed of the dashboard in headless Chromium: how soon it draws, how soon a new step is seen, how it bears a long run.

    python bench/dashboard.py [--steps 100000] [--runs DIR] [--out bench/results/dashboard.json]

Synthetic telemetry of a small mixture of experts: 266 tensors by 24 statistics, which is 6,384 series. Times are from the
page's own clock and end when the canvas holds the pixels. Latency of a step: from the moment the optimizer would be done
(before the writer gets the numbers, in another process) to the number of the step being in the page. Needs the packages
of pellucid[dashboard], playwright, and Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

from pellucid.observe.columns import PARAM, ROUTER, RUN
from pellucid.observe.store import Record, Row, Stat, Writer
from pellucid.observe.web.feed import Feed
from pellucid.observe.web.server import bind, make_server

RESULTS = Path(__file__).parent / "results" / "dashboard.json"
TENSORS, LAYERS, EXPERTS = 266, 12, 8
STATS = [*PARAM, *(Stat(f"extra_{n}", scale="log", low=1e-6, high=1) for n in range(24 - len(PARAM)))][:24]
PAINTED = "document.querySelector('.field canvas')?.dataset.painted"
ARGUMENTS = ["--lang=en-US", "--no-sandbox", "--disable-accelerated-2d-canvas", "--disable-gpu"]


def open_writer(folder: Path) -> Writer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text('[optimizer]\nname = "adamw"\n[training]\nbatch_size = 16\n')
    writer = Writer(folder)
    roles = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "moe.router"]
    names = [f"layers.{layer}.{role}" for layer in range(LAYERS) for role in roles]
    kinds = ("gate_up_proj", "down_proj")
    names += [f"layers.{layer}.moe.{kind}[{e}]" for layer in range(LAYERS) for kind in kinds for e in range(EXPERTS)]
    names = sorted([*names, *(f"layers.{n % LAYERS}.norm_{n}" for n in range(TENSORS - len(names)))])[:TENSORS]
    role = lambda name: name.split(".")[-1].split("[")[0]
    rows = [Row(name, int(name.split(".")[1]), None, role(name), "[64, 64]", 4096, "float32") for name in names]
    writer.define("run", [Row("run")], RUN, row_is="run")
    writer.define("param", rows, STATS, row_is="tensor", dense_steps=2000, keep_every=10)
    router = [Row(f"layers.{layer}.experts.{e}", layer, e) for layer in range(LAYERS) for e in range(EXPERTS)]
    writer.define("router", router, ROUTER, row_is="expert", dense_steps=2000, keep_every=10)
    return writer


class Numbers:
    """Frames of a step, the same for every run: log-normal magnitudes that drift."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.param = rng.lognormal(-6, 1, (64, TENSORS, len(STATS))).astype(np.float32)
        self.router = rng.lognormal(0, 0.4, (64, LAYERS * EXPERTS, len(ROUTER))).astype(np.float32)
        self.names = [stat.name for stat in RUN]

    def record(self, step: int) -> Record:
        run = np.full((1, len(RUN)), 0.01, np.float32)
        run[0, self.names.index("loss")] = 8 / (1 + step / 200) + 0.1 * np.sin(step)
        return Record(step, {"run": run, "param": self.param[step % 64], "router": self.router[step % 64]})


def write_run(folder: Path, steps: int) -> float:
    """Milliseconds of the writer per step."""
    writer, numbers = open_writer(folder), Numbers()
    began = time.perf_counter()
    for step in range(steps):
        writer.write(numbers.record(step))
    writer.close()
    return (time.perf_counter() - began) / steps * 1000


@contextmanager
def served(folder: Path):
    listener, _ = bind(28384)
    server = make_server([Feed(folder)])
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


def until_painted(page: Page, act: str, changed: str = PAINTED) -> float:
    """Milliseconds from doing `act` in the page to the first frame after the canvas is painted anew."""
    return page.evaluate("""async ([act, changed]) => {
        const canvas = () => document.querySelector('.field canvas'), before = canvas();
        if (before) before.dataset.painted = '';
        const began = performance.now();
        eval?.(act);
        while (!eval?.(changed)) await new Promise(requestAnimationFrame);
        await new Promise(requestAnimationFrame);
        return performance.now() - began; }""", [act, changed])  # fmt: skip


def first_paint(browser, address: str) -> float:
    """Milliseconds from the navigation to the painted X-ray, with a cold cache."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, bypass_csp=True)
    page = context.new_page()
    page.add_init_script(f"""const look = () => {{
        if ({PAINTED}) window.__painted = performance.now(); else requestAnimationFrame(look); }};
        requestAnimationFrame(look);""")
    page.goto(address)
    page.wait_for_function("window.__painted")
    found = page.evaluate("window.__painted")
    context.close()
    return found


def measured(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    return {"median": round(statistics.median(ordered), 1), "p95": round(p95, 1), "most": round(ordered[-1], 1)}


def look_at(browser, folder: Path, steps: int) -> dict:
    """Drawing, switching, scrubbing of one run."""
    with served(folder) as address:
        first = [first_paint(browser, address) for _ in range(5)]
        page = browser.new_context(viewport={"width": 1440, "height": 900}, bypass_csp=True).new_page()
        page.goto(address)
        page.wait_for_function(PAINTED)
        names = [stat.name for stat in STATS if stat.name != "update_ratio"]
        switch = [until_painted(page, f"location.hash = 'stat={name}'") for name in names]
        scrub = [page.evaluate("""async (step) => {
            const slider = document.querySelector('.track input'), began = performance.now();
            slider.value = step; slider.dispatchEvent(new Event('input', {bubbles: true}));
            await new Promise(requestAnimationFrame);
            await new Promise((r) => setTimeout(r));
            return performance.now() - began; }""",
            int(steps * n / 40)) for n in range(40)]  # fmt: skip
        spans = [(int(steps * n / 12), int(steps * n / 12) + 900) for n in range(1, 11)]
        zoom = [until_painted(page, f"location.hash = 'from={low}&to={high}'") for low, high in spans]
        page.context.close()
    return {"first_paint_ms": measured(first), "another_statistic_ms": measured(switch),
            "all_24_statistics_ms": round(sum(switch) + first[0], 1),
            "scrub_ms": measured(scrub), "zoom_to_900_steps_ms": measured(zoom)}


WRITE = """import sys, time, json
sys.path.insert(0, sys.argv[2])
from dashboard import *
writer, numbers = open_writer(Path(sys.argv[1])), Numbers()
start = int(sys.argv[3])
for step in range(start, start + 60):
    time.sleep(0.25)
    made, began = numbers.record(step), time.time()
    writer.write(made)
    print(json.dumps([step, began]), flush=True)
writer.close()"""


def latency(browser, folder: Path, start: int) -> dict:
    """Seconds from the end of a step in the training process to its number in the page."""
    with served(folder) as address:
        page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
        page.goto(address)
        page.wait_for_selector(".field canvas[data-painted]")
        page.evaluate("""() => { window.seen = {};
            const look = () => { window.seen[document.querySelector('.status').dataset.step] ??= Date.now() / 1000; };
            new MutationObserver(look).observe(document.body, {subtree: true, attributes: true, childList: true}); }""")
        command = [sys.executable, "-c", WRITE, str(folder), str(Path(__file__).parent), str(start)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        began = dict(json.loads(line) for line in process.stdout)
        process.wait()
        page.wait_for_timeout(1500)
        seen = {int(step): at for step, at in page.evaluate("window.seen").items()}
        page.context.close()
    found = [1000 * (seen[step] - began[step]) for step in began if step in seen]
    return {**measured(found), "steps_written": len(began), "steps_seen": len(found)}


def measure(short: Path, long: Path, steps: int) -> dict:
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as name:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, Chromium {browser.version}",
            "commit": commit.stdout.strip(), "load_average": os.getloadavg()[0], "series": TENSORS * len(STATS),
            "writer_ms_per_step": round(write_run(Path(name) / "written", 300), 3),
            "1000_steps": look_at(browser, short, 1000),
            "step_to_page_ms": latency(browser, Path(name) / "written", 300),
            f"{steps}_steps": look_at(browser, long, steps), "file_mb": round((long / "run.sqlite").stat().st_size / 1e6),
        }
        browser.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100_000, help="of the long run")
    parser.add_argument("--runs", type=Path, help="folder with the two runs, kept for a second measurement")
    parser.add_argument("--prepare", action="store_true", help="only write the runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        short, long = (options.runs or Path(name)) / "short", (options.runs or Path(name)) / "long"
        for folder, steps in ((short, 1000), (long, options.steps)):
            if not folder.exists():
                write_run(folder, steps)
        if options.prepare:
            return
        result = measure(short, long, options.steps)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
