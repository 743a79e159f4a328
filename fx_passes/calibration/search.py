"""Search: the cheapest choice whose true error, of the whole model, is within a budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .candidates import Candidate
from .choose import Choice, choose
from .ledger import DENSE, Ledger, Objective, Place
from .output_error import Metric, as_size, no_error, within
from .progress import shown
from .rules import rule_of
from .samples import Samples
from .trial import Plan, Trial

_ROUNDS = 8
_CLOSE = 0.97
"""An error of so much of the budget is as good as all of it."""
_FIRST = math.log(0.02)
_LEAST, _MOST = -8.0, 14.0
"""Powers of ten of the price of a squared relative error of 1, in units of what dense attention costs altogether."""
_HALVINGS = 40
_LEAST_STRIDE, _STRIDE = 0.3, 3.0
_FARTHEST = 60.0
_NARROW = 0.01
_NOTHING = 1e-300

Choices = dict[Place, Choice]


class Point(NamedTuple):
    """The logarithms of a predicted and of a true error."""

    predicted: float
    true: float


@dataclass(frozen=True)
class Found:
    """A choice for every place, and the error of the model's output with it."""

    choices: Choices
    error: float


class Search:
    """Choices by the price of an error, and the true error of each.

    Args:
        trial: runs the model.
        samples: what it is run on.
        ledger: what was measured.
        candidates: by their numbers.
        objective: what is saved.
        metric: of the output's error.
    """

    def __init__(
        self,
        trial: Trial,
        samples: Samples,
        ledger: Ledger,
        candidates: Sequence[Candidate],
        objective: Objective,
        metric: Metric,
    ) -> None:
        self._trial, self._ledger, self._candidates = trial, ledger, candidates
        self._metric, self.objective = metric, objective
        self._runs = Counter(samples.bucket_of_each())
        dense = {place: Choice((DENSE,), 0.0, sums[DENSE].cost(objective)) for place, sums in ledger}
        self._none = Found(dense, no_error(metric))
        self.tried: list[Found] = []

    def within(self, budget: float, progress: bool) -> list[Found]:
        """What was tried of which the true error is within the budget, the cheapest first; dense attention comes last.

        The error that the measurements predict is not the true one, but grows with it: what is tried next is predicted
        to have the error at which the true one should be the budget.
        """
        aims = Aims(math.log(as_size(budget, self._metric) * _CLOSE))
        most = self._predicted_at(math.inf)
        with shown(_ROUNDS, "searching", progress) as advance:
            while len(self.tried) < _ROUNDS and not aims.closed:
                choices = self._predicted_at(aims.next)
                found = self._known(choices)
                if found is None:
                    found = Found(choices, self._error(choices))
                    self.tried.append(found)
                    advance(1)
                size = math.log(as_size(found.error, self._metric) or _NOTHING)
                aims.add(size)
                if aims.is_met(size) or (choices == most and size <= aims.wanted):
                    break
        good = [found for found in self.tried if within(found.error, self._metric, budget)]
        return [*sorted(good, key=lambda found: self._cost(found.choices)), self._none]

    def _known(self, choices: Choices) -> Found | None:
        """What came of choices that were tried before."""
        return next((found for found in (self._none, *self.tried) if found.choices == choices), None)

    def _predicted_at(self, aim: float) -> Choices:
        """The cheapest choices of which the predicted error, a logarithm, is at most `aim`."""
        least, most = _LEAST, _MOST
        unit = self._cost(self._none.choices)
        best = self._none.choices
        for _ in range(_HALVINGS):
            middle = (least + most) / 2
            choices = choose(self._ledger, self._candidates, 10**middle * unit, self.objective)
            if _log_of(choices) <= aim:
                best, most = choices, middle
            else:
                least = middle
        return best

    def saved(self, choices: Choices) -> float:
        """What the sites cost less than with dense attention, over all samples."""
        return self._cost(self._none.choices) - self._cost(choices)

    def speedup(self, choices: Choices) -> float:
        """What the sites cost with dense attention by what they cost with the choices."""
        return self._cost(self._none.choices) / self._cost(choices)

    def density(self, choices: Choices) -> float | None:
        """The share of the scores at these places that is computed; None where a candidate does not say."""
        computed, whole = 0.0, 0.0
        for place, sums in self._ledger:
            if place not in choices:
                continue
            share = self._share(choices[place])
            if share is None:
                return None
            work = sums[DENSE].work * self._runs[place.bucket]
            whole += work
            computed += work * share
        return computed / whole

    def _cost(self, choices: Choices) -> float:
        return math.fsum(choice.cost * self._runs[place.bucket] for place, choice in choices.items())

    def _share(self, choice: Choice) -> float | None:
        """The share of the scores of one place that is computed."""
        shares = [1.0 if number == DENSE else self._candidates[number].kept for number in choice.candidates]
        known = [share for share in shares if share is not None]
        return math.fsum(known) / len(shares) if len(known) == len(shares) else None

    def _error(self, choices: Mapping[Place, Choice]) -> float:
        """The error of the whole model's output, over all samples."""
        plan: Plan = {
            place: rule_of(place, choice, self._candidates) for place, choice in choices.items() if not choice.is_dense
        }
        return self._trial.error(plan).in_metric(self._metric)


class Aims:
    """Predicted errors to try, until the true one is as wanted. All are logarithms.

    Args:
        wanted: the true error that is wanted.
    """

    def __init__(self, wanted: float) -> None:
        self.wanted, self.next = wanted, _FIRST
        self._below: Point | None = None
        self._above: Point | None = None

    def add(self, true: float) -> None:
        """Take note of the true error at the last aim."""
        if true <= self.wanted:
            self._below = Point(self.next, true)
        else:
            self._above = Point(self.next, true)
        self.next = self._aim()

    def is_met(self, true: float) -> bool:
        """Whether an error is close to the one wanted, on either side of it but within the budget."""
        return abs(true - self.wanted) <= -math.log(_CLOSE)

    @property
    def closed(self) -> bool:
        """Whether there is nothing left between what was too much and what was not."""
        if self._below is None or self._above is None:
            return abs(self.next - _FIRST) > _FARTHEST
        return self._above.predicted - self._below.predicted < _NARROW

    def _aim(self) -> float:
        if self._below is not None and self._above is not None:
            share = (self.wanted - self._below.true) / (self._above.true - self._below.true)
            within = min(max(share, 0.2), 0.8)
            return self._below.predicted + within * (self._above.predicted - self._below.predicted)
        near = self._below or self._above
        assert near is not None
        gap = self.wanted - near.true
        return near.predicted + math.copysign(min(max(abs(gap), _LEAST_STRIDE), _STRIDE), gap)


def _log_of(choices: Choices) -> float:
    """The logarithm of the error that is predicted."""
    square = math.fsum(choice.error for choice in choices.values())
    return math.log(square or _NOTHING) / 2
