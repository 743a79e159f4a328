"""Search: the cheapest choice whose true error, of the whole model, is within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...lowering.policy import Policy, Rule
from ..explain import traced_afresh
from .choose import DENSE, Choice, choose
from .ledger import Place
from .measure import Measurement
from .output_error import Metric, OutputError, tensors_of
from .progress import shown
from .rules import rules_of
from .samples import Samples

_ROUNDS = 12
_LEAST, _MOST = -5.0, 5.0
"""Powers of ten of the price of a relative error of 1, in units of what dense attention costs altogether."""


@dataclass(frozen=True)
class Found:
    """Rules, the error of the model's output with them, and the share of the scores that they compute if known."""

    rules: list[Rule]
    error: float
    density: float | None


class Search:
    """Policies by the price of an error, and the true error of each.

    Args:
        model: the model.
        samples: what it is run on.
        measurement: what was measured.
        dense: the outputs of the samples with dense attention.
        metric: of the output's error.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        samples: Samples,
        measurement: Measurement,
        dense: list[list[Tensor]],
        metric: Metric,
    ) -> None:
        self._model, self._samples, self._measurement = model, samples, measurement
        self._dense, self._metric = dense, metric
        self._unit = math.fsum(sums[DENSE].cost(measurement.objective) for _, sums in measurement.ledger)
        self._errors: dict[str, float] = {}

    def within(self, budget: float, progress: bool) -> Found:
        """What comes of the lowest price whose true error is within the budget; dense attention if none is."""
        least, most, best = _LEAST, _MOST, Found([], 0.0, 1.0)
        with shown(_ROUNDS, "verifying", progress) as advance:
            for _ in range(_ROUNDS):
                middle = (least + most) / 2
                found = self._at(10**middle * self._unit)
                if found.error <= budget:
                    best, most = found, middle
                else:
                    least = middle
                advance(1)
        return best

    def _at(self, price: float) -> Found:
        measurement = self._measurement
        choices = choose(measurement.ledger, measurement.candidates, price, measurement.objective)
        rules = rules_of(choices, measurement.candidates, self._samples.buckets)
        return Found(rules, self._error(rules), self._density(choices))

    def _error(self, rules: list[Rule]) -> float:
        """The error of the whole model's output, over all samples; it is run once for every set of rules."""
        if not rules:
            return 0.0
        policy = Policy(rules)
        if policy.hash not in self._errors:
            options = {"policy": policy, "inner_backend": "eager"}
            run, error = traced_afresh(self._model, "sparseattn", options), OutputError()
            with torch.no_grad():
                for result, dense in zip(self._samples.run(run), self._dense, strict=True):
                    error.add(tensors_of(result), dense)
            self._errors[policy.hash] = error.in_metric(self._metric)
        return self._errors[policy.hash]

    def _density(self, choices: Mapping[Place, Choice]) -> float | None:
        """The share of the scores of the measured sites that is computed; None where a candidate does not say."""
        computed, whole = 0.0, 0.0
        for place, sums in self._measurement.ledger:
            whole += sums[DENSE].work
            shares = [self._measurement.kept(number) for number in choices[place].candidates]
            if None in shares:
                return None
            computed += sums[DENSE].work * math.fsum(share for share in shares if share is not None) / len(shares)
        return computed / whole
