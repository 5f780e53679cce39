"""Learning rate over time, as a factor on the peak: a pure function of the step, so nothing is to be saved.

Sources: cosine, Loshchilov & Hutter 2017 (arXiv 1608.03983); inverse square root, Vaswani et al. 2017 (1706.03762);
wsd, warm-up, stable, decay: Hu et al. 2024 (2404.06395), with the 1 - sqrt decay of Hägele et al. 2024 (2405.18392).
"""

from __future__ import annotations

import math

from pellucid.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """Factor on the peak learning rate of step 0, 1, ... max_steps - 1.

    Warm-up rises by 1 / warmup_steps a step, the first of them included: no step is spent at zero. Decays start from 1
    at step warmup_steps and would meet final_factor at step max_steps, one past the last (and stay there).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name == "constant":
        return 1.0
    if config.name == "inverse_sqrt":
        return math.sqrt(max(1, config.warmup_steps) / (step + 1))
    if config.name == "wsd":
        decay_steps = config.decay_fraction * max_steps
        start = max(config.warmup_steps, max_steps - decay_steps)
        return _between(1 - math.sqrt(_progress(step, start, max_steps)), config.final_factor)
    progress = _progress(step, config.warmup_steps, max_steps)
    falling = 1 - progress if config.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return _between(falling, config.final_factor)


def _progress(step: int, start: float, end: int) -> float:
    """0 at start, 1 at end, and no further."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def _between(falling: float, final: float) -> float:
    return final + (1 - final) * falling
