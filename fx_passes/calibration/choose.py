"""Choose among what was measured: for a price of error, the cheapest candidate of every place and head.

The squares of errors add up, each weighed by how much of it reaches the model's output. Every place minimizes cost +
price * error on its own, which for all of them together is the least cost at the error that comes out (Everett 1963); a
higher price buys less error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...lowering.rule import Rule
from .candidates import Candidate
from .ledger import DENSE, Ledger, Objective, Place, Sums


@dataclass(frozen=True)
class Choice:
    """What serves a place.

    Args:
        candidates: number of the candidate of each head, all of one family; (DENSE,) where it stays dense.
        error: what it adds to the square of the output's relative error, as predicted from what was measured.
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
        price: what a square of the relative error of 1 may cost.
        objective: what is saved, "time" or "work".
    """
    return {place: _cheapest(sums, ledger.weights(place), candidates, price, objective) for place, sums in ledger}


def _cheapest(
    measured: Mapping[int, Sums],
    weights: Sequence[float],
    candidates: Sequence[Candidate],
    price: float,
    objective: Objective,
) -> Choice:
    best = Choice((DENSE,), 0.0, measured[DENSE].cost(objective))
    families: dict[Rule, list[int]] = {}
    for number in measured:
        if number != DENSE:
            families.setdefault(candidates[number].family, []).append(number)
    for members in families.values():
        choice = _within(measured, weights, members, price, objective)
        if choice.cost + price * choice.error < best.cost + price * best.error:
            best = choice
    return best


def _within(
    measured: Mapping[int, Sums], weights: Sequence[float], members: list[int], price: float, objective: Objective
) -> Choice:
    """The best of one family, head by head where its candidates may differ by head."""
    picked, errors, costs = [], [], []
    for head, weight in enumerate(weights):
        options = [
            (measured[i].cost(objective) / len(weights), _weighed(measured[i].squared[head], weight), i)
            for i in members
        ]
        cost, wrong, number = min(options, key=lambda option: (option[0] + price * option[1], option))
        picked.append(number)
        errors.append(wrong)
        costs.append(cost)
    return Choice(tuple(picked), math.fsum(errors), math.fsum(costs))


def _weighed(error: float, weight: float) -> float:
    """The error times its weight; infinite where ours was NaN or infinite, whatever the weight."""
    return error * weight if math.isfinite(error) else math.inf
