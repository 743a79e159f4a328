"""SLA's own benchmark: 32,760 tokens, 95 % sparse in blocks of 128 x 64, bf16, 2 x 16 heads of 128; both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.case import Case
from harness.clock import Budget
from harness.record import Row
from suites.gpu.machine import why_not
from suites.gpu.method import MethodContest, measure

NAME = "gpu.sla"


@dataclass(frozen=True)
class Settings:
    """Sizes, turns at most, and seconds that it may take."""

    shape: tuple[int, ...] = (2, 16, 32760, 128)
    sparsity: float = 0.95
    repeats: int = 30
    seconds: float = 80.0
    device: str = "cuda"


def contest(settings: Settings, direction: str, case: str = NAME) -> MethodContest:
    """One direction; the density is that of the whole blocks that are kept."""
    batch, heads, seq, dim = settings.shape
    blocks = -(-seq // 64)
    kept = max(1, int(round(1 - settings.sparsity, 6) * blocks))
    arguments = {"keep_ratio": round(1 - settings.sparsity, 6), "block_q": 128, "block_k": 64}
    shape = batch, heads, seq, dim
    return MethodContest(
        case, "sla", "sparse_linear_attention", arguments, kept / blocks, shape, direction, device=settings.device
    )


def run(settings: Settings) -> Iterator[Row]:
    """Rows of both directions; each has half of the seconds."""
    for direction in ("forward", "backward"):
        yield from measure(contest(settings, direction), settings.repeats, Budget(settings.seconds / 2))


CASE = Case(NAME, run, Settings(), Settings((1, 2, 512, 32), 0.5, 1, device="cpu"), why_not)
