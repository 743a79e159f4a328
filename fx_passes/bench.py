"""Measure ops against dense SDPA on one shape: interleaved runs, medians, error to fp64.

What is timed is what a user pays: selection, quantization and layout are inside the op.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attn_ops.call import dtype_name
from ..attn_ops.registry import backend

DENSE = "sdpa"


@dataclass(frozen=True)
class Measurement:
    """One row: a backend on one shape. Times in ms; `speedup` and `error` are against dense SDPA and fp64 attention."""

    backend: str
    shape: tuple[int, int, int, int]
    dtype: str
    median_ms: float
    spread_ms: float
    speedup: float
    error: float

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        shape = ",".join(map(str, self.shape))
        times = (f"{self.median_ms:.2f}", f"{self.spread_ms:.2f}", f"{self.speedup:.2f}", f"{self.error:.1e}")
        return (self.backend, shape, self.dtype, *times)


COLUMNS = ("backend", "B,H,S,D", "dtype", "median ms", "spread ms", "speedup", "rel L2 error")


def measure(
    names: Sequence[str],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    repeats: int = 7,
) -> list[Measurement]:
    """Time the ops of the named backends and dense SDPA, in turns, on one random input.

    Random inputs have near-uniform attention: times are meaningful, the error of a sparse method is a worst case.

    Raises:
        PolicyError: if a backend is unknown.
    """
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    runs: dict[str, Callable[[], Tensor]] = {DENSE: lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)}
    for name in names:
        op = getattr(torch.ops.sparseattn, backend(name).op)
        runs[name] = lambda op=op: op(q, k, v)[0]  # type: ignore[misc]  # binds op per iteration
    times, errors = _interleave(runs, exact, repeats, device)
    dense = statistics.median(times[DENSE])
    return [
        Measurement(
            name,
            shape,
            dtype_name(dtype),
            statistics.median(times[name]),
            max(times[name]) - min(times[name]),
            dense / statistics.median(times[name]),
            errors[name],
        )
        for name in runs
    ]


def _interleave(
    runs: dict[str, Callable[[], Tensor]], exact: Tensor, repeats: int, device: str
) -> tuple[dict[str, list[float]], dict[str, float]]:
    errors = {name: ((run().double() - exact).norm() / exact.norm()).item() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times, errors


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
