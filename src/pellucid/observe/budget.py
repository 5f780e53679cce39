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
    """share: of step time. On an accelerator, events measure what the device spends besides."""

    def __init__(self, share: float, device: torch.device):
        self.share = share
        self.balance = 0.0  # seconds
        self.used_share = 0.0  # moving average of observe time / step time
        self.costs: dict[str, float] = {}
        self.steps = 0  # done
        self.done: dict[str, int] = {}  # step of each task's last turn
        self.spent = 0.0  # in the present step
        self._cuda = device.type == "cuda"
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event, float, str]] = []

    def earn(self, step_seconds: float) -> None:
        """At the end of a step: `step_seconds` of work without observation."""
        self._settle()
        total = step_seconds + self.spent
        if total > 0:
            self.used_share += 0.05 * (self.spent / total - self.used_share)
        self.balance = min(self.balance + self.share * step_seconds - self.spent, HORIZON * self.share * step_seconds)
        self.spent = 0.0
        self.steps += 1

    def affords(self, task: str, at_least_every: int | None = None) -> bool:
        """Whether to do `task` in this step: where it is affordable, or its last turn is so many steps ago."""
        overdue = at_least_every is not None and self.steps - self.done.get(task, -1) >= at_least_every
        # the first time its cost is not known: try it once there is something in the bucket
        if self.share < 1 and not overdue and self.balance < max(self.costs.get(task, 0.0), 1e-6):
            return False
        self.done[task] = self.steps
        return True

    @contextmanager
    def spend(self, task: str) -> Iterator[None]:
        """Time spent inside belongs to observation, and is remembered as the cost of `task`."""
        events = None
        if self._cuda:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        if events is not None:
            events[1].record()
            self._open.append((*events, seconds, task))
        self._account(task, seconds)

    def _account(self, task: str, seconds: float) -> None:
        self.spent += seconds
        self.costs[task] = max(seconds, 0.9 * self.costs.get(task, 0.0) + 0.1 * seconds)

    def _settle(self) -> None:
        """Add what the device took beyond the host, of the looks that have finished there."""
        waiting = []
        for start, stop, seconds, task in self._open:
            if not stop.query():
                waiting.append((start, stop, seconds, task))
            elif (extra := start.elapsed_time(stop) / 1e3 - seconds) > 0:
                self._account(task, extra)
        self._open = waiting
