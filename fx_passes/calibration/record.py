"""What a calibrated policy says it was measured on."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from ...attn_ops.capability import Capability
from ...lowering.measured import Measured, MeasuredPoint, MeasuredRule
from ...lowering.policy import Policy
from .ledger import Ledger, Place, Sums
from .output_error import Metric
from .samples import Samples
from .search import Choices, Found, Search
from .verify import Verified

_DIGITS = 4
_SQUARES_ADD_UP: tuple[Metric, ...] = ("relative_l1", "relative_l2", "rmse")


@dataclass(frozen=True)
class Recorder:
    """Tells what is known of the policies that a search found.

    Args:
        search: the search.
        ledger: what was measured at the sites.
        samples: what it was measured on.
        metric: of the output's error.
        budget: of it.
        model: fingerprint of the model, "" if it has none.
        machine: its name.
        target: the one whose times were predicted.
    """

    search: Search
    ledger: Ledger
    samples: Samples
    metric: Metric
    budget: float
    model: str
    machine: str | None
    target: Capability | None

    def record(self, policy: Policy, places: Sequence[Sequence[Place]], found: Found, verified: Verified) -> Measured:
        """Everything about one of them, of which each rule serves some places, after a run of the model."""
        error = verified.error.in_metric(self.metric)
        return Measured(
            model=self.model or None,
            policy=policy.hash,
            torch=torch.__version__,
            sparseattn=version("sparseattn"),
            device=self.machine,
            date=datetime.date.today().isoformat(),
            metric=self.metric,
            budget=self.budget,
            error=error if math.isfinite(error) else None,
            density=self.search.density(found.choices),
            predicted_speedup=self._predicted(found.choices, verified),
            predicted_for=None if self.target is None else str(self.target),
            attention_speedup=self._of_attention(found.choices),
            speedup=_rounded(verified.dense_seconds / verified.seconds),
            step_ranges=[f"{first}:{end}" for first, end in self.samples.buckets or ()],
            points=self._points(verified),
            rules=self._rules(places, found.choices, error),
        )

    def _points(self, verified: Verified) -> list[MeasuredPoint]:
        """What was tried, by its density."""
        tried = [one for one in self.search.tried if math.isfinite(one.error)]
        points = [
            MeasuredPoint(_rounded(one.error), self._density(one.choices), self._predicted(one.choices, verified))
            for one in tried
        ]
        return sorted(points, key=lambda point: (point.density or 0.0, point.error))

    def _density(self, choices: Choices) -> float | None:
        density = self.search.density(choices)
        return None if density is None else _rounded(density)

    def _predicted(self, choices: Choices, verified: Verified) -> float | None:
        """The time of the dense model by that with the choices, from the times of its sites; None if not measured."""
        if self.search.objective != "time" or self.target is not None:
            return None
        left = verified.dense_seconds - self.search.saved(choices)
        return _rounded(verified.dense_seconds / left) if left > 0 else None

    def _of_attention(self, choices: Choices) -> float | None:
        """The same of the sites alone."""
        return _rounded(self.search.speedup(choices)) if self.search.objective == "time" else None

    def _rules(self, places: Sequence[Sequence[Place]], choices: Choices, error: float) -> list[MeasuredRule]:
        """Of the error each rule has a share, such that the squares of all are the square of the whole."""
        sums = dict(self.ledger)
        whole = math.fsum(choice.error for choice in choices.values())
        return [
            MeasuredRule(
                number,
                error=self._share_of(error, math.fsum(choices[place].error for place in served), whole),
                density=self._density({place: choices[place] for place in served}),
                site_errors=[_site_errors(sums[place], choices[place].candidates) for place in served],
            )
            for number, served in enumerate(places, 1)
        ]

    def _share_of(self, error: float, part: float, whole: float) -> float | None:
        if self.metric not in _SQUARES_ADD_UP:
            return None
        return _rounded(error * math.sqrt(part / whole)) if whole else 0.0


def _site_errors(measured: Mapping[int, Sums], candidates: Sequence[int]) -> list[float]:
    """The relative L2 error of the site's own output, for each head."""
    heads = [
        (measured[number].squared[head], measured[number].dense_squared[head]) for head, number in enumerate(candidates)
    ]
    return [_rounded(math.sqrt(wrong / dense)) if dense else 0.0 for wrong, dense in heads]


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
