"""Picture 2: who does the jobs. In this process, in several of this machine, or (ray_workers.py) in a cluster.

A worker process is `python -m pellucid.data.worker`, spoken to through its pipes: nothing of the caller's program
is run again in it, and it ends when the caller does. A worker that dies is replaced and goes on with its job.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Protocol

from pellucid.config import UserError
from pellucid.data.pipeline import Report, Setup

TRIES = 3
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # one job, one core
LENGTH = struct.Struct("<Q")


def processors() -> int:
    """How many this process may use; where the system does not say (macOS), how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(Protocol):
    """Does jobs, in any order, and gives out (job number, report) as they come."""

    def do(self, jobs: Iterable[Any], setup: Setup) -> Iterator[tuple[int, Report]]: ...


class InThisProcess:
    """One after another."""

    def do(self, jobs: Iterable[Any], setup: Setup) -> Iterator[tuple[int, Report]]:
        for number, job in enumerate(jobs):
            for report in job.run(setup):
                yield number, report


class Processes:
    """Several processes of this machine."""

    def __init__(self, count: int):
        self.count = count

    def do(self, jobs: Iterable[Any], setup: Setup) -> Iterator[tuple[int, Report]]:
        waiting = list(enumerate(jobs))
        todo: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for item in waiting:
            todo.put(item)
        said: queue.Queue[tuple[str, int, Any]] = queue.Queue(maxsize=1024)
        stop = threading.Event()
        at_work: dict[int, _Worker] = {}
        threads = [threading.Thread(target=_serve, args=(number, todo, said, setup, stop, at_work), daemon=True)
                   for number in range(min(self.count, len(waiting)))]
        for thread in threads:
            thread.start()
        try:
            left = len(waiting)
            while left:
                kind, number, value = said.get()
                if kind == "failed":
                    raise value
                if kind == "done":
                    left -= 1
                else:
                    yield number, value
        finally:
            stop.set()
            while any(thread.is_alive() for thread in threads):  # they may be waiting to say something, or to hear it
                for worker in list(at_work.values()):
                    worker.process.kill()
                with contextlib.suppress(queue.Empty):
                    said.get(timeout=0.05)


def _serve(place: int, todo: queue.SimpleQueue, said: queue.Queue, setup: Setup, stop: threading.Event,
           at_work: dict[int, _Worker]) -> None:
    """Keeps one worker process, at_work[place], busy until there is nothing left to do."""
    try:
        while not stop.is_set():
            try:
                number, job = todo.get_nowait()
            except queue.Empty:
                return
            died = 0  # times without getting on in between
            while not stop.is_set():
                try:
                    if place not in at_work:
                        at_work[place] = _Worker(setup)
                    for report in at_work[place].run(job):
                        said.put(("report", number, report))
                        before, job = job, job.after(report)
                        died = died if job is before else 0
                    break
                except (EOFError, OSError, pickle.UnpicklingError) as error:
                    why = f"exit code {at_work.pop(place).end()}" if place in at_work else str(error)
                    died += 1
                    if died == TRIES and not stop.is_set():
                        raise UserError(f"a worker process died {TRIES} times at the same work ({why}; out of "
                                        "memory?); set data.workers lower: what is done is kept") from None
            said.put(("done", number, None))
    except FailedThere as failure:
        said.put(("failed", -1, failure.error))
    except BaseException as error:
        said.put(("failed", -1, error))
    finally:
        if place in at_work:
            at_work.pop(place).end()


class _Worker:
    def __init__(self, setup: Setup):
        self.process = subprocess.Popen([sys.executable, "-P", "-m", "pellucid.data.worker"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env={**ONE_THREAD, **os.environ})
        self.unsaid: tuple[Setup, ...] = (setup,)

    def run(self, job: Any) -> Iterator[Report]:
        for value in (*self.unsaid, job):
            send(self.process.stdin, value)
        self.unsaid = ()
        while True:
            kind, value = receive(self.process.stdout)
            if kind == "done":
                return
            if kind == "failed":
                raise FailedThere(value)
            yield kind, value

    def end(self) -> int:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            return self.process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class FailedThere(Exception):
    """Carries an error out of a worker that is well."""

    def __init__(self, error: Exception):
        self.error = error


def send(stream: BinaryIO, value: Any) -> None:
    content = pickle.dumps(value, protocol=5)
    stream.write(LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """The next value. Raises EOFError when the other side is gone."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    size = LENGTH.unpack(head)[0]
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return pickle.loads(content)
