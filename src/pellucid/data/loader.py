"""Picture 2, loader: the batches of a run one after another, each rank its slice, made ahead of time by a thread.

Which rows a step holds is a pure function (order.py), so nothing is remembered but the number of the next sample:
any number of ranks gives the same global batches, and a state saved under one number goes on under another.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

from pellucid.config import UserError
from pellucid.data.dataset import Batch, Split


class Loader:
    """Iterate for the batches of rank `rank` of `world_size`: rows rank*B/W.. of each global batch of B rows.

    `prefetch` batches are made ahead in a thread (0: none). `state()` is that of the batch to come; `restore` goes on
    there. Raises UserError when batch_size is not a multiple of world_size. Close it, or use it as a context.
    """

    def __init__(self, split: Split, batch_size: int, *, rank: int = 0, world_size: int = 1, prefetch: int = 2):
        if batch_size % world_size or not 0 <= rank < world_size:
            raise UserError(f"training.batch_size = {batch_size}: not a multiple of the {world_size} processes that share "
                            "each batch; change one of them")
        self.split, self.batch_size, self.prefetch = split, batch_size, prefetch
        self.rank, self.world_size = rank, world_size
        self.next_sample = 0  # of the global batch to come
        self._ready: queue.Queue[Any] | None = None
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self.prefetch:
            batch = self._slice(self.next_sample)
        else:
            if self._ready is None:
                self._start()
            batch = self._ready.get()
            if isinstance(batch, BaseException):
                self.close()
                raise batch
        self.next_sample += self.batch_size
        return batch

    def batch(self, step: int) -> Batch:
        """The batch of a step of the run; at hand already where steps come one after another."""
        if self.next_sample != step * self.batch_size:
            self.close()
            self.next_sample = step * self.batch_size
        return next(self)

    def state(self) -> dict[str, Any]:
        """Where the run is: JSON values, well under 1 kB, the same on every rank."""
        return {"fingerprint": self.split.fingerprint, "seed": self.split.seed, "batch_size": self.batch_size,
                "next_sample": self.next_sample, "mixture_so_far": self._mixture_before(self.next_sample)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a state says, with any number of ranks. Raises UserError if it belongs to other data or order."""
        if state["fingerprint"] != self.split.fingerprint:
            raise UserError("the data differ from those the run was trained on (fingerprint "
                            f"{self.split.fingerprint[:12]}, the run's is {state['fingerprint'][:12]}): "
                            "give the same data, or begin a new run")
        if state["seed"] != self.split.seed:
            raise UserError(f"training.seed is {self.split.seed}, the run's is {state['seed']}: the order would be another")
        if self.split.mixture and state["batch_size"] != self.batch_size:
            raise UserError(f"training.batch_size is {self.batch_size}, the run's is {state['batch_size']}: under "
                            "data.mixture the two must be the same")
        if self._mixture_before(state["next_sample"]) != state["mixture_so_far"]:
            raise UserError("data.mixture differs for steps already done; change only what comes after step "
                            f"{state['next_sample'] // self.batch_size}")
        self.close()
        self.next_sample = state["next_sample"]

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        while self._ready is not None and self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue
        self._ready = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _slice(self, sample: int) -> Batch:
        size = self.batch_size // self.world_size
        start = sample + self.rank * size
        return self.split.samples(start, start + size, self.batch_size)

    def _start(self) -> None:
        self._ready, self._stop = queue.Queue(maxsize=self.prefetch), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(self.next_sample, self._ready, self._stop), daemon=True)
        self._thread.start()

    def _work(self, sample: int, ready: queue.Queue[Any], stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                ready.put(self._slice(sample))
                sample += self.batch_size
        except BaseException as error:  # shown to the one who waits for the batch
            ready.put(error)

    def _mixture_before(self, sample: int) -> str:
        segments = [[s.from_step, s.shares] for s in self.split.mixture if s.from_step * self.batch_size < sample]
        return hashlib.sha256(json.dumps(segments).encode()).hexdigest()[:16]
