"""The share of time that observation may take, with a clock of the test's own."""

import itertools

import pytest
import torch

from pellucid.observe import budget as budgets
from pellucid.observe.budget import Budget


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [0.0]
    monkeypatch.setattr(budgets.time, "perf_counter", lambda: now[0])
    return now


def looked_at(share: float, cost: float, floor: int, clock, steps: int = 300) -> list[int]:
    """Steps of a second each at which a look of so many seconds was taken."""
    budget, taken = Budget(share, torch.device("cpu")), []
    for step in range(steps):
        if budget.affords("look", floor):
            with budget.spend("look"):
                clock[0] += cost
            taken.append(step)
        budget.earn(1.0)
    return taken


def test_a_look_waits_until_the_steps_have_earned_what_it_takes(clock):
    taken = looked_at(0.02, 0.2, 1000, clock)
    assert {b - a for a, b in itertools.pairwise(taken[1:])} == {10}, "0.2 s is what 10 steps earn"
    assert 0.2 * len(taken) <= 0.02 * 300
    assert looked_at(1.0, 0.2, 1000, clock) == list(range(300)), "a share of 1 takes all"


def test_on_a_gpu_a_look_takes_what_its_own_clock_says_once_it_is_done(clock, monkeypatch):
    """The host may wait inside for work that was there before: the GPU has only the look between the two events."""
    device = {"now": 0.0, "done": 0.0}

    class Event:
        def __init__(self, enable_timing): ...
        def record(self):
            self.at = device["now"]

        def query(self):
            return self.at <= device["done"]

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    budget = Budget(0.02, torch.device("cuda"))
    with budget.spend("look"):
        clock[0] += 5.0  # of which the host waited for most
        device["now"] += 0.25
    budget.settle()
    assert budget.spent == 0.0 and budget.costs == {}
    device["done"] = device["now"]
    budget.settle()
    assert budget.spent == 0.25 and budget.costs == {"look": 0.25}


def test_a_look_that_no_step_can_pay_for_still_comes_every_so_many_steps(clock):
    assert looked_at(1e-9, 0.2, 100, clock) == [0, 100, 200]
