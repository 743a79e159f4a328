"""Ranks that share a sequence, as processes of this machine: how far from one process they are, and what each needs.

What a rank does is what the tests of context parallelism have it do (tests/support).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness.case import Case
from harness.record import Row
from harness.source_tree import ROOT

SECONDS = 900.0  # after which ranks that did not come to their end are ended


@dataclass(frozen=True)
class Settings:
    """Numbers of ranks, each a group of its own, and the dictionary of what they do."""

    ranks: tuple[int, ...]
    table: str


def differences(settings: Settings) -> Iterator[Row]:
    """A row for every model and number of ranks: the largest difference of an entry, results and gradients."""
    for ranks in settings.ranks:
        for name, found in _run("sharded_cases", ranks, settings.table).items():
            largest = max(max(rank.values()) for rank in found)
            yield Row("sharded_differences", name, {"ranks": ranks}, error={"largest": largest, "to": "one process"})


def memory(settings: Settings) -> Iterator[Row]:
    """A row for every phase and number of ranks that share the sequence: the most that one of them needs."""
    for group in settings.ranks:
        found = _run("sharded_memory", group, settings.table)["memory"]
        for ranks in found[0]:
            sharing = [of[ranks] for of in found if ranks in of]
            for phase in sharing[0]:
                most = max(of[phase] for of in sharing)
                yield Row("sharded_memory", phase, {"ranks": int(ranks)}, figures={"mb": most / 1e6})


def wire(settings: Settings) -> Iterator[Row]:
    """A row for every method and what it is compared with: the errors of rounding queries and keys on their way."""
    for ranks in settings.ranks:
        for name, (first, *_) in _run("sharded_wire", ranks, settings.table).items():
            for compared, error in first.items():
                errors = {"relative_l1": error["L1"], "relative_l2": error["L2"]}
                yield Row("sharded_wire", name, {"ranks": ranks, "compared": compared}, error=errors)


def _run(module: str, ranks: int, table: str) -> dict[str, list[Any]]:
    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    from support.ranks import run

    return run(f"support.{module}", ranks, table, timeout=SECONDS)


def _why_not() -> str:
    import torch.distributed as dist

    return "" if dist.is_available() and dist.is_gloo_available() else "needs torch.distributed with gloo"


CASES = (
    Case("sharded_differences", differences, Settings((1, 2, 3, 4), "EVERY"), Settings((2,), "OPS"), _why_not),
    Case("sharded_memory", memory, Settings((4,), "TABLE"), Settings((2,), "CASES"), _why_not),
    Case("sharded_wire", wire, Settings((4,), "TABLE"), Settings((2,), "CASES"), _why_not),
)
