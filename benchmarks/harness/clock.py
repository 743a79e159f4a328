"""Time functions that take turns in one process, so that whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from .record import Timing

_LEAST_TURNS = 3


class Clock(Protocol):
    """Measures one call."""

    name: str

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Run it and tell how long that took."""


class HostClock:
    """For a CPU: of one thread its own CPU time, which other jobs hardly disturb; of more the wall clock."""

    def __init__(self) -> None:
        alone = torch.get_num_threads() == 1
        self.name = "thread CPU time" if alone else "wall clock"
        self._now = time.thread_time if alone else time.perf_counter

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Run it and tell how long that took."""
        start = self._now()
        call()
        return 1e3 * (self._now() - start)


class CudaClock:
    """For a GPU: events around the call, on a cache that has just been overwritten."""

    name = "CUDA events"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._elsewhere = torch.empty(4 * cache, dtype=torch.int8, device="cuda")

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Run it and tell how long that took."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._elsewhere.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))


@dataclass
class Budget:
    """Seconds that a case may take, from its making on."""

    seconds: float = float("inf")
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._start = self.now()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (self.now() - self._start)

    @property
    def spent(self) -> str:
        """Why a row was not measured, once nothing is left; else nothing."""
        return "" if self.left > 0 else f"the case's {self.seconds:.0f} seconds were spent before"


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Clock | None = None,
    *,
    loops: int = 1,
    budget: Budget | None = None,
) -> dict[str, Timing]:
    """Times of functions that take turns, after one warm-up each.

    Args:
        calls: the functions by name.
        repeats: turns that are timed, at most; with a budget that runs out fewer, but 3 if so many were asked for.
        clock: a HostClock if not given.
        loops: calls per turn, for what is too short for the clock; the times are of one.
        budget: seconds that may be used.

    Returns:
        The median and quartiles of every function.
    """
    clock = clock or HostClock()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        if turn > _LEAST_TURNS and budget and budget.left <= 0:
            break
        for name, call in calls.items():
            taken = clock.milliseconds(call if loops == 1 else lambda call=call: [call() for _ in range(loops)])
            if turn:
                times[name].append(taken / loops)
    return {name: summary(taken, clock.name) for name, taken in times.items()}


def summary(times: list[float], clock: str) -> Timing:
    """Median and quartiles of milliseconds."""
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(statistics.median(times), quartiles[0], quartiles[2], len(times), clock)
