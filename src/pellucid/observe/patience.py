"""How many steps a rule takes before it can judge: until then the page says that it is too early, not that all is well.

It stands beside the rules, not in them, because they are the ones whose evaluation is published (bench/diagnosis.py). A number
without a name is that of the rule's own code.
"""

from __future__ import annotations

from pellucid.observe.history import PAIR_STEPS
from pellucid.observe.rule import LIMITS

FRAME_EVERY = 8  # steps at most from one frame of `param` to the next, whatever the observer's budget

STEPS = {
    "unrelated_targets": PAIR_STEPS,
    "bad_document": LIMITS["documents"] + 1,
    "repeated_data": 20,
    "data_starvation": 20,
    "dead_expert": LIMITS["dead_steps"],
    "overloaded_expert": LIMITS["settling_steps"] + 1,
    "router_collapse": 20,
    "loss_spike": 20 + min(LIMITS["spike_steps"]),
    "loss_rising": 20,
    "context_unused": LIMITS["context_steps"] + 1,
    "gradient_explosion": 21,
    "gradient_vanishing": 5,
    "clipping_always": 100,
    "update_spike": FRAME_EVERY * (LIMITS["frames"] + 1),
    "stale_moments": 21,
    "learning_rate_low": FRAME_EVERY * LIMITS["frames"],
    "swallowed_updates": FRAME_EVERY * LIMITS["frames"],
}  # the others judge the first step they see
