"""Rules on the data: targets that follow from nothing, one bad document, the same rows again, a batch that is waited for.

Read with rule.py, which has the thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pellucid.observe.history import PAIR_STEPS, History
from pellucid.observe.rule import LIMITS, Finding, rule


@rule("unrelated_targets", "alarm", cause="targets do not follow from inputs: shuffled labels, rows mixed up, or data of pure chance",
      remedy="look at inputs and targets of a batch (pellucid data inspect); check what makes them of the text",
      source="the expected number of coincidences of a random pairing (Friedman 1922, the index of coincidence)", steps=PAIR_STEPS)
def unrelated_targets(h: History) -> Iterator[Finding]:
    if h.unigram_entropy is None or len(h.equal_pairs) < PAIR_STEPS:
        return
    found, chance, most = map(sum, zip(*h.equal_pairs, strict=True))
    if most < LIMITS["room"] * chance:
        return  # nearly all is one token, and whatever pairing has about as many
    loss = float(np.mean(h.scalars("loss", PAIR_STEPS)))
    learnt = loss < h.unigram_entropy - LIMITS["frequencies"][0]  # from more than the token before, then
    if chance > LIMITS["pairs"] and found < LIMITS["related"] * chance and not learnt:
        yield Finding("run", found / chance, LIMITS["related"], f"equal inputs have equal targets {found / chance:.2f} times as often "
                      f"as by chance, in {PAIR_STEPS} steps")  # fmt: skip


@rule("bad_document", "warning", cause="a document unlike the rest: noise, another language, a broken or poisoned file",
      remedy="see its text with pellucid trace RUN --step N; remove it or filter its source",
      source="OLMo 2 (arXiv 2501.00656) on repeated n-grams and spikes", steps=LIMITS["documents"] + 1)
def bad_document(h: History) -> Iterator[Finding]:
    worst, before = h.worst_document, list(h.document_excess)[:-1]
    if worst is None or len(before) < LIMITS["documents"]:
        return
    usual, guessing = max(*before, 1e-9), math.log(h.run.vocab_size)
    hopeless = worst.loss > guessing + LIMITS["hopeless"] and worst.tokens >= LIMITS["telling"]
    hopeless = hopeless and worst.excess > LIMITS["unusual"] * usual
    if worst.loss - worst.batch > LIMITS["bad_document"] and (hopeless or worst.excess > LIMITS["odd_document"] * usual):
        yield Finding(f"row {worst.row}, piece {worst.segment}", worst.loss, worst.batch + LIMITS["bad_document"],
                      f"mean loss {worst.loss:.3g} on a document of {worst.tokens} tokens, the batch has {worst.batch:.3g} and "
                      f"guessing {guessing:.3g}: {worst.excess / usual:.1f} times the largest excess before")


@rule("repeated_data", "warning", cause="the same rows come again within an epoch: duplicates in the sources or a stuck loader",
      remedy="deduplicate the sources; check weights of small sources", source="Hernandez et al. 2022, arXiv 2205.10487",
      steps=LIMITS["recent"])
def repeated_data(h: History) -> Iterator[Finding]:
    if h.repeated_share is not None and h.repeated_share > LIMITS["repeated"]:
        yield Finding("run", h.repeated_share, LIMITS["repeated"], f"{h.repeated_share:.0%} of recent rows had been seen before")


@rule("data_starvation", "warning", cause="the step waits for its batch", remedy="prepare data on a faster disk; use packed shards",
      source="TraceML's verdicts", steps=LIMITS["recent"])
def data_starvation(h: History) -> Iterator[Finding]:
    data, steps = (h.scalars(name, LIMITS["recent"]) for name in ("data_seconds", "step_seconds"))
    if len(data) == LIMITS["recent"] and np.isfinite(data).all():
        share = float(np.median(data / steps))  # one long wait is another program's
        if share > LIMITS["starved"]:
            yield Finding("run", share, LIMITS["starved"], f"half of the last {len(data)} steps spent {share:.0%} of their time or "
                          "more waiting for data")  # fmt: skip
