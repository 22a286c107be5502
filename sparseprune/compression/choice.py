"""Which form each weight takes: those of least loss together that fit into a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparseprune.compression.forms import Form
from sparseprune.pruning.allocation.curves import cheapest

__all__ = ["Choice", "Options", "choose"]


@dataclass(frozen=True)
class Options:
    """The forms a weight may take, their bytes in a file, and what each would add to the model's divergence.

    A form that is `kept` loses nothing; it comes first, so that no other is preferred for the same price and loss.
    """

    forms: tuple[Form, ...]
    prices: tuple[int, ...]
    losses: tuple[float, ...] = ()

    def with_losses(self, losses: Sequence[float]) -> Options:
        """`losses` of those that are not kept, which come last."""
        return replace(self, losses=(*(0.0 for it in self.forms if it.kept), *losses))


@dataclass(frozen=True)
class Choice:
    """A form, and the one that would have been next best at the price that bytes have."""

    form: Form
    price: int
    loss: float
    other: Form | None
    other_price: int
    other_loss: float


def choose(options: Mapping[str, Options], budget: int) -> dict[str, Choice]:
    """Weight name -> its choice. `budget`: bytes for all of them together, at least what the smallest forms take."""
    at = cheapest(
        {name: it.losses for name, it in options.items()},
        {name: it.prices for name, it in options.items()},
        budget,
    )
    worth = _worth(options, budget)
    found = {}
    for name, it in options.items():
        mine = at[name]
        order = sorted(
            range(len(it.forms)), key=lambda i: (it.losses[i] + worth * it.prices[i], it.prices[i])
        )
        other = next((i for i in order if i != mine and math.isfinite(it.losses[i])), None)
        found[name] = Choice(
            it.forms[mine],
            it.prices[mine],
            it.losses[mine],
            None if other is None else it.forms[other],
            0 if other is None else it.prices[other],
            0.0 if other is None else it.losses[other],
        )
    return found


def _worth(options: Mapping[str, Options], budget: int) -> float:
    """What a byte is worth in loss: the least at which the forms of least loss + worth x bytes fit into the budget."""

    def spent(worth: float) -> int:
        total = 0
        for it in options.values():
            pairs = [(loss + worth * price, price) for loss, price in zip(it.losses, it.prices, strict=True)]
            total += min(pairs)[1]
        return total

    if spent(0.0) <= budget:
        return 0.0
    low, high = 1e-20, 1.0
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= budget else (middle, high)
    return high
