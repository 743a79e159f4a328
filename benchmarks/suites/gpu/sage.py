"""Sage's own benchmark: dense INT8 attention of 32,768 tokens, bf16, 4 x 32 heads of 128."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.case import Case
from harness.clock import Budget
from harness.record import Row
from suites.gpu.machine import why_not
from suites.gpu.method import MethodContest, measure

NAME = "gpu.sage"
TOLERANCE = {"fp16": 0.03, "fp8": 0.08}
"""Of INT8 scores with either kind of values, relative L2 to exact attention on normal inputs."""


@dataclass(frozen=True)
class Settings:
    """Sizes, turns at most, and seconds that it may take."""

    shape: tuple[int, ...] = (4, 32, 32768, 128)
    pv: tuple[str, ...] = ("fp16", "fp8")
    repeats: int = 20
    seconds: float = 80.0
    device: str = "cuda"


def contest(settings: Settings, pv: str, case: str = NAME) -> MethodContest:
    """One kind of values."""
    batch, heads, seq, dim = settings.shape
    shape = batch, heads, seq, dim
    return MethodContest(
        case, "sage", "sage_attention", {"pv": pv}, 1.0, shape, tolerance=TOLERANCE[pv], device=settings.device
    )


def run(settings: Settings) -> Iterator[Row]:
    """Rows of both kinds of values; each has half of the seconds."""
    for pv in settings.pv:
        yield from measure(contest(settings, pv), settings.repeats, Budget(settings.seconds / len(settings.pv)))


CASE = Case(NAME, run, Settings(), Settings((1, 2, 512, 32), ("fp16",), 1, device="cpu"), why_not)
