"""Rules on the router's work: experts without tokens, with too many, or all tokens with few.

Read with rule.py, which has the thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pellucid.observe.history import History
from pellucid.observe.rule import LIMITS, Finding, rule


@rule("dead_expert", "alarm", cause="the router never chooses it, so it never learns to be chosen",
      remedy="raise training.balance_loss_weight or balance_bias_rate; add router z-loss",
      source="Fedus et al. 2021 (Switch), arXiv 2101.03961", steps=LIMITS["dead_steps"])
def dead_expert(h: History) -> Iterator[Finding]:
    idle = h.now("router", "idle_steps")
    if idle is not None:
        for i in np.flatnonzero(idle >= LIMITS["dead_steps"])[:5]:
            subject = f"layers.{i // h.run.experts}.experts.{i % h.run.experts}"
            yield Finding(subject, idle[i], LIMITS["dead_steps"], f"no token for {idle[i]:.0f} steps")


@rule("overloaded_expert", "warning", cause="the router prefers one expert; others learn little, and it becomes the bottleneck",
      remedy="raise training.balance_loss_weight or balance_bias_rate", source="Wang et al. 2024, arXiv 2408.15664",
      steps=LIMITS["settling_steps"] + 1)
def overloaded_expert(h: History) -> Iterator[Finding]:
    load = h.table("router", "load", 50)
    settled = h.step >= LIMITS["settling_steps"]
    if settled and len(load) == 50 and h.run.experts > h.run.experts_per_token:
        mean, before, lately = load.mean(0), load[:25].mean(0), load[25:].mean(0)
        limit = min(LIMITS["overload"], 0.9 * h.run.experts / h.run.experts_per_token)
        for i in np.flatnonzero((mean > limit) & (lately > LIMITS["easing"] * before))[:5]:
            subject = f"layers.{i // h.run.experts}.experts.{i % h.run.experts}"
            yield Finding(subject, mean[i], limit, f"{mean[i]:.2f} times its fair load over 50 steps")


@rule("router_collapse", "alarm", cause="all tokens go to the same few experts",
      remedy="raise training.balance_loss_weight; lower the router's learning rate; add router z-loss",
      source="Zoph et al. 2022 (ST-MoE), arXiv 2202.08906", steps=LIMITS["recent"])
def router_collapse(h: History) -> Iterator[Finding]:
    used = h.table("layer", "load_entropy", LIMITS["recent"])
    if len(used) == LIMITS["recent"] and h.run.experts > h.run.experts_per_token:
        mean, least = used.mean(0), h.run.experts_per_token / h.run.experts
        total = least + LIMITS["total_collapse"] * (1 - least)
        limit = max(total, LIMITS["collapse"]) if h.step >= LIMITS["settling_steps"] else total
        half = len(used) // 2
        recovering = used[half:].mean(0) > used[:half].mean(0)  # it is left to the balance loss
        for i in np.flatnonzero((mean < total) | ((mean < limit) & ~recovering)):
            yield Finding(f"layers.{i}", mean[i], limit, f"{mean[i] * h.run.experts:.1f} experts effectively in use")
