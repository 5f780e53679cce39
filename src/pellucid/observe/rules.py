"""Rules: what the numbers say, why, what to try, and who found it out. Pure functions of the recent past.

A rule yields findings; `Watch` turns them into events, at most one per rule and subject every QUIET steps. Thresholds
are in LIMITS, with what they were set by; docs/diagnosis.md has the confusion table of planted faults and healthy runs.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pellucid.observe.history import History, Run, measured
from pellucid.observe.store import Record

QUIET = 100  # steps before the same alarm may sound again
LIMITS = {
    "spike_sigmas": 6.0,  # OLMo-core's SpikeScore
    "spike_window": 128,
    "spike_share": 0.1,  # and at least that far above the median: batches differ
    "update_spike": 4.0,  # times the median of update norm / learning rate
    "gradient_explosion": 10.0,  # times the median
    "gradient_vanishing": 1e-6,
    "dead_steps": 100,
    "overload": 2.5,  # load, mean of 50 steps; E/k is the most there can be
    "collapse": 0.45,  # experts effectively in use
    "unmoved": 0.1,
    "clip_factor": 0.2,  # median over 100 steps
    "ratio_high": 3e-2,
    "ratio_low": 1e-6,
    "rising": 0.4,  # nats above the best mean of 20 steps
    "staleness": 2.3,  # Wortsman et al. 2023
    "held_out": 0.03,  # share above the best held-out loss
    "starved": 0.3,
    "repeated": 0.2,
    "context_steps": 200,
    "settling_steps": 100,  # routers begin uneven; their balance is judged later
    "frames": 3,  # of `param` in a row: one may be chance, and they may be 16 steps apart
}


@dataclass(frozen=True)
class Finding:
    """One sentence of evidence about one subject."""

    subject: str
    value: float
    threshold: float
    evidence: str


@dataclass(frozen=True)
class Rule:
    """severity: alarm (something is wrong) or warning (something is off)."""

    name: str
    severity: str
    cause: str
    remedy: str
    source: str
    check: Callable[[History], Iterator[Finding]]


RULES: list[Rule] = []


def rule(name: str, severity: str, *, cause: str, remedy: str, source: str):
    """Registers a check as a rule."""

    def register(check):
        RULES.append(Rule(name, severity, cause, remedy, source, check))
        return check

    return register


def _center(values: np.ndarray) -> tuple[float, float]:
    """Median and a robust standard deviation (1.4826 times the median absolute deviation) of the finite values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    middle = float(np.median(values))
    return middle, 1.4826 * float(np.median(np.abs(values - middle)))


# --------------------------------------------------------------------------------------------- loss and steps


@rule("loss_spike", "alarm", cause="unusual documents in this batch, or a too large update in the last 1 to 8 steps",
      remedy="look at the documents (pellucid trace RUN --step N); lower the learning rate or beta2 if spikes recur",
      source="OLMo-core SpikeScore; Wortsman et al. 2023, arXiv 2304.13013")
def loss_spike(h: History) -> Iterator[Finding]:
    losses = h.scalars("loss", LIMITS["spike_window"] + 1)
    middle, sigma = _center(losses[:-1])
    limit = middle + max(LIMITS["spike_sigmas"] * sigma, LIMITS["spike_share"] * abs(middle))
    if len(losses) > 20 and losses[-1] > limit:
        yield Finding("run", losses[-1], limit, f"loss {losses[-1]:.4g}; the {len(losses) - 1} steps before had {middle:.4g}")


@rule("bad_document", "alarm", cause="a document unlike the rest: noise, another language, a broken or poisoned file",
      remedy="see its text with pellucid trace RUN --step N; remove it or filter its source",
      source="OLMo 2 (arXiv 2501.00656) on repeated n-grams and spikes")
def bad_document(h: History) -> Iterator[Finding]:
    losses = h.scalars("loss", 20)
    limit = 1.1 * math.log(h.run.vocab_size)
    if h.worst_document is not None and len(losses) == 20 and np.nanmedian(losses) < 0.75 * limit:
        loss, row, segment = h.worst_document
        if loss > limit:
            yield Finding(f"row {row}, piece {segment}", loss, limit,
                          f"mean loss {loss:.3g} on one document, worse than guessing every token ({limit:.3g})")


