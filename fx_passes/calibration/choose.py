"""Choose among what was measured: for a price of error, the cheapest candidate of every place and head.

Errors add up, each relative to the output of its site. Every place minimizes cost + price * error on its own, which for
all of them together is the least cost at the error that comes out (Everett 1963); a higher price buys less error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...lowering.rule import Rule
from .candidates import Candidate
from .ledger import Ledger, Objective, Place, Sums

DENSE = -1
"""The number of dense attention among the candidates; it makes no error."""


@dataclass(frozen=True)
class Choice:
    """What serves a place.

    Args:
        candidates: number of the candidate of each head, all of one family; (DENSE,) where it stays dense.
        error: sum over heads of |ours - dense| ** 2 by that of |dense| ** 2, as measured.
        cost: of one run, in the objective; of heads that differ, each its share.
    """

    candidates: tuple[int, ...]
    error: float
    cost: float

    @property
    def is_dense(self) -> bool:
        """Whether the place stays dense."""
        return self.candidates == (DENSE,)


def choose(ledger: Ledger, candidates: Sequence[Candidate], price: float, objective: Objective) -> dict[Place, Choice]:
    """The choice for every place.

    Args:
        ledger: what was measured.
        candidates: by their numbers.
        price: what a relative error of 1 at one site may cost.
        objective: what is saved, "time" or "work".
    """
    return {place: _cheapest(sums, candidates, price, objective) for place, sums in ledger}


def _cheapest(
    measured: Mapping[int, Sums], candidates: Sequence[Candidate], price: float, objective: Objective
) -> Choice:
    best = Choice((DENSE,), 0.0, measured[DENSE].cost(objective))
    families: dict[Rule, list[int]] = {}
    for number in measured:
        if number != DENSE:
            families.setdefault(candidates[number].family, []).append(number)
    for members in families.values():
        choice = _within(measured, members, price, objective)
        if choice.cost + price * choice.error < best.cost + price * best.error:
            best = choice
    return best


def _within(measured: Mapping[int, Sums], members: list[int], price: float, objective: Objective) -> Choice:
    """The best of one family, head by head where its candidates may differ by head."""
    whole = math.fsum(measured[members[0]].dense_squared) or 1.0
    heads = len(measured[members[0]].squared)
    picked, errors, costs = [], [], []
    for head in range(heads):
        options = [
            (measured[i].cost(objective) / heads, _finite(measured[i].squared[head]) / whole, i) for i in members
        ]
        cost, wrong, number = min(options, key=lambda option: (option[0] + price * option[1], option))
        picked.append(number)
        errors.append(wrong)
        costs.append(cost)
    return Choice(tuple(picked), math.fsum(errors), math.fsum(costs))


def _finite(error: float) -> float:
    """The error; infinite where ours was NaN, which compares with nothing."""
    return math.inf if math.isnan(error) else error
