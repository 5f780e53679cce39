"""The anatomy of one parameter update: what every plain rule of this folder returns.

The plain rules define what the fast optimizers do and explain it. They take and return the optimizer's own state
(same keys as `optimizer.state[parameter]`), so an explanation starts from exactly what training holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """One step of one tensor. All tensors have the weight's shape unless a rule says otherwise.

    `explained()` (terms in order, then rounding, summed in float64) equals `change()` exactly. `rounding` holds what
    the weight's dtype could not: of a float32 weight of 1, everything below 6e-8.
    """

    weight: Tensor  # before
    weight_after: Tensor
    terms: dict[str, Tensor]  # float64, by cause: decay, momentum, gradient or descent
    rounding: Tensor  # float64
    state: dict[str, Tensor]  # the optimizer's state afterwards
    quantities: dict[str, Tensor]  # what was computed on the way: m, v, m_hat, v_hat, direction ...

    def change(self) -> Tensor:
        """weight_after - weight, in float64."""
        return self.weight_after.double() - self.weight.double()

    def explained(self) -> Tensor:
        """Sum of the terms in their order, then rounding, in float64."""
        return _sum(self.terms, self.weight) + self.rounding

    def settle(self, weight_after: Tensor) -> Update:
        """The same causes, accounted against a weight that a fast optimizer actually wrote (it rounds elsewhere)."""
        return replace(self, weight_after=weight_after, rounding=_rounding(self.weight, weight_after, self.terms))

    def freeze(self, idle_E: Tensor, state: dict[str, Tensor]) -> Update:
        """The update when the experts in the bool mask idle_E got no token: their slices stay as they were.

        state: the optimizer's state before the step; absent tensors were zero.
        """
        keep = lambda after, before: torch.where(idle_E.view(-1, *[1] * (after.ndim - 1)), before, after)
        stacked = lambda tensor: tensor.ndim > 1 and len(tensor) == len(idle_E)
        terms = {name: keep(term, torch.zeros_like(term)) for name, term in self.terms.items()}
        after = {
            name: keep(tensor, state.get(name, torch.zeros_like(tensor))) if stacked(tensor) else tensor
            for name, tensor in self.state.items()
        }
        return replace(self, terms=terms, state=after).settle(keep(self.weight_after, self.weight))


def account(
    weight: Tensor, weight_after: Tensor, terms: dict[str, Tensor], state: dict[str, Tensor], **quantities: Tensor
) -> Update:
    """An Update whose rounding term closes the sum."""
    terms = {name: term.double() for name, term in terms.items()}
    return Update(weight, weight_after, terms, _rounding(weight, weight_after, terms), state, quantities)


def _sum(terms: dict[str, Tensor], weight: Tensor) -> Tensor:
    total = torch.zeros_like(weight, dtype=torch.float64)
    for term in terms.values():
        total = total + term
    return total


def _rounding(weight: Tensor, weight_after: Tensor, terms: dict[str, Tensor]) -> Tensor:
    change, total = weight_after.double() - weight.double(), _sum(terms, weight)
    rounding = change - total
    # The difference itself may round, in its last bit: step to the neighbour that closes the sum.
    missing = change - (total + rounding)
    direction = torch.where(missing > 0, torch.inf, -torch.inf)
    # missing is NaN where the weights are not finite: there is nothing to close there
    return torch.where(missing.abs() > 0, torch.nextafter(rounding, direction.to(rounding)), rounding)