@rule("loss_rising", "alarm", cause="the learning rate is too high for this stage, or the data changed",
      remedy="go back to a checkpoint before the rise with a lower learning rate; compare sources (stream `source`)",
      source="Chowdhery et al. 2022 (PaLM), section 5.1")
def loss_rising(h: History) -> Iterator[Finding]:
    losses = h.scalars("loss", 20)
    if len(losses) < 20:
        return
    mean = float(np.mean(losses))
    limit = h.best_loss + LIMITS["rising"]
    h.best_loss = min(h.best_loss, mean)
    if mean > limit:
        yield Finding("run", mean, limit, f"mean loss of 20 steps {mean:.4g}, its lowest was {limit - LIMITS['rising']:.4g}")


@rule("context_unused", "alarm", cause="targets do not follow from inputs: shuffled labels, a wrong shift, broken text",
      remedy="look at inputs and targets of a batch (pellucid data inspect); check tokenizer and data stages",
      source="a model that only knows word frequencies has exactly the entropy of its targets")
def context_unused(h: History) -> Iterator[Finding]:
    losses = h.scalars("loss", 40)
    if h.unigram_entropy is None or h.step < LIMITS["context_steps"] or len(losses) < 40:
        return
    mean, limit = float(np.mean(losses)), h.unigram_entropy - 0.1
    if mean > limit:
        yield Finding("run", mean, limit, f"after {h.step} steps the loss {mean:.4g} is still no better than word "
                      f"frequencies alone ({h.unigram_entropy:.4g})")  # fmt: skip


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


# -------------------------------------------------------------------------------------------------- gradients


@rule("gradient_explosion", "alarm", cause="the loss is steep here: unusual data, too high a learning rate, stale moments",
      remedy="clip gradients; lower the learning rate; look at the documents", source="Pascanu et al. 2013, arXiv 1211.5063")
def gradient_explosion(h: History) -> Iterator[Finding]:
    norms = h.scalars("gradient_norm", LIMITS["spike_window"] + 1)
    middle, sigma = _center(norms[:-1])
    limit = max(LIMITS["gradient_explosion"] * middle, middle + LIMITS["spike_sigmas"] * sigma)
    if len(norms) > 20 and norms[-1] > limit:
        yield Finding("run", norms[-1], limit, f"gradient norm {norms[-1]:.4g}, {norms[-1] / middle:.0f} times the usual")


@rule("gradient_vanishing", "alarm", cause="nothing to learn from: labels masked, a detached graph, dead activations",
      remedy="check that targets are not all ignored and that no part of the model is detached",
      source="Hochreiter et al. 2001")
def gradient_vanishing(h: History) -> Iterator[Finding]:
    norms = h.scalars("gradient_norm", 5)
    if len(norms) == 5 and (norms < LIMITS["gradient_vanishing"]).all():
        yield Finding("run", norms[-1], LIMITS["gradient_vanishing"], f"gradient norm {norms[-1]:.3g} for 5 steps")


@rule("clipping_always", "warning", cause="the limit is far below the gradients' usual size: clipping sets the step size",
      remedy="raise training.gradient_clip to about the median norm, or lower the learning rate",
      source="Ramezani et al. 2025 (AdaGC), arXiv 2502.11034")
def clipping_always(h: History) -> Iterator[Finding]:
    factors = h.scalars("clip_factor", 100)
    if len(factors) == 100 and np.mean(factors < 1) >= 0.95 and np.median(factors) < LIMITS["clip_factor"]:
        middle = float(np.median(factors))
        yield Finding("run", middle, LIMITS["clip_factor"], f"clipped at every step; half of them to less than {middle:.2f}")


# ---------------------------------------------------------------------------------------------------- updates


@rule("update_spike", "alarm", cause="Adam's second moment lags behind a sudden gradient; the loss may follow in 1 to 8 steps",
      remedy="lower beta2 or the learning rate; clip updates", source="Wortsman et al. 2023, arXiv 2304.13013")
