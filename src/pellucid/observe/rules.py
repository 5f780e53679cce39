"""All rules at work: what the numbers say, why, what to try, and who found it out.

A rule (rule.py) yields findings; `Watch` turns them into events, at most one per rule and subject every QUIET steps.
"""

from __future__ import annotations

import json
import math
from collections import deque
from typing import Any

import numpy as np

from pellucid.observe import rules_data, rules_experts, rules_loss, rules_updates  # noqa: F401  (they register their rules)
from pellucid.observe.history import Document, History, Run
from pellucid.observe.rule import LIMITS, RULES, Finding, Rule
from pellucid.observe.store import Record

__all__ = ["RULES", "Rule", "Watch"]
QUIET = 100  # steps before the same alarm may sound again


class Watch:
    """Runs all rules on every step's record and keeps each from repeating itself."""

    def __init__(self, run: Run):
        self.history = History(run)
        self._quiet: dict[tuple[str, str], int] = {}
        self._hashes: deque[set[int]] = deque()
        self._repeats: deque[float] = deque(maxlen=LIMITS["recent"])
        self._epoch = 0

    @classmethod
    def of_run(cls, config: Any, rows: list, layers: int, experts: int, vocab_size: int, rows_per_epoch: int | None):
        tokens_per_step = config.training.batch_size * config.data.sequence_length
        return cls(Run(rows, layers, experts, config.model.num_experts_per_tok, vocab_size, config.schedule.warmup_steps,
                       config.training.gradient_clip, rows_per_epoch, tokens_per_step))  # fmt: skip

    def judge(
        self, record: Record, *, row_hashes: list[int] | None = None, pairs: np.ndarray | None = None,
        unigram_entropy: float | None = None,
    ) -> list[dict]:  # fmt: skip
        """Events (columns of the table `event`) that this step's record gives rise to. pairs: int [inputs and targets, n]."""
        h = self.history
        h.push(record.step, record.frames)
        h.worst_document = _worst_document(record, h)
        if h.worst_document is not None:
            h.document_excess.append(h.worst_document.excess)
        h.unigram_entropy = unigram_entropy if unigram_entropy is not None else h.unigram_entropy
        if pairs is not None:
            h.equal_pairs.append(equal_pairs(*pairs))
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
        """Share of the recent steps' rows that had come before, within half an epoch and in the same."""
        run = self.history.run
        if run.rows_per_epoch is None:
            return None
        reach = min(512, int(0.5 * run.rows_per_epoch / max(1, len(hashes))))
        if reach < LIMITS["recent"]:
            return None
        epoch = (self.history.step + 1) * len(hashes) // run.rows_per_epoch
        if epoch != self._epoch:
            self._hashes.clear()
            self._epoch = epoch
        seen = set().union(*self._hashes) if self._hashes else set()
        own = set(hashes)
        repeats = len(hashes) - len(own) + len(own & seen)
        self._repeats.append(repeats / max(1, len(hashes)))
        self._hashes.append(own)
        while len(self._hashes) > reach:
            self._hashes.popleft()
        return sum(self._repeats) / len(self._repeats) if len(self._repeats) == LIMITS["recent"] else None


def equal_pairs(inputs: np.ndarray, targets: np.ndarray) -> tuple[float, float, float]:
    """How many two of these places have both the same input and the same target, how many would if targets were shuffled, and
    how many could at most.

    By chance it is exactly (twos with the same input) * (twos with the same target) / (all twos). Negative targets are left out.
    """
    real = targets >= 0
    inputs, targets = inputs[real].astype(np.int64), targets[real].astype(np.int64)
    every = len(inputs) * (len(inputs) - 1) / 2
    same_input, same_target = _twos(inputs), _twos(targets)
    chance = same_input * same_target / every if every else 0.0
    return _twos(inputs << 32 | targets), chance, min(same_input, same_target)


def _twos(values: np.ndarray) -> float:
    """Pairs of equal values."""
    values = np.sort(values)
    new = np.ones(len(values) + 1, dtype=bool)
    new[1:-1] = values[1:] != values[:-1]
    n = np.diff(np.flatnonzero(new))
    return float((n * (n - 1)).sum() / 2)


def _worst_document(record: Record, h: History) -> Document | None:
    """Of pieces with 8 tokens or more, that whose loss exceeds the batch's most, for its length."""
    rows = next((rows for statement, rows in record.rows if "document_loss" in statement), [])
    if "run" not in record.frames or not rows:
        return None
    batch = float(h.scalars("loss", 1)[-1])
    pieces = (Document(loss, batch, tokens, row, segment) for _, row, segment, tokens, loss, _ in rows if tokens >= 8)
    return max((piece for piece in pieces if math.isfinite(piece.excess)), key=lambda piece: piece.excess, default=None)


def _event(rule: Rule, finding: Finding) -> dict:
    value = float(finding.value)
    return {
        "rule": rule.name, "severity": rule.severity, "subject": finding.subject,
        "value": value if math.isfinite(value) else None, "threshold": float(finding.threshold), "text": finding.evidence,
        "detail": json.dumps({"cause": rule.cause, "try": rule.remedy, "source": rule.source}),
    }  # fmt: skip
