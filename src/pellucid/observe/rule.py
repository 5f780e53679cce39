"""What a rule is: a pure function of the recent past that yields findings; and all thresholds, in one table.

The rules themselves: rules_loss.py, rules_data.py, rules_updates.py, rules_experts.py; rules.py runs them.
docs/diagnosis.md has the confusion table of planted faults and healthy runs that these thresholds give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pellucid.observe.history import History

LIMITS = {
    "spike_sigmas": 6.0,  # OLMo-core's SpikeScore; of a loss by its last 64 differences, of a norm by its last 128 values
    "spike_window": 128,
    "spike_share": 0.1,  # and at least that far above the median: batches differ,
    "token_spread": 8.0,  # or that / sqrt(tokens): six deviations, where 64 tokens of text differ by a sixth
    "spike_steps": (1, 4),  # the last so many are judged by their mean: what stays is told from less than what one batch may have
    "update_spike": 4.0,  # times the median of update norm / learning rate
    "gradient_explosion": 10.0,  # times the median
    "gradient_vanishing": 1e-6,
    "vanished_steps": 5,
    "dead_steps": 100,
    "overload": 2.5,  # load, mean of 50 steps; E/k is the most there can be
    "easing": 0.95,  # of the load before: less, and the balance loss is at work
    "collapse": 0.45,  # share of experts effectively in use
    "total_collapse": 0.05,  # of the way from the least there can be, k/E, to all: what counts while routers settle
    "unmoved": 0.1,
    "clip_factor": 0.2,  # median over the clipped steps,
    "clipped_steps": 100,
    "ratio_high": 3e-2,
    "ratio_low": 1e-6,
    "recent": 20,  # steps whose mean or median is looked at, and that tell what is usual
    "rising": 0.4,  # nats above the best mean of the recent steps
    "impossible": 1.05,  # times the largest step that Adam's averages allow
    "staleness": 2.3,  # Wortsman et al. 2023
    "bad_document": 1.5,  # nats above the batch
    "hopeless": 0.05,  # nats above guessing: real text had 0.01 at most in development runs, planted noise 0.09 and more
    "unusual": 1.2,  # times the largest excess of a document's loss in the steps before, where guessing would be better,
    "telling": 32,  # and the document has so many tokens: a few are soon as bad
    "odd_document": 3.0,  # the same, where it would not
    "documents": 20,  # steps known before one is judged
    "held_out": 0.03,  # share above the best held-out loss
    "evaluations": 3,  # on the same rows
    "patience": 4,  # of them without a better one
    "gap": 0.1,  # share of the best held-out loss by which held-out and training loss moved apart meanwhile
    "related": 1.25,  # times chance; code, prose and plays have 1.5 to 20, whatever the tokenizer (bytes the least)
    "room": 2.0,  # times chance, that could be found at most; nearly all one token, and there is none
    "pairs": 40,  # expected by chance in 8 steps: with fewer, nothing can be told
    "starved": 0.3,  # median of the recent steps
    "repeated": 0.2,
    "context_steps": 200,
    "frequencies": (0.1, 0.2),  # nats below and above their entropy: one who knows only them is there
    "standing": 0.1,  # nats that the loss fell by in 40 steps, with one deviation: more, and it may be passing by
    "settling_steps": 100,  # routers begin uneven; their balance is judged later
    "frames": 3,  # of `param` in a row: one may be chance, and they may be FRAME_EVERY steps apart
}
FRAME_EVERY = 8  # steps at most from one frame of `param` to the next, whatever the observer's budget


@dataclass(frozen=True)
class Finding:
    """One sentence of evidence about one subject."""

    subject: str
    value: float
    threshold: float
    evidence: str


@dataclass(frozen=True)
class Rule:
    """severity: alarm (something is wrong) or warning (something is off). steps: how many it takes before it can judge; until then
    it is too early, which is not to say that all is well. after_warmup: those of the warm-up come on top. evaluations: of held-out
    text that it takes. adam: whether it reads Adam's averages, which other optimizers do not have."""

    name: str
    severity: str
    cause: str
    remedy: str
    source: str
    steps: int
    after_warmup: bool
    evaluations: int
    adam: bool
    check: Callable[[History], Iterator[Finding]]


RULES: list[Rule] = []


def rule(name: str, severity: str, *, cause: str, remedy: str, source: str, steps: int = 1, after_warmup: bool = False,
         evaluations: int = 0, adam: bool = False):  # fmt: skip
    """Registers a check as a rule."""

    def register(check):
        RULES.append(Rule(name, severity, cause, remedy, source, steps, after_warmup, evaluations, adam, check))
        return check

    return register


def center(values: np.ndarray) -> tuple[float, float]:
    """Median and a robust standard deviation (1.4826 times the median absolute deviation) of the finite values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    middle = float(np.median(values))
    return middle, 1.4826 * float(np.median(np.abs(values - middle)))