def update_spike(h: History) -> Iterator[Finding]:
    if "param" not in h.fresh:
        return
    norms, rates = h.scalars("update_norm", 65), h.scalars("learning_rate", 65)
    known = np.isfinite(norms) & (norms > 0) & (rates > 0)
    relative = norms[known] / rates[known]
    middle, sigma = _center(relative[:-1])
    limit = max(LIMITS["update_spike"] * middle, middle + LIMITS["spike_sigmas"] * sigma)
    if len(relative) > 10 and known[-1] and relative[-1] > limit:
        yield Finding("run", relative[-1], limit, f"update norm per learning rate {relative[-1]:.4g}, usually {middle:.4g}")


@rule("stale_moments", "warning", cause="gradients grew faster than Adam's second moment follows",
      remedy="lower beta2; warm up longer", source="Wortsman et al. 2023, arXiv 2304.13013")
def stale_moments(h: History) -> Iterator[Finding]:
    staleness = h.table("param", "staleness", 2)
    if "param" in h.fresh and h.age > 20 and len(staleness) == 2 and (staleness[:, -1] > LIMITS["staleness"]).all():
        yield Finding("run", staleness[-1, -1], LIMITS["staleness"], f"sqrt(mean(g^2/v)) is {staleness[-1, -1]:.3g} over all")


@rule("learning_rate_high", "alarm", cause="weights change by percents at every step",
      remedy="divide optimizer.learning_rate by 3 to 10", source="Karpathy, makemore part 3 (1e-3 rule); arXiv 2305.17212")
def learning_rate_high(h: History) -> Iterator[Finding]:
    ratios = h.table("param", "update_ratio", LIMITS["frames"])
    if "param" in h.fresh and len(ratios) == LIMITS["frames"] and (ratios[:, -1] > LIMITS["ratio_high"]).all():
        yield Finding("run", ratios[-1, -1], LIMITS["ratio_high"], f"update/weight ratio {ratios[-1, -1]:.3g}, 1e-3 is usual")


@rule("learning_rate_low", "warning", cause="the learning rate is so small that nothing is learnt",
      remedy="raise optimizer.learning_rate", source="Karpathy, makemore part 3; SageMaker Debugger WeightUpdateRatio")
def learning_rate_low(h: History) -> Iterator[Finding]:
    ratios = h.table("param", "update_ratio", LIMITS["frames"])[:, -1:]
    past_warmup = h.step > h.run.warmup_steps + 20
    if "param" in h.fresh and past_warmup and len(ratios) == LIMITS["frames"] and (ratios < LIMITS["ratio_low"]).all():
        yield Finding("run", ratios[-1, 0], LIMITS["ratio_low"], f"update/weight ratio {ratios[-1, 0]:.3g}, 1e-3 is usual")


@rule("frozen_tensor", "alarm", cause="it has a gradient and does not move: not in the optimizer, or overwritten",
      remedy="check the optimizer's parameter groups and what happens after its step", source="DeepSpeed issue 8354")
def frozen_tensor(h: History) -> Iterator[Finding]:
    gradients, updates = h.table("param", "gradient_norm", 2), h.table("param", "update_norm", 2)
    if "param" not in h.fresh or len(updates) < 2 or not (updates[:, -1] > 0).all():
        return
    frozen = ((updates == 0) & (gradients > 0)).all(0)
    for i in np.flatnonzero(frozen[:-1])[:5]:
        yield Finding(h.run.param_rows[i].name, 0.0, 0.0, f"gradient norm {gradients[-1, i]:.3g}, update exactly 0")


@rule("ghost_update", "alarm", cause="momentum or decay moves weights that no token of this step has used",
      remedy="leave experts without tokens, and tensors without gradient, out of the update",
      source="PaddleFormers issue 4405")
def ghost_update(h: History) -> Iterator[Finding]:
    ghosts = h.now("router", "ghost")
    if ghosts is not None and measured(ghosts).all():
        updates, E = h.now("router", "update_norm"), h.run.experts
        for i in np.flatnonzero(ghosts > 0)[:3]:
            yield Finding(f"layers.{i // E}.experts.{i % E}", updates[i], 0.0, f"no token came, yet it moved by {updates[i]:.3g}")
    updates, gradients = h.now("param", "update_norm"), h.now("param", "gradient_norm")
    if updates is not None:
        idle = ~measured(gradients) | (gradients == 0)
        for i in np.flatnonzero(idle & (updates > 0)):
            if h.run.param_rows[i].expert is None:
                yield Finding(h.run.param_rows[i].name, updates[i], 0.0, f"no gradient, yet it moved by {updates[i]:.3g}")


