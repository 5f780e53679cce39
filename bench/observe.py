"""What observing costs: two runs of the demo preset in one process, one observed and one not, step by step in turn.

    python bench/observe.py [--steps 120] [--preset small] [--budget 0.02] [--threads 2]

The order of the two alternates (on off, off on, ...), so that other load hits both. Same data, same seed: both compute the same
losses. Measured of each step: wall time of Loop.step, and CPU time of the whole process until the writer's thread is done with the
step too (so its work, which in training overlaps the next step, counts in full). The median ratio over pairs stands beside
the ratio of the sums. Besides: what the training thread waits for the writer (Writer.submit), and what the writer's own
thread works for each step.
Results: results/observe.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

from pellucid import run as runs
from pellucid.config import make_config
from pellucid.data.build import prepare
from pellucid.model.grok import Grok1
from pellucid.model.initialize import initialize
from pellucid.observe.observer import SilentObserver, open_observer
from pellucid.training.device import choose_precision
from pellucid.training.loop import Loop
from pellucid.training.optimizers import build_optimizer

RESULTS = Path(__file__).parent / "results" / "observe.json"
WARM_UP = 20


def make_loop(options, folder: Path, observed: bool) -> Loop:
    sources = str(Path(sysconfig.get_paths()["stdlib"]) / "email" / "*.py")
    config = make_config({
        "model": {"preset": options.preset}, "data": {"sources": [sources], "directory": str(folder / "data")},
        "training": {"device": "cpu", "max_steps": WARM_UP + options.steps}, "observe": {"budget": options.budget},
    })  # fmt: skip
    dataset = prepare(config.data)
    runs._fit_vocabulary(config, dataset)
    model = initialize(Grok1(config.model), 0)
    model.compute_dtype, model.parity = choose_precision("fp32", torch.device("cpu"))
    optimizer = build_optimizer(model, config.optimizer)
    run_dir = folder / ("on" if observed else "off")
    observer = open_observer(run_dir, model, optimizer, config, dataset) if observed else SilentObserver()
    return Loop(config, model, optimizer, dataset, run_dir, observer)


def timed(function, into: list[float]):
    def call(*arguments):
        began = time.perf_counter()
        result = function(*arguments)
        into.append(time.perf_counter() - began)
        return result

    return call


def measure(options) -> dict:
    torch.set_num_threads(options.threads)
    times: dict[bool, list[float]] = {True: [], False: []}
    work: dict[bool, list[float]] = {True: [], False: []}
    waits: list[float] = []
    made: list[float] = []
    stored: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        loops = {on: make_loop(options, Path(name), on) for on in (True, False)}
        writer = loops[True].observer.writer
        writer.submit = timed(writer.submit, waits)
        writer._store = timed(writer._store, stored)
        loops[True].observer._record = timed(loops[True].observer._record, made)
        losses = {True: [], False: []}
        for step in range(WARM_UP + options.steps):
            for on in (True, False) if step % 2 else (False, True):
                began, worked = time.perf_counter(), time.process_time()
                result = loops[on].step()
                times[on].append(time.perf_counter() - began)
                if on:
                    writer.flush()
                work[on].append(time.process_time() - worked)
                losses[on].append(result.loss)
        loops[True].observer.close()
        assert losses[True] == losses[False], "observing changed the training"
        size = (Path(name) / "on" / "run.sqlite").stat().st_size
        share = loops[True].observer.budget.used_share
    wall, cpu = (_cost(t[True][WARM_UP:], t[False][WARM_UP:]) for t in (times, work))
    milliseconds = lambda values: {"p50": 1e3 * statistics.median(values), "p99": 1e3 * sorted(values)[int(0.99 * len(values))]}
    return {
        "wall": wall, "cpu_with_writer": cpu, "own_estimate": share, "training_thread_waits_ms": milliseconds(waits[WARM_UP:]),
        "writer_thread_makes_ms": milliseconds(made[WARM_UP:]), "writer_thread_stores_ms": milliseconds(stored[WARM_UP:]),
        "bytes_per_step": size / (WARM_UP + options.steps),
    }  # fmt: skip


def _cost(on: list[float], off: list[float]) -> dict:
    pairs = sorted(a / b for a, b in zip(on, off, strict=True))
    return {"seconds_off": statistics.median(off), "seconds_on": statistics.median(on),
            "cost_median_of_pairs": statistics.median(pairs) - 1, "cost_of_sums": sum(on) / sum(off) - 1,
            "cost_quartiles": [pairs[len(pairs) // 4] - 1, pairs[3 * len(pairs) // 4] - 1]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--budget", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    result = measure(options)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    report = {"command": f"python bench/observe.py --steps {options.steps} --preset {options.preset} --budget {options.budget} "
              f"--threads {options.threads}", "commit": commit, "machine": machine, **result}  # fmt: skip
    print(json.dumps(report, indent=1))
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
