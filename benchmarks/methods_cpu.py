"""Every sparse method beside dense attention, at matched densities, in one interleaved run.

    python benchmarks/methods_cpu.py

One row per method and density: median milliseconds with selection, quantization and layout included; the density that
was executed; speed against dense; efficiency = density * dense time / time (1.0 is perfect scaling); relative L1 error
and cosine to dense on structured inputs (see structured.py); and the memory that one call adds, measured in a process
of its own.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseattn  # noqa: F401  (registers the ops)

from structured import mass_of_best, video_like

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRID = (16, 32, 32)


@dataclass(frozen=True)
class Method:
    """One way to call one op, and the fraction of query-key pairs it computes."""

    name: str
    op: str
    params: dict[str, Any]
    density: float

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The op's output."""
        out: Tensor = getattr(torch.ops.sparseattn, self.op)(q, k, v, **self.params)[0]
        return out


def methods(grid: tuple[int, int, int], density: float) -> list[Method]:
    """The methods at about one density; those that come in steps take the nearest."""
    tiles = (grid[0] // 4) * (grid[1] // 4) * (grid[2] // 4)
    layout = {"grid": list(grid)}
    keep, window = {"keep_ratio": density}, _window(tuple(size // 4 for size in grid), density)
    chunk = (4, 8, 8)
    chunks = (grid[0] // 4) * (grid[1] // 8) * (grid[2] // 8)
    top = max(2, round(density * chunks))
    return [
        Method("block_topk", "block_topk_attention", keep, density),
        Method("sparge", "sparge_attention", keep, density),
        Method("sla", "sparse_linear_attention", keep, density),
        Method("sage_sla", "sage_sparse_linear_attention", keep, density),
        Method("vsa", "video_sparse_attention", {**layout, "tile": [4, 4, 4], "sparsity": 1 - density}, density),
        Method(
            "sta",
            "sliding_tile_attention",
            {**layout, "tile": [4, 4, 4], "window": list(window)},
            window[0] * window[1] * window[2] / tiles,
        ),
        Method(
            "vmoba",
            "vmoba_attention",
            {**layout, "chunk": list(chunk), "select": "topk", "topk": top},
            top / chunks,
        ),
    ]


def _window(tiles: tuple[int, ...], density: float) -> tuple[int, int, int]:
    """The window of odd or full sides whose share of the tiles is nearest to the density, the most cubic of equals."""
    sides = [[side for side in range(1, n + 1) if side % 2 or side == n] for n in tiles]
    total = tiles[0] * tiles[1] * tiles[2]
    windows = [(t, h, w) for t in sides[0] for h in sides[1] for w in sides[2]]
    return min(windows, key=lambda w: (abs(w[0] * w[1] * w[2] / total - density), max(w) - min(w)))


def timed(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of functions that take turns, after one warm-up each."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if repeat:
                times[place].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(each) for each in times]


def added_memory(methods: list[Callable[..., Tensor]], inputs: tuple[Tensor, ...]) -> list[float]:
    """MiB by which one call of each raises the peak memory of a fresh process, the output included."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.pt"
        torch.save(inputs, file)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            return pool.map(functools.partial(_measure_memory, file), methods, chunksize=1)


def _measure_memory(file: Path, method: Callable[..., Tensor]) -> float:
    inputs = torch.load(file)
    few = [x[:, :, :256].contiguous() for x in inputs]
    dense(*few), methods(GRID, 1.0)[0](*few)  # what the first call loads is not counted
    before = _peak_mib(reset=True)
    method(*inputs)
    return _peak_mib() - before


def _peak_mib(reset: bool = False) -> float:
    """Peak memory of this process since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own attention."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=GRID)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--density", type=float, nargs="+", default=[0.10, 0.25])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    grid = tuple(args.grid)
    inputs = video_like(grid, args.heads, args.dim)
    held = ", ".join(f"{mass_of_best(inputs, f):.2f} in the best {f:.0%}" for f in args.density)
    q, k, v = (x.to(DTYPES[args.dtype]) for x in inputs)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} CPUs, {platform.machine()}")
    print(
        f"grid {'x'.join(map(str, grid))}, {q.shape[2]} tokens, {args.heads} heads, {args.dim} channels, {args.dtype}"
    )
    print(f"softmax mass of a query: {held} of the keys\n")
    chosen = [method for density in args.density for method in methods(grid, density)]
    medians = timed([lambda f=f: f(q, k, v) for f in (dense, *chosen)], args.repeats)
    memory = added_memory([dense, *chosen], (q, k, v))
    exact = dense(q, k, v).float()
    print(f"{'method':<12}{'density':>8}{'ms':>9}{'speed':>8}{'efficiency':>12}{'rel. L1':>9}{'cosine':>8}{'MiB':>7}")
    print(f"{'dense':<12}{1:>8.3f}{medians[0]:>9.1f}{'1.00x':>8}{1:>12.2f}{'':>17}{memory[0]:>7.0f}")
    for method, ms, added in zip(chosen, medians[1:], memory[1:], strict=True):
        out = method(q, k, v).float()
        error = float((out - exact).abs().sum() / exact.abs().sum())
        cosine = float(torch.nn.functional.cosine_similarity(out.flatten(), exact.flatten(), dim=0))
        faster = medians[0] / ms
        print(
            f"{method.name:<12}{method.density:>8.3f}{ms:>9.1f}{f'{faster:.2f}x':>8}{method.density * faster:>12.2f}"
            f"{error:>9.3f}{cosine:>8.4f}{added:>7.0f}"
        )


if __name__ == "__main__":
    main()
