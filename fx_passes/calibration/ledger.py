"""Ledger: what was measured, as sums per place, candidate and head, so that memory does not grow with the samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...attn_ops.call import Kind
from ...attn_ops.errors import PolicyError

Objective = Literal["time", "work"]
"""What is saved: seconds on this machine, or the scores that are computed, the same everywhere."""


class Place(NamedTuple):
    """The sites of one kind in a module, in a range of steps.

    Args:
        module: path of the module that owns the site.
        kind: "self" or "cross".
        bucket: number of the range of steps, from 0.
    """

    module: str
    kind: Kind
    bucket: int


DENSE = -1
"""The number of dense attention among the candidates; it makes no error."""


@dataclass
class Sums:
    """Sums over samples, one entry for each head, the seconds of the fastest run and the scores of one.

    `squared` is of (ours - dense) ** 2, `dense_squared` of dense ** 2.
    """

    squared: list[float] = field(default_factory=list)
    dense_squared: list[float] = field(default_factory=list)
    seconds: float = math.inf
    work: float = 0.0

    def add(self, ours: Tensor, dense: Tensor, seconds: float, work: float) -> None:
        """Add one sample's outputs, (B, H, S, D), the seconds that ours took, and the scores that it computed."""
        heads = [_sums(a, b) for a, b in zip(ours.detach().unbind(1), dense.detach().unbind(1), strict=True)]
        for name, new in zip(_TERMS, torch.stack(heads).T.tolist(), strict=True):
            old = getattr(self, name) or [0.0] * len(new)
            if len(old) != len(new):
                raise PolicyError(f"calibrate: sites of one module have {len(old)} and {len(new)} heads. Leave it out.")
            setattr(self, name, [a + b for a, b in zip(old, new, strict=True)])
        self.seconds, self.work = min(self.seconds, seconds), max(self.work, work)

    def cost(self, objective: Objective) -> float:
        """What one run costs."""
        return self.seconds if objective == "time" else self.work


_TERMS = ("squared", "dense_squared")


def _sums(ours: Tensor, dense: Tensor) -> Tensor:
    """The terms of one head, (B, S, D). Head by head, since fp32 copies of all would take much of the memory."""
    x, y = ours.float(), dense.float()
    terms = (x - y).square(), y.square()
    return torch.stack([term.sum(dtype=torch.float64) for term in terms])


@dataclass
class Reach:
    """Sums over candidates, samples and signs, one entry for each head.

    Args:
        reached: squares of what an error did to the model's output.
        made: squares of the error itself.
    """

    reached: list[float] = field(default_factory=list)
    made: list[float] = field(default_factory=list)

    def weights(self) -> list[float]:
        """For each head, the square of an error of the model's output by that of the site's."""
        return [a / b if b else 0.0 for a, b in zip(self.reached, self.made, strict=True)]


class Ledger:
    """Sums of every candidate at every place, and of how far errors there reach.

    `output` is the sum of squares of the model's outputs with dense attention; who has them sets it.
    """

    def __init__(self) -> None:
        self._sums: dict[Place, dict[int, Sums]] = {}
        self._reach: dict[Place, Reach] = {}
        self.output = 0.0

    def at(self, place: Place, candidate: int) -> Sums:
        """The sums of one candidate at one place, empty at first."""
        return self._sums.setdefault(place, {}).setdefault(candidate, Sums())

    def add_reach(self, place: Place, reached: Sequence[float], made: Sequence[float]) -> None:
        """Add what the errors of one candidate did, for each head."""
        reach = self._reach.setdefault(place, Reach([0.0] * len(made), [0.0] * len(made)))
        reach.reached = [a + b for a, b in zip(reach.reached, reached, strict=True)]
        reach.made = [a + b for a, b in zip(reach.made, made, strict=True)]

    def weights(self, place: Place) -> list[float]:
        """For each head, what a squared error there adds to that of the output, relative to the output.

        Where nobody followed the errors, all places count alike: it is relative to what the site gives.
        """
        if not self._reach:
            dense = self._sums[place][DENSE].dense_squared
            return [1.0 / (math.fsum(dense) or 1.0)] * len(dense)
        if place not in self._reach:
            raise PolicyError(
                f'calibrate: no gradient reaches the attention of {place.module or "the model"}. Write weigh="site".'
            )
        return [weight / self.output for weight in self._reach[place].weights()]

    def __iter__(self) -> Iterator[tuple[Place, dict[int, Sums]]]:
        """Places in the order in which the model came to them, each with the sums of the candidates that serve it."""
        yield from self._sums.items()

    def to_json(self) -> str:
        """The ledger as text; `from_json` reads back equal numbers."""
        places = [{**place._asdict(), "candidates": {str(i): vars(s) for i, s in sums.items()}} for place, sums in self]
        reach = [{**place._asdict(), **vars(sums)} for place, sums in self._reach.items()]
        return json.dumps({"places": places, "reach": reach})

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """The ledger that `to_json` wrote."""
        ledger = cls()
        kept: dict[str, Any] = json.loads(text)
        for entry in kept["places"]:
            candidates = {int(number): Sums(**sums) for number, sums in entry["candidates"].items()}
            ledger._sums[_place(entry)] = candidates
        for entry in kept["reach"]:
            ledger._reach[_place(entry)] = Reach(entry["reached"], entry["made"])
        return ledger


def _place(entry: Mapping[str, Any]) -> Place:
    return Place(entry["module"], entry["kind"], entry["bucket"])
