"""The headline: 49,152 tokens, 76 of 768 random blocks of 64 x 64 per row, bf16, 12 heads of 128; both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.case import Case
from harness.clock import Budget
from harness.record import Row
from suites.gpu.machine import why_not
from suites.gpu.workload import Workload, measure

NAME = "gpu.block_sparse"


@dataclass(frozen=True)
class Settings:
    """Sizes, turns at most, and seconds that it may take."""

    seq: int = 49152
    heads: int = 12
    dim: int = 128
    keep: int = 76
    repeats: int = 30
    seconds: float = 110.0
    device: str = "cuda"


def run(settings: Settings) -> Iterator[Row]:
    """Rows of both directions; each has half of the seconds."""
    for direction in ("forward", "backward"):
        sizes = settings.seq, settings.heads, settings.dim, settings.keep
        workload = Workload(NAME, *sizes, direction=direction, device=settings.device)
        yield from measure(workload, settings.repeats, Budget(settings.seconds / 2))


CASE = Case(NAME, run, Settings(), Settings(256, 2, 32, 2, 1, device="cpu"), why_not)