@rule("swallowed_updates", "alarm", cause="steps are smaller than the weights' last bit: bf16 weights without fp32 masters",
      remedy="keep fp32 master weights (training.precision = \"bf16\" does), or raise the learning rate",
      source="IEEE formats: bf16 keeps 8 bits; a change below 2^-9 of a weight is lost")
def swallowed_updates(h: History) -> Iterator[Finding]:
    unmoved, rates = h.table("param", "unmoved", LIMITS["frames"])[:, -1], h.scalars("learning_rate", 5)
    if "param" in h.fresh and len(unmoved) == LIMITS["frames"] and (unmoved > LIMITS["unmoved"]).all() and (rates > 0).all():
        yield Finding("run", unmoved[-1], LIMITS["unmoved"], f"{unmoved[-1]:.0%} of the weights with a gradient did not move")


# --------------------------------------------------------------------------------------------------- experts


@rule("dead_expert", "alarm", cause="the router never chooses it, so it never learns to be chosen",
      remedy="raise training.balance_loss_weight or balance_bias_rate; add router z-loss",
      source="Fedus et al. 2021 (Switch), arXiv 2101.03961")
def dead_expert(h: History) -> Iterator[Finding]:
    idle = h.now("router", "idle_steps")
    if idle is not None:
        for i in np.flatnonzero(idle >= LIMITS["dead_steps"])[:5]:
            subject = f"layers.{i // h.run.experts}.experts.{i % h.run.experts}"
            yield Finding(subject, idle[i], LIMITS["dead_steps"], f"no token for {idle[i]:.0f} steps")


@rule("overloaded_expert", "warning", cause="the router prefers one expert; others learn little, and it becomes the bottleneck",
      remedy="raise training.balance_loss_weight or balance_bias_rate", source="Wang et al. 2024, arXiv 2408.15664")
def overloaded_expert(h: History) -> Iterator[Finding]:
    load = h.table("router", "load", 50)
    settled = h.step >= LIMITS["settling_steps"]
    if settled and len(load) == 50 and h.run.experts > h.run.experts_per_token:
        mean = load.mean(0)
        limit = min(LIMITS["overload"], 0.9 * h.run.experts / h.run.experts_per_token)
        for i in np.flatnonzero(mean > limit)[:5]:
            subject = f"layers.{i // h.run.experts}.experts.{i % h.run.experts}"
            yield Finding(subject, mean[i], limit, f"{mean[i]:.2f} times its fair load over 50 steps")


@rule("router_collapse", "alarm", cause="all tokens go to the same few experts",
      remedy="raise training.balance_loss_weight; lower the router's learning rate; add router z-loss",
      source="Zoph et al. 2022 (ST-MoE), arXiv 2202.08906")
def router_collapse(h: History) -> Iterator[Finding]:
    used = h.table("layer", "load_entropy", 20)
    if len(used) == 20 and h.run.experts > h.run.experts_per_token:
        mean = used.mean(0)
        for i in np.flatnonzero(mean < LIMITS["collapse"]):
            yield Finding(f"layers.{i}", mean[i], LIMITS["collapse"], f"{mean[i] * h.run.experts:.1f} experts effectively in use")


# ------------------------------------------------------------------------------------------------------ data


@rule("overfitting", "warning", cause="the model learns its training text by heart",
      remedy="stop here (the best checkpoint is kept), add data, or regularise", source="Prechelt 1998, early stopping")
def overfitting(h: History) -> Iterator[Finding]:
    if "evaluation" not in h.fresh:
        return
    losses = h.table("evaluation", "loss", 3)[:, 0]
    limit = h.best_held_out * (1 + LIMITS["held_out"])
    h.best_held_out = min(h.best_held_out, float(losses[-1]))
    if len(losses) == 3 and losses[-1] > losses[-2] and losses[-1] > limit:
        yield Finding("run", losses[-1], limit, f"held-out loss {losses[-1]:.4g}, best was {h.best_held_out:.4g}, and rising")


