"""Ledger: what was measured, as sums per place, candidate and head, so that memory does not grow with the samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
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


@dataclass
class Sums:
    """Sums over samples, one entry for each head, the seconds of the fastest run and the scores of one.

    With d = ours - dense: of |d|, |dense|, d ** 2, dense ** 2, ours ** 2 and ours * dense, and the number of entries.
    """

    absolute: list[float] = field(default_factory=list)
    magnitude: list[float] = field(default_factory=list)
    squared: list[float] = field(default_factory=list)
    dense_squared: list[float] = field(default_factory=list)
    ours_squared: list[float] = field(default_factory=list)
    product: list[float] = field(default_factory=list)
    entries: list[float] = field(default_factory=list)
    seconds: float = math.inf
    work: float = 0.0

    def add(self, ours: Tensor, dense: Tensor, seconds: float, work: float) -> None:
        """Add one sample's outputs, (B, H, S, D), the seconds that ours took, and the scores that it computed."""
        ours, dense = ours.detach().float(), dense.detach().float()
        difference = ours - dense
        terms = {
            "absolute": difference.abs(),
            "magnitude": dense.abs(),
            "squared": difference.square(),
            "dense_squared": dense.square(),
            "ours_squared": ours.square(),
            "product": ours * dense,
            "entries": torch.ones_like(dense),
        }
        for name, term in terms.items():
            new = term.sum(dim=(0, 2, 3), dtype=torch.float64).tolist()
            old = getattr(self, name) or [0.0] * len(new)
            if len(old) != len(new):
                raise PolicyError(f"calibrate: sites of one module have {len(old)} and {len(new)} heads. Leave it out.")
            setattr(self, name, [a + b for a, b in zip(old, new, strict=True)])
        self.seconds, self.work = min(self.seconds, seconds), max(self.work, work)

    def cost(self, objective: Objective) -> float:
        """What one run costs."""
        return self.seconds if objective == "time" else self.work


class Ledger:
    """Sums of every candidate at every place."""

    def __init__(self) -> None:
        self._sums: dict[Place, dict[int, Sums]] = {}

    def at(self, place: Place, candidate: int) -> Sums:
        """The sums of one candidate at one place, empty at first."""
        return self._sums.setdefault(place, {}).setdefault(candidate, Sums())

    def __iter__(self) -> Iterator[tuple[Place, dict[int, Sums]]]:
        """Places in the order in which the model came to them, each with the sums of the candidates that serve it."""
        yield from self._sums.items()

    def to_json(self) -> str:
        """The ledger as text; `from_json` reads back equal numbers."""
        places = [{**place._asdict(), "candidates": {str(i): vars(s) for i, s in sums.items()}} for place, sums in self]
        return json.dumps(places)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """The ledger that `to_json` wrote."""
        ledger = cls()
        places: list[dict[str, Any]] = json.loads(text)
        for place in places:
            candidates = {int(number): Sums(**sums) for number, sums in place["candidates"].items()}
            ledger._sums[Place(place["module"], place["kind"], place["bucket"])] = candidates
        return ledger
