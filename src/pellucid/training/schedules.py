"""How long a run is, and its learning rate over time: pure functions of the settings and the step, so nothing is to be saved.

Sources: cosine, Loshchilov & Hutter 2017 (arXiv 1608.03983); inverse square root, Vaswani et al. 2017 (1706.03762);
wsd, warm-up, stable, decay: Hu et al. 2024 (2404.06395), with the 1 - sqrt decay of Hägele et al. 2024 (2405.18392).
"""

from __future__ import annotations

import math
from typing import Any

from pellucid.config import Config, ScheduleConfig, UserError


def budget_in_steps(config: Config, train_split: Any) -> int:
    """Steps that spend the budget given in steps, tokens (rows * sequence_length) or epochs. Raises UserError: more than there are."""
    settings = config.training
    if settings.max_steps is not None:
        steps = settings.max_steps
    elif settings.max_tokens is not None:
        steps = math.ceil(settings.max_tokens / (settings.batch_size * config.data.sequence_length))
    else:
        steps = math.ceil(settings.max_epochs * train_split.rows_per_epoch / settings.batch_size)
    most = train_split.steps_in_all(settings.batch_size)
    if most == 0:
        raise UserError(f"data.sources: with their epochs the text is not enough for one step of training.batch_size = "
                        f"{settings.batch_size} rows; let one source have more epochs, or lower training.batch_size")
    if most is not None and steps > most:
        raise UserError(f"data.sources: with their epochs there is text for {most:,} steps, and the run asks for {steps:,}; set "
                        f"training.max_steps = {most}, or let one source have more epochs")
    return steps


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
