"""Several ways to compute one thing: each is prepared, run and compared with the truth; those that are right are timed.

Whoever is missing, fails or is wrong gets a row that says so, and no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .clock import Budget, Clock, interleaved
from .rates import MATMUL, matmul, rates
from .record import Row, Scalar, Timing

Call = Callable[[], Any]
Prepare = Callable[[], Call]
"""Imports what it needs, converts the inputs, and gives the call that is timed; raises Missing or anything else."""

_LONGEST = 300


class MissingError(Exception):
    """What a contender lacks here, in a sentence."""


@dataclass(frozen=True)
class Contest:
    """One workload.

    Args:
        case: the case of its rows.
        setting: sizes, dtype, direction.
        flops: operations of dense attention.
        contenders: by name.
        baselines: dense attention, by name; the fastest is what speeds are relative to.
        density: of the contenders.
        errors: of what a call gives, to the truth; a "relative_l2" beyond the tolerance is wrong.
        tolerance: largest relative L2 error of a contender that is timed.
        device: "cuda", or "cpu" to try the machinery.
        dtype: of the inputs, and of the torch.mm that takes turns.
    """

    case: str
    setting: Mapping[str, Scalar]
    flops: float
    contenders: Mapping[str, Prepare]
    baselines: Mapping[str, Prepare] = field(default_factory=dict)
    density: float = 1.0
    errors: Callable[[Any], dict[str, Scalar]] = lambda _: {}
    tolerance: float = 2e-2
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


def compete(contest: Contest, repeats: int, clock: Clock | None, budget: Budget) -> Iterator[Row]:
    """First the rows of those that are not timed, then those that are."""
    ready: dict[str, Call] = {}
    errors: dict[str, dict[str, Scalar]] = {}
    for name, prepare in {**contest.baselines, **contest.contenders}.items():
        try:
            ready[name], errors[name] = _checked(contest, name, prepare, budget)
        except Exception as error:  # noqa: PERF203  (whatever a package raises, the others go on)
            yield Row(contest.case, name, contest.setting, missing=reason(error))
    if not ready:
        return
    calls = {**ready, MATMUL: matmul(contest.dtype, contest.device)}
    times = interleaved(calls, repeats, clock, budget=budget)
    dense = min((times[name] for name in contest.baselines if name in times), key=lambda time: time.ms, default=None)
    for name in ready:
        yield _row(contest, name, times, dense, errors[name])


def reason(error: Exception) -> str:
    """An error as one line."""
    told = " ".join(str(error).split())[:_LONGEST]
    return told if isinstance(error, MissingError) else f"{type(error).__name__}: {told}"


def _checked(contest: Contest, name: str, prepare: Prepare, budget: Budget) -> tuple[Call, dict[str, Scalar]]:
    """The call, and the error of what it gives."""
    if budget.spent:
        raise MissingError(budget.spent)
    call = prepare()
    result = call()
    if name in contest.baselines:
        return call, {}
    errors = contest.errors(result)
    wrong = errors.get("relative_l2", 0.0)
    if not float(wrong) <= contest.tolerance:  # so that NaN is wrong
        raise MissingError(f"wrong: relative L2 error {wrong:.1e}, at most {contest.tolerance:g} is right")
    return call, errors


def _row(
    contest: Contest, name: str, times: Mapping[str, Timing], dense: Timing | None, errors: Mapping[str, Scalar]
) -> Row:
    density = 1.0 if name in contest.baselines else contest.density
    return Row(
        contest.case,
        name,
        contest.setting,
        density=density,
        time=times[name],
        dense=dense,
        rates=rates(contest.flops, density, times[name], times[MATMUL], contest.device),
        error=errors,
    )
