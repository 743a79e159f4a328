"""Candidates for the tile of a key take turns: each must compute what the table's computes, and the fastest is kept."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from triton.errors import TritonError

from .tile import Tile
from .tuned_file import Measured
from .tuned_tiles import TileChoice, use_tiles
from .workloads import Call, Workload

_TURNS = 15
_LEAST_GAIN = 1.03
"""How many times as fast as the table's another tile must be to take its place: less is noise."""


class Clock(Protocol):
    """Measures one call."""

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Run it and tell how long that took."""


class CudaClock:
    """Events around the call, on a cache that has just been overwritten."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._elsewhere = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Run it and tell how long that took."""
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._elsewhere.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end))


class Outcome(NamedTuple):
    """What was measured for a key, and why candidates were not."""

    choice: TileChoice
    key: tuple[int, ...]
    measured: Measured
    refused: dict[Tile, str]


def contest(workload: Workload, clock: Clock) -> Outcome:
    """Measure the candidates of a key, of its calls together, as medians."""
    table, *others = workload.choice.candidates(*workload.key)
    with use_tiles({}):
        calls = workload.small(), workload.timed()
        want = _results(*calls)
    refused = {tile: reason for tile in others if (reason := _why_not(workload, tile, calls, want))}
    times = _times(workload, [table, *(tile for tile in others if tile not in refused)], calls[1], clock)
    best = min(times, key=times.__getitem__)
    if times[table] < _LEAST_GAIN * times[best]:
        best = table
    return Outcome(workload.choice, workload.key, Measured(best, times[best], times[table]), refused)


def _results(small: Sequence[Call], timed: Sequence[Call]) -> list[Tensor]:
    """Those of the small calls; the kernels of both are compiled then."""
    for call in timed:
        call()
    return [result for call in small for result in call()]


def _why_not(workload: Workload, tile: Tile, calls: tuple[list[Call], list[Call]], want: Sequence[Tensor]) -> str:
    """Why the tile is not to be used, "" if it may be."""
    try:
        with use_tiles({(workload.choice.kernel, workload.key): tile}):
            got = _results(*calls)
    except TritonError as error:
        return str(error).strip().splitlines()[0].partition(". ")[0]
    errors = [_error(*results) for results in zip(got, want, strict=True)]
    if all(error <= workload.tolerance for error in errors):  # NaN is not
        return ""
    return f"off by {max(errors):.1e}, and {workload.tolerance:.0e} is allowed"


def _error(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance; infinities must be equal."""
    distance = torch.where(got == want, 0.0, got.double() - want.double()).norm()
    size = torch.where(want.isinf(), 0.0, want.double()).norm()
    return float(distance / size.clamp_min(torch.finfo(torch.float32).tiny))


def _times(workload: Workload, tiles: Sequence[Tile], timed: Sequence[Call], clock: Clock) -> dict[Tile, float]:
    turns: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    for _ in range(_TURNS):
        for tile, times in turns.items():
            with use_tiles({(workload.choice.kernel, workload.key): tile}):
                times.append(sum(map(clock.milliseconds, timed)))
    return {tile: statistics.median(times) for tile, times in turns.items()}
