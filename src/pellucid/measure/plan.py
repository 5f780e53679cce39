"""A plan: jobs whose results are kept one by one, so that a plan that was stopped goes on where it was.

A job is a pure function of its settings, named as "module:function"; it gets a scratch folder, in which it may go on
after a kill, and returns JSON values. Jobs run one after another here, in several processes, or on a Ray cluster.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pellucid.config import UserError
from pellucid.data.workers import processors
from pellucid.measure.outcome import replace

VERSION = 1  # of what jobs compute: another one runs them all again
ASK_BEYOND = 30 * 60  # seconds; a longer plan wants --yes


@dataclass(frozen=True)
class Job:
    """name: of its file (letters, digits, '-', '.', '_'); settings: JSON values, all that the result depends on."""

    name: str
    function: str
    settings: dict[str, Any]
    seconds: float = 0.0  # estimated, alone on this machine

    @property
    def fingerprint(self) -> str:
        decisive = json.dumps([VERSION, self.function, self.settings], sort_keys=True)
        return hashlib.sha256(decisive.encode()).hexdigest()

    def run(self, scratch: str, tell: Callable[[float], None]) -> Any:
        """The result. `tell` hears the share of the job that is done."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)(self.settings, Path(scratch), tell)


@dataclass
class Plan:
    """Jobs, and where their results are kept: folder/jobs/NAME.json, complete or absent."""

    jobs: Sequence[Job]
    folder: Path

    def finished(self) -> dict[str, dict[str, Any]]:
        """What earlier calls with the same settings finished: name -> {"fingerprint", "result", "seconds"}."""
        found = {}
        for job in self.jobs:
            try:
                record = json.loads((self.folder / "jobs" / f"{job.name}.json").read_bytes())
            except (OSError, ValueError):
                continue
            if isinstance(record, dict) and record.get("fingerprint") == job.fingerprint:
                found[job.name] = record
        return found

    def seconds_left(self, at_once: int = 1) -> float:
        """The estimate for what is not finished, `at_once` jobs sharing this machine's cores without loss."""
        finished = self.finished()
        left = [job.seconds for job in self.jobs if job.name not in finished]
        return max([sum(left) / max(1, min(at_once, len(left) or 1)), *left], default=0.0)

    def ask(self, at_once: int, yes: bool) -> None:
        """Raises UserError, before anything is spent, for a plan of more than half an hour without `yes`."""
        seconds = self.seconds_left(at_once)
        if seconds > ASK_BEYOND and not yes:
            jobs = len(self.jobs) - len(self.finished())
            raise UserError(f"this plan would take about {duration(seconds)} on this machine ({jobs} jobs); nothing was started: "
                            "add --yes to start it, or ask for less (see --help)")

    def run(self, at_once: int = 1, ray: str | None = None, progress: Callable[..., None] | None = None) -> dict[str, Any]:
        """Do what is not finished; name -> result of all jobs. Raises UserError when it is interrupted."""
        done, clock = self.finished(), _Clock(self.jobs, progress)
        clock.jump(done)
        (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
        waiting = [job for job in self.jobs if job.name not in done]
        jobs = (self.folder / "jobs").absolute()
        scratch = lambda job: str(jobs / f"{job.name}.{job.fingerprint[:12]}.work")  # no job goes on from what other settings left
        runner = on_ray(ray, at_once) if ray is not None and waiting else in_processes(at_once) if at_once > 1 else here
        try:
            for job, result, seconds in runner(waiting, scratch, clock):
                record = {"fingerprint": job.fingerprint, "function": job.function, "settings": job.settings,
                          "seconds": round(seconds, 3), "result": result}
                replace(self.folder / "jobs" / f"{job.name}.json", json.dumps(record, indent=1) + "\n")
                for begun in jobs.glob(f"{job.name}.{'[0-9a-f]' * 12}.work"):
                    shutil.rmtree(begun, ignore_errors=True)
                done[job.name] = json.loads(json.dumps(record))  # what a resumed plan would read
                clock.jump(done)
        except KeyboardInterrupt:
            raise UserError(f"interrupted: {len(done)} of {len(self.jobs)} jobs are finished and kept in {self.folder}; "
                            "the same command goes on from there") from None
        return {job.name: done[job.name]["result"] for job in self.jobs}


Runner = Callable[[Sequence[Job], Callable[[Job], str], Any], Iterator[tuple[Job, Any, float]]]


def here(jobs: Sequence[Job], scratch: Callable[[Job], str], clock: _Clock) -> Iterator[tuple[Job, Any, float]]:
    """One after another, in this process."""
    for job in jobs:
        began = time.perf_counter()
        result = job.run(scratch(job), lambda share, job=job: clock.within(job, share))
        yield job, result, time.perf_counter() - began


def in_processes(at_once: int) -> Runner:
    """Several processes of this machine, which share its cores."""

    def run(jobs: Sequence[Job], scratch: Callable[[Job], str], clock: _Clock) -> Iterator[tuple[Job, Any, float]]:
        threads = max(1, processors() // at_once)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(at_once, context, initializer=_start_worker, initargs=(threads,)) as pool:
            running = {pool.submit(_timed, job, scratch(job)): job for job in jobs}
            try:
                while running:
                    for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        yield job, *future.result()
                    clock.tick()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return run


def on_ray(address: str, at_once: int) -> Runner:
    """A Ray cluster (Moritz et al. 2018), one core a job; at_once 1: as many as it has cores. "local": one started here.

    Prepared data lie in the plan's folder, which every node must see under the same path. Raises UserError.
    """
    from pellucid.data.ray_workers import Ray

    cluster = Ray(address)

    def run(jobs: Sequence[Job], scratch: Callable[[Job], str], clock: _Clock) -> Iterator[tuple[Job, Any, float]]:
        ray = cluster.connect()
        cores = int(ray.cluster_resources().get("CPU", 1))
        task = ray.remote(num_cpus=1, max_retries=2)(_timed)
        waiting, running = list(jobs), {}
        try:
            while waiting or running:
                while waiting and len(running) < (at_once if at_once > 1 else cores):
                    job = waiting.pop(0)
                    running[task.remote(job, scratch(job), 1)] = job
                for reference in ray.wait(list(running), timeout=1.0)[0]:
                    job = running.pop(reference)
                    try:
                        answer = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause if isinstance(error.cause, UserError) else RuntimeError(str(error)) from None
                    except ray.exceptions.RayError as error:
                        raise UserError(f"the job {job.name} was lost three times ({type(error).__name__}; out of memory?); "
                                        "what is finished is kept") from None
                    yield job, *answer
                clock.tick()
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    return run


def _timed(job: Job, scratch: str, threads: int = 0) -> tuple[Any, float]:
    """In a worker: (result, seconds)."""
    if threads:
        _limit_threads(threads)
    began = time.perf_counter()
    return job.run(scratch, lambda share: None), time.perf_counter() - began


def _start_worker(threads: int) -> None:
    """A share of the cores, and an end with the process that started it, however that ends."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _limit_threads(threads)


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


class _Clock:
    """Tells how far a plan is and how long it may still take: the estimates, corrected by how true they were so far."""

    def __init__(self, jobs: Sequence[Job], progress: Callable[..., None] | None):
        self.cost = {job.name: max(job.seconds, 1e-3) for job in jobs}
        self.total, self.progress = sum(self.cost.values()), progress
        self.done, self.jobs_done = 0.0, 0
        self.began: float | None = None
        self.at_start = 0.0

    def jump(self, finished: dict[str, Any]) -> None:
        self.done, self.jobs_done = sum(self.cost[name] for name in finished), len(finished)
        self.at_start = self.done if self.began is None else self.at_start
        self.began = self.began or time.perf_counter()
        self._show(self.done)

    def within(self, job: Job, share: float) -> None:
        self._show(self.done + share * self.cost[job.name])

    def tick(self) -> None:
        self._show(self.done)

    def _show(self, done: float) -> None:
        if self.progress is None:
            return
        elapsed, gained = time.perf_counter() - self.began, done - self.at_start
        left = (self.total - done) * (elapsed / gained if gained > 0 else 1.0)
        text = f"{self.jobs_done} of {len(self.cost)} jobs, {duration(left)} left"
        self.progress("measuring", round(1000 * done / self.total), 1000, text)


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3.5 h', '2.1 days'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} days"
