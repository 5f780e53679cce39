"""Builds in a process of their own, killed at random moments: what the tests of the ledger and of storage share."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from pellucid.config import DataConfig
from pellucid.data.pipeline import Job

BLOCK_BYTES, TOKENS_PER_SHARD = 20_000, 60_000
BUILD = f"""
import sys
from pathlib import Path
from pellucid.config import DataConfig
from pellucid.data.pipeline import Job
from pellucid.data import blocks, shards, build
from pellucid.data.workers import InThisProcess, Processes
blocks.BLOCK_BYTES, shards.TOKENS_PER_SHARD = {BLOCK_BYTES}, {TOKENS_PER_SHARD}
config = DataConfig.model_validate_json(Path(sys.argv[1]).read_text())
count = int(sys.argv[3])
print("ready", flush=True)
build.prepare(config, directory=sys.argv[2], workers=Processes(count) if count > 1 else InThisProcess())
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(config: DataConfig, folder: Path, workers: int) -> subprocess.Popen:
    (folder / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", BUILD, str(folder / "config.json"), str(folder / "out"), str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    return process


def finished_records(folder: Path) -> dict[str, int]:
    """What the ledger of folder/out holds of blocks and their tokens: name -> time written."""
    found = (p for name in ("blocks", "tokens") for p in (folder / ".out.building" / name).glob("[!.s]*.json"))
    return {p.name: p.stat().st_mtime_ns for p in found}


def killed_often(config: DataConfig, folder: Path, workers: int, kills: int, seed: int) -> int:
    """Build folder/out, SIGKILLed so many times; the first half some instants after a start, the others after some more work
    was finished. Returns how often it was killed in the middle, with work finished. Nothing finished is ever done again."""
    rng = random.Random(seed)
    before: dict[str, int] = {}
    in_the_middle = 0
    for number in range(kills):
        process = start(config, folder, workers)
        wanted = len(before) + rng.randrange(1, 4)
        until = time.monotonic() + (rng.uniform(0.02, 0.35) if number < kills // 2 else 60)
        while process.poll() is None and time.monotonic() < until and len(finished_records(folder)) < wanted:
            time.sleep(rng.uniform(0.001, 0.01))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = finished_records(folder)
        done = (folder / "out").exists()
        assert done or now.items() >= before.items()
        in_the_middle += bool(now) and not done
        before = now
    process = start(config, folder, workers)
    assert process.wait(timeout=120) == 0 and not (folder / ".out.building").exists()
    return in_the_middle


class Steps(Job):
    """Two steps that get on, each of which kills its worker once it is reported; or one that says nothing for ever."""

    def __init__(self, left: int, silent: bool = False):
        self.left, self.silent = left, silent

    def run(self, setup):
        for step in range(self.left):
            yield "position", step
            time.sleep(600 if self.silent else 0.1)
            yield "step", step
            time.sleep(0.2)  # until the caller has heard
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, report):
        return Steps(self.left - 1) if report[0] == "step" else self
