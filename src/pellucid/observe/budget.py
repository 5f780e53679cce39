"""Keeps observation within its share of the run's time: every step earns a little, every look spends what it took.

A token bucket in seconds. What happens at every step is spent whether affordable or not; looks on a cadence (whole
tensors, histograms, attention) wait until the bucket holds what they took last time. So the cadence is measured, not set.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

HORIZON = 200  # steps whose earnings the bucket can hold


class Budget:
    """share: of step time. On a GPU its own clock measures a look, once it is done: the host may wait there for other work."""

    def __init__(self, share: float, device: torch.device):
        self.share = share
        self.balance = 0.0  # seconds
        self.used_share = 0.0  # moving average of observe time / step time
        self.costs: dict[str, float] = {}
        self.steps = 0  # done
        self.done: dict[str, int] = {}  # step of each task's last turn
        self.spent = 0.0  # in the present step
        self._cuda = device.type == "cuda"
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event, str]] = []

    def earn(self, step_seconds: float) -> None:
        """At the end of a step: `step_seconds` of work without observation."""
        self.settle()
        total = step_seconds + self.spent
        if total > 0:
            self.used_share += 0.05 * (self.spent / total - self.used_share)
        self.balance = min(self.balance + self.share * step_seconds - self.spent, HORIZON * self.share * step_seconds)
        self.spent = 0.0
        self.steps += 1

    def affords(self, task: str, at_least_every: int) -> bool:
        """Whether to do `task` in this step: where it is affordable, its last turn is so many steps ago, or it never had one.

        So the shortest run has a look of every kind, and its cost is known from the first step on.
        """
        self.settle()
        overdue = task not in self.done or self.steps - self.done[task] >= at_least_every
        if self.share < 1 and not overdue and self.balance < max(self.costs.get(task, 0.0), 1e-6):
            return False
        self.done[task] = self.steps
        return True

    @contextmanager
    def spend(self, task: str) -> Iterator[None]:
        """Time spent inside belongs to observation, and is remembered as the cost of `task`."""
        if self._cuda:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._open.append((start, stop, task))
        else:
            started = time.perf_counter()
            yield
            self._account(task, time.perf_counter() - started)

    def _account(self, task: str, seconds: float) -> None:
        self.spent += seconds
        self.costs[task] = max(seconds, 0.9 * self.costs.get(task, 0.0) + 0.1 * seconds)

    def settle(self) -> None:
        """Account for the looks that the GPU has finished."""
        waiting = []
        for start, stop, task in self._open:
            if stop.query():
                self._account(task, start.elapsed_time(stop) / 1e3)
            else:
                waiting.append((start, stop, task))
        self._open = waiting
