"""Stochastic gradient descent with momentum, as torch.optim.SGD defines it.

Sources: Polyak 1964 (momentum), Sutskever et al. 2013 (Nesterov's form). Decay is L2: it is part of the gradient.
"""

from __future__ import annotations

from torch import Tensor

from pellucid.training.optimizers.update import Update, account


def sgd(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    *,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> Update:
    """One SGD step: buffer = momentum * buffer + slope; weight -= learning_rate * direction.

    slope = gradient + weight_decay * weight; direction = slope + momentum * buffer (Nesterov) or buffer.
    state: {} or {"momentum_buffer"}. Terms: decay, momentum (what earlier steps left), gradient (this step's).
    """
    slope = gradient + weight_decay * weight if weight_decay else gradient
    before = state.get("momentum_buffer")
    buffer = slope if before is None else momentum * before + slope
    direction = slope if momentum == 0 else slope + momentum * buffer if nesterov else buffer
    weight_after = weight - learning_rate * direction

    now = learning_rate * (1 + momentum if nesterov else 1)  # share of this step's slope in the step
    then = learning_rate * momentum * (momentum if nesterov else 1)  # share of the buffer left by earlier steps
    terms = {
        "decay": -now * weight_decay * weight.double(),
        "momentum": -then * (weight.double() * 0 if before is None else before.double()),
        "gradient": -now * gradient.double(),
    }
    state_after = {} if momentum == 0 else {"momentum_buffer": buffer.clone()}
    return account(weight, weight_after, terms, state_after, slope=slope, **({"buffer": buffer} if momentum else {}),
                   direction=direction)  # fmt: skip
