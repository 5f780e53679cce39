"""Adam and AdamW, as torch.optim defines them.

Sources: Kingma & Ba 2015 (arXiv 1412.6980, algorithm 1); Loshchilov & Hutter 2019 (arXiv 1711.05101, algorithm 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.training.optimizers.update import Update, account


def adamw(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Update:
    """One AdamW step: weight -= learning_rate * (weight_decay * weight + m_hat / (sqrt(v_hat) + eps)).

    state: {} or {"step", "exp_avg" (m), "exp_avg_sq" (v)}.
    Terms: decay, momentum (what earlier gradients left in m), gradient (this step's part of m).
    """
    decayed = weight * (1 - learning_rate * weight_decay) if weight_decay else weight
    decay = -learning_rate * weight_decay * weight.double()
    return _adam(weight, decayed, gradient, decay, 0.0, state, learning_rate, beta1, beta2, eps)


def adam(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Update:
    """One Adam step; decay is L2, part of the gradient (hence of m and v), unlike AdamW's.

    State and terms as for `adamw`; `decay` is this step's share, that of earlier steps lives in `momentum`.
    """
    return _adam(weight, weight, gradient, None, weight_decay, state, learning_rate, beta1, beta2, eps)


def _adam(weight, start, gradient, decay, l2, state, learning_rate, beta1, beta2, eps) -> Update:
    """Descend from `start`. decay: AdamW's term, already in start, or None: Adam's, with the coefficient l2."""
    step = int(state.get("step", 0)) + 1
    before = state.get("exp_avg", torch.zeros_like(weight))
    slope = gradient + l2 * weight if l2 else gradient
    m = before.lerp(slope, 1 - beta1)
    v = state.get("exp_avg_sq", torch.zeros_like(weight)) * beta2 + (1 - beta2) * slope * slope
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = v.sqrt() / correction2**0.5 + eps
    weight_after = start - (learning_rate / correction1) * (m / denominator)

    scale = learning_rate / correction1 / denominator.double()
    terms = {
        "decay": -scale * (1 - beta1) * l2 * weight.double() if decay is None else decay,
        "momentum": -scale * beta1 * before.double(),
        "gradient": -scale * (1 - beta1) * gradient.double(),
    }
    m_hat = m / correction1
    return account(
        weight,
        weight_after,
        terms,
        {"step": torch.tensor(float(step)), "exp_avg": m, "exp_avg_sq": v},
        slope=slope,
        m=m,
        v=v,
        m_hat=m_hat,
        v_hat=v / correction2,
        denominator=denominator,
        direction=m_hat / denominator,
    )