@rule("repeated_data", "warning", cause="the same rows come again within an epoch: duplicates in the sources or a stuck loader",
      remedy="deduplicate the sources; check weights of small sources", source="Hernandez et al. 2022, arXiv 2205.10487")
def repeated_data(h: History) -> Iterator[Finding]:
    if h.repeated_share is not None and h.repeated_share > LIMITS["repeated"]:
        yield Finding("run", h.repeated_share, LIMITS["repeated"], f"{h.repeated_share:.0%} of recent rows had been seen before")


@rule("data_starvation", "warning", cause="the step waits for its batch", remedy="prepare data on a faster disk; use packed shards",
      source="TraceML's verdicts")
def data_starvation(h: History) -> Iterator[Finding]:
    data, steps = h.scalars("data_seconds", 20), h.scalars("step_seconds", 20)
    if len(data) == 20 and np.isfinite(data).all():
        share = float(data.sum() / steps.sum())
        if share > LIMITS["starved"]:
            yield Finding("run", share, LIMITS["starved"], f"{share:.0%} of the time goes into waiting for data")


# ------------------------------------------------------------------------------------------------------ watch


class Watch:
    """Runs all rules on every step's record and keeps each from repeating itself."""

    def __init__(self, run: Run):
        self.history = History(run)
        self._quiet: dict[tuple[str, str], int] = {}
        self._hashes: deque[set[int]] = deque()
        self._repeats: deque[float] = deque(maxlen=20)

    @classmethod
    def of_run(cls, config: Any, rows: list, layers: int, experts: int, vocab_size: int, rows_per_epoch: int | None):
        return cls(Run(rows, layers, experts, config.model.num_experts_per_tok, vocab_size, config.schedule.warmup_steps,
                       config.training.gradient_clip, rows_per_epoch, config.training.batch_size))  # fmt: skip

    def judge(self, record: Record, *, row_hashes: list[int] | None = None, unigram_entropy: float | None = None) -> list[dict]:
        """Events (columns of the table `event`) that this step's record gives rise to."""
        h = self.history
        h.push(record.step, record.frames)
        h.worst_document = _worst_document(record)
        h.unigram_entropy = unigram_entropy if unigram_entropy is not None else h.unigram_entropy
        h.repeated_share = self._repeated(row_hashes) if row_hashes is not None else None
        events = []
        with np.errstate(all="ignore"):
            for rule in RULES:
                for finding in rule.check(h):
                    if self._may_sound(rule.name, finding.subject, record.step):
                        events.append(_event(rule, finding))
        return events

    def _may_sound(self, name: str, subject: str, step: int) -> bool:
        last = self._quiet.get((name, subject))
        if last is not None and step - last < QUIET:
            return False
        self._quiet[(name, subject)] = step
        return True

    def _repeated(self, hashes: list[int]) -> float | None:
        """Share of the last 20 steps' rows that had come before, within half an epoch."""
        run = self.history.run
        if run.rows_per_epoch is None:
            return None
        reach = min(512, int(0.5 * run.rows_per_epoch / max(1, len(hashes))))
        if reach < 20:
            return None
        seen = set().union(*self._hashes) if self._hashes else set()
        own = set(hashes)
        repeats = len(hashes) - len(own) + len(own & seen)
        self._repeats.append(repeats / max(1, len(hashes)))
        self._hashes.append(own)
        while len(self._hashes) > reach:
            self._hashes.popleft()
        return sum(self._repeats) / len(self._repeats) if len(self._repeats) == 20 else None


def _worst_document(record: Record) -> tuple[float, int, int] | None:
    rows = next((rows for statement, rows in record.rows if "document_loss" in statement), [])
    losses = [(loss, row, segment) for _, row, segment, tokens, loss, _ in rows if tokens >= 8 and math.isfinite(loss)]
    return max(losses) if losses else None


def _event(rule: Rule, finding: Finding) -> dict:
    value = float(finding.value)
    return {
        "rule": rule.name, "severity": rule.severity, "subject": finding.subject,
        "value": value if math.isfinite(value) else None, "threshold": float(finding.threshold), "text": finding.evidence,
        "detail": json.dumps({"cause": rule.cause, "try": rule.remedy, "source": rule.source}),
    }  # fmt: skip
