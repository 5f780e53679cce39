"""Rules on the loss: spikes, a rise, nothing learnt from context, overfitting, numbers that are none.

Read with rule.py, which has the thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pellucid.observe.columns import INDEX
from pellucid.observe.history import WINDOW, History
from pellucid.observe.rule import LIMITS, Finding, center, rule


@rule("loss_spike", "alarm", cause="unusual documents in this batch, or a too large update in the last 1 to 8 steps",
      remedy="look at the documents (pellucid trace RUN --step N); lower the learning rate or beta2 if spikes recur",
      source="OLMo-core SpikeScore; Wortsman et al. 2023, arXiv 2304.13013", steps=LIMITS["recent"] + min(LIMITS["spike_steps"]))
def loss_spike(h: History) -> Iterator[Finding]:
    for steps in LIMITS["spike_steps"]:
        losses = h.scalars("loss", 64 + steps)
        if len(losses) < LIMITS["recent"] + steps:
            return
        before, now = losses[:-steps], float(np.mean(losses[-steps:]))
        middle, _ = center(before[-16:])  # a window of a hundred steps would take the fall of the loss for its spread
        _, sigma = center(np.diff(before))
        share = max(LIMITS["spike_share"], LIMITS["token_spread"] / math.sqrt(steps * h.run.tokens_per_step))
        unsure = sigma / math.sqrt(2) * math.sqrt(1 / steps + math.pi / 2 / 16)  # of a mean less a median of 16
        limit = middle + max(LIMITS["spike_sigmas"] * unsure, share * abs(middle))
        if now > limit:
            of = f"mean loss of {steps} steps" if steps > 1 else "loss"
            yield Finding("run", now, limit, f"{of} {now:.4g}; the 16 steps before had {middle:.4g}")
            return


@rule("loss_rising", "alarm", cause="the learning rate is too high for this stage, or the data changed",
      remedy="go back to a checkpoint before the rise with a lower learning rate; compare sources (stream `source`)",
      source="Chowdhery et al. 2022 (PaLM), section 5.1", steps=LIMITS["recent"])
def loss_rising(h: History) -> Iterator[Finding]:
    losses = h.scalars("loss", LIMITS["recent"])
    if len(losses) < LIMITS["recent"]:
        return
    mean = float(np.mean(losses))
    limit = h.best_loss + LIMITS["rising"]
    h.best_loss = min(h.best_loss, mean)
    if mean > limit:
        yield Finding("run", mean, limit, f"mean loss of {len(losses)} steps {mean:.4g}, its lowest was {limit - LIMITS['rising']:.4g}")


@rule("context_unused", "warning", cause="the model makes nothing of its inputs: it learns too slowly, or does not see them",
      remedy="raise optimizer.learning_rate or the batch; look at inputs and targets of a batch (pellucid data inspect)",
      source="a model that only knows word frequencies has exactly the entropy of its targets", steps=LIMITS["context_steps"] + 1)
def context_unused(h: History) -> Iterator[Finding]:
    losses = h.scalars("loss", 80)
    if h.unigram_entropy is None or h.step < LIMITS["context_steps"] or len(losses) < 80:
        return
    before, mean = float(np.mean(losses[:40])), float(np.mean(losses[40:]))
    below, above = LIMITS["frequencies"]
    there = -below < mean - h.unigram_entropy < above  # far above it the model is slow, not without context
    _, sigma = center(np.diff(losses))
    unsure = sigma / math.sqrt(40)  # one deviation of a difference of two means of 40
    if there and before - mean + unsure < LIMITS["standing"]:
        yield Finding("run", mean, h.unigram_entropy - below, f"after {h.step} steps the loss stands at {mean:.4g}, no better than "
                      f"word frequencies alone ({h.unigram_entropy:.4g})")  # fmt: skip


@rule("non_finite", "alarm", cause="overflow, a division by zero, or damaged data; a first sign often is a growing norm",
      remedy="see which tensor was first; lower the learning rate; look at the documents of this step",
      source="IEEE 754: NaN spreads through every later sum")
def non_finite(h: History) -> Iterator[Finding]:
    if "run" in h.fresh and h.scalars("applied", 1)[-1] == 0:
        loss, norm = h.scalars("loss", 1)[-1], h.scalars("gradient_norm", 1)[-1]
        yield Finding("run", math.nan, 0, f"loss {loss:.4g}, gradient norm {norm:.4g}: the step was skipped")
    for name in ("weight_nonfinite", "gradient_nan", "gradient_inf"):
        counts = h.now("param", name)
        if counts is None:
            continue
        for i in np.flatnonzero(counts[:-1] > 0)[:3]:
            yield Finding(h.run.param_rows[i].name, counts[i], 0, f"{name.replace('_', ' ')}: {counts[i]:.0f} elements")


@rule("overfitting", "warning", cause="the model learns its training text by heart",
      remedy="stop here (the best checkpoint is kept), add data, or regularise", source="Prechelt 1998, early stopping",
      evaluations=LIMITS["evaluations"])
def overfitting(h: History) -> Iterator[Finding]:
    if "evaluation" not in h.fresh:
        return
    column = INDEX["evaluation"]
    frames = h.windows["evaluation"].last(WINDOW)[:, 0]
    size = frames[:, [column["tokens"], column["documents"]]].view(np.uint32)
    alike = (size == size[-1]).all(1)  # the last one takes all rows: its loss is not comparable
    losses, gaps = frames[alike, column["loss"]], frames[alike, column["gap"]]
    at = int(np.argmin(losses))
    best, limit = float(losses[at]), float(losses[at]) * (1 + LIMITS["held_out"])
    if len(losses) >= LIMITS["evaluations"] and losses[-1] > losses[-2] and losses[-1] > limit:
        yield Finding("run", losses[-1], limit, f"held-out loss {losses[-1]:.4g}, best was {best:.4g}, and rising")
    elif len(losses) - 1 - at >= LIMITS["patience"] and gaps[-1] - gaps[at] > LIMITS["gap"] * best:
        yield Finding("run", losses[-1], best, f"held-out loss {losses[-1]:.4g}, {len(losses) - 1 - at} evaluations without one "
                      f"below {best:.4g}, while the training loss fell away from it by {gaps[-1] - gaps[at]:.3g}")  # fmt: skip
