"""Block-sparse attention over lengths and densities, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from harness.case import Case
from harness.clock import Budget
from harness.record import Row
from suites.gpu.machine import why_not
from suites.gpu.workload import Workload, measure

NAME = "gpu.sweep"


@dataclass(frozen=True)
class Settings:
    """Of seq, dim and density every combination, in both directions."""

    seq: tuple[int, ...] = (4096, 16384, 65536)
    dim: tuple[int, ...] = (64, 128)
    density: tuple[float, ...] = (0.1, 0.25)
    heads: int = 8
    repeats: int = 10
    seconds: float = 150.0
    device: str = "cuda"


def run(settings: Settings) -> Iterator[Row]:
    """The rows of every combination, as far as the seconds reach; what they do not reach says so."""
    budget = Budget(settings.seconds)
    for seq, dim, density in itertools.product(settings.seq, settings.dim, settings.density):
        keep = max(1, round(density * -(-seq // 64)))
        for direction in ("forward", "backward"):
            workload = Workload(NAME, seq, settings.heads, dim, keep, direction=direction, device=settings.device)
            yield from measure(workload, settings.repeats, budget)


CASE = Case(NAME, run, Settings(), Settings((256,), (32,), (0.5,), 2, 1, device="cpu"), why_not)
