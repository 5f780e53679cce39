"""Rules on gradients and updates: too large, too small, none at all, or without evidence.

Read with rule.py, which has the thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pellucid.observe.history import History, measured
from pellucid.observe.rule import FRAME_EVERY, LIMITS, Finding, center, rule


@rule("gradient_explosion", "alarm", cause="the loss is steep here: unusual data, too high a learning rate, stale moments",
      remedy="clip gradients; lower the learning rate; look at the documents", source="Pascanu et al. 2013, arXiv 1211.5063",
      steps=LIMITS["recent"] + 1)
def gradient_explosion(h: History) -> Iterator[Finding]:
    norms = h.scalars("gradient_norm", LIMITS["spike_window"] + 1)
    middle, sigma = center(norms[:-1])
    limit = max(LIMITS["gradient_explosion"] * middle, middle + LIMITS["spike_sigmas"] * sigma)
    if len(norms) > LIMITS["recent"] and norms[-1] > limit:
        yield Finding("run", norms[-1], limit, f"gradient norm {norms[-1]:.4g}, {norms[-1] / middle:.0f} times the usual")


@rule("gradient_vanishing", "alarm", cause="nothing to learn from: labels masked, a detached graph, dead activations",
      remedy="check that targets are not all ignored and that no part of the model is detached",
      source="Hochreiter et al. 2001", steps=LIMITS["vanished_steps"])
def gradient_vanishing(h: History) -> Iterator[Finding]:
    steps = LIMITS["vanished_steps"]
    norms = h.scalars("gradient_norm", steps)
    if len(norms) == steps and (norms < LIMITS["gradient_vanishing"]).all():
        yield Finding("run", norms[-1], LIMITS["gradient_vanishing"], f"gradient norm {norms[-1]:.3g} for {steps} steps")


@rule("clipping_always", "warning", cause="the limit is far below the gradients' usual size: clipping sets the step size",
      remedy="raise training.gradient_clip to about the median norm, or lower the learning rate",
      source="Ramezani et al. 2025 (AdaGC), arXiv 2502.11034", steps=LIMITS["clipped_steps"])
def clipping_always(h: History) -> Iterator[Finding]:
    factors = h.scalars("clip_factor", LIMITS["clipped_steps"])
    if len(factors) == LIMITS["clipped_steps"] and np.mean(factors < 1) >= 0.95 and np.median(factors) < LIMITS["clip_factor"]:
        middle = float(np.median(factors))
        yield Finding("run", middle, LIMITS["clip_factor"], f"clipped at every step; half of them to less than {middle:.2f}")




@rule("update_spike", "alarm", cause="Adam's second moment lags behind a sudden gradient; the loss may follow in 1 to 8 steps",
      remedy="lower beta2 or the learning rate; clip updates", source="Wortsman et al. 2023, arXiv 2304.13013",
      steps=FRAME_EVERY * (LIMITS["frames"] + 1))
def update_spike(h: History) -> Iterator[Finding]:
    if "param" not in h.fresh:
        return
    norms, rates = h.scalars("update_norm", 65), h.scalars("learning_rate", 65)
    known = np.isfinite(norms) & (norms > 0) & (rates > 0)
    relative = norms[known] / rates[known]
    middle, sigma = center(relative[:-1])
    limit = max(LIMITS["update_spike"] * middle, middle + LIMITS["spike_sigmas"] * sigma)
    if len(relative) > LIMITS["frames"] and known[-1] and relative[-1] > limit:
        yield Finding("run", relative[-1], limit, f"update norm per learning rate {relative[-1]:.4g}, usually {middle:.4g}")


@rule("stale_moments", "warning", cause="gradients grew faster than Adam's second moment follows",
      remedy="lower beta2; warm up longer", source="Wortsman et al. 2023, arXiv 2304.13013",
      steps=LIMITS["recent"] + FRAME_EVERY, adam=True)
def stale_moments(h: History) -> Iterator[Finding]:
    staleness = h.table("param", "staleness", 2)
    if "param" in h.fresh and h.age > LIMITS["recent"] and len(staleness) == 2 and (staleness[:, -1] > LIMITS["staleness"]).all():
        yield Finding("run", staleness[-1, -1], LIMITS["staleness"], f"sqrt(mean(g^2/v)) is {staleness[-1, -1]:.3g} over all")


@rule("impossible_step", "alarm", cause="Adam's second moment does not belong to these gradients: restored from elsewhere, or changed",
      remedy="check what touched the optimizer's state (a partial resume?); without it, begin with fresh moments and a warm-up",
      source="Cauchy-Schwarz on Adam's two averages (Kingma & Ba 2014, section 2.1, on the bounded step)", steps=FRAME_EVERY,
      adam=True)
def impossible_step(h: History) -> Iterator[Finding]:
    sizes = h.now("param", "adam_rms")
    if sizes is None:
        return
    beta1, beta2 = (float(h.scalars(name, 1)[-1]) for name in ("beta1", "beta2"))
    if not beta1**2 < beta2 < 1:
        return
    most = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))  # of |m| / sqrt(v), whatever the gradients were
    limit = LIMITS["impossible"] * most
    if np.nanmax(sizes, initial=0) > limit:
        i = int(np.nanargmax(sizes))
        yield Finding(h.run.param_rows[i].name, sizes[i], limit, f"RMS of Adam's normalised step {sizes[i]:.3g}; with beta1 {beta1:g} "
                      f"and beta2 {beta2:g} no gradients can make it larger than {most:.3g}")  # fmt: skip


@rule("learning_rate_high", "alarm", cause="weights change by percents at every step",
      remedy="divide optimizer.learning_rate by 3 to 10", source="Karpathy, makemore part 3 (1e-3 rule); arXiv 2305.17212",
      steps=2 * FRAME_EVERY)
def learning_rate_high(h: History) -> Iterator[Finding]:
    ratios = h.table("param", "update_ratio", 2)[:, -1:]
    if "param" in h.fresh and len(ratios) == 2 and (ratios > LIMITS["ratio_high"]).all():
        yield Finding("run", ratios[-1, 0], LIMITS["ratio_high"], f"update/weight ratio {ratios[-1, 0]:.3g}, 1e-3 is usual")


@rule("learning_rate_low", "warning", cause="the learning rate is so small that nothing is learnt",
      remedy="raise optimizer.learning_rate", source="Karpathy, makemore part 3; SageMaker Debugger WeightUpdateRatio",
      steps=LIMITS["recent"] + 1 + FRAME_EVERY, after_warmup=True)
def learning_rate_low(h: History) -> Iterator[Finding]:
    ratios = h.table("param", "update_ratio", LIMITS["frames"])[:, -1:]
    past_warmup = h.step > h.run.warmup_steps + LIMITS["recent"]
    if "param" in h.fresh and past_warmup and len(ratios) == LIMITS["frames"] and (ratios < LIMITS["ratio_low"]).all():
        yield Finding("run", ratios[-1, 0], LIMITS["ratio_low"], f"update/weight ratio {ratios[-1, 0]:.3g}, 1e-3 is usual")


@rule("frozen_tensor", "alarm", cause="it has a gradient and does not move: not in the optimizer, or overwritten",
      remedy="check the optimizer's parameter groups and what happens after its step", source="DeepSpeed issue 8354",
      steps=2 * FRAME_EVERY)
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
      source="IEEE formats: bf16 keeps 8 bits; a change below 2^-9 of a weight is lost", steps=FRAME_EVERY * LIMITS["frames"])
def swallowed_updates(h: History) -> Iterator[Finding]:
    unmoved, rates = h.table("param", "unmoved", LIMITS["frames"])[:, -1], h.scalars("learning_rate", 5)
    if "param" in h.fresh and len(unmoved) == LIMITS["frames"] and (unmoved > LIMITS["unmoved"]).all() and (rates > 0).all():
        yield Finding("run", unmoved[-1], LIMITS["unmoved"], f"{unmoved[-1]:.0%} of the weights with a gradient did not move")
