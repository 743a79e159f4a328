"""Every sparse method beside dense attention, at matched densities, in one run in turns, on inputs with structure.

Times include selection, quantization and layout. Errors are those of leaving keys out, to dense attention; memory is
what one call adds in a process of its own, the output included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sparseattn  # noqa: F401  (registers the ops)

from harness.case import Case
from harness.clock import interleaved
from harness.error import distance
from harness.fresh import in_fresh_process, peak_mib
from harness.rates import DTYPES, MATMUL, dense_flops, matmul, rates
from harness.record import Row
from harness.structured import mass_of_best, video_like
from suites.cpu.threads import threads

NAME = "methods"
_WARM_UP_TOKENS = 256


@dataclass(frozen=True)
class Settings:
    """Sizes, and the dtypes and densities at which every method is measured."""

    grid: tuple[int, ...] = (16, 32, 32)
    heads: int = 2
    dim: int = 128
    dtype: tuple[str, ...] = ("fp32", "bf16")
    density: tuple[float, ...] = (0.10, 0.25)
    threads: int = 2
    repeats: int = 5
    memory: bool = True


@dataclass(frozen=True)
class Method:
    """One way to call one op, and the fraction of query-key pairs it computes."""

    name: str
    op: str
    density: float
    params: dict[str, Any] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The op's output."""
        out: Tensor = getattr(torch.ops.sparseattn, self.op)(q, k, v, **self.params)[0]
        return out


def methods(grid: tuple[int, ...], density: float) -> list[Method]:
    """The methods at about one density; those that come in steps take the nearest."""
    layout, tile, chunk = {"grid": list(grid)}, (4, 4, 4), (4, 8, 8)
    tiles, chunks = ([size // part for size, part in zip(grid, parts, strict=True)] for parts in (tile, chunk))
    window = _window(tiles, density)
    top = max(2, round(density * _product(chunks)))
    keep, tiled = {"keep_ratio": density}, {**layout, "tile": list(tile)}
    chosen = {**layout, "chunk": list(chunk), "select": "topk", "topk": top}
    return [
        Method("block_topk", "block_topk_attention", density, keep),
        Method("sparge", "sparge_attention", density, keep),
        Method("sla", "sparse_linear_attention", density, keep),
        Method("sage_sla", "sage_sparse_linear_attention", density, keep),
        Method("vsa", "video_sparse_attention", density, {**tiled, "sparsity": 1 - density}),
        Method("sta", "sliding_tile_attention", _product(window) / _product(tiles), {**tiled, "window": list(window)}),
        Method("vmoba", "vmoba_attention", top / _product(chunks), chosen),
    ]


def run(settings: Settings) -> Iterator[Row]:
    """For every dtype a row for dense attention, then one for every method and density."""
    for dtype in settings.dtype:
        yield from measure(settings, dtype)


def measure(settings: Settings, dtype: str) -> Iterator[Row]:
    """The rows of one dtype."""
    inputs = video_like(settings.grid, settings.heads, settings.dim)
    q, k, v = (x.to(DTYPES[dtype]) for x in inputs)
    with threads(settings.threads):
        chosen = [(density, method) for density in settings.density for method in methods(settings.grid, density)]
        calls = {f"{method.name} {density}": _call(method, q, k, v) for density, method in chosen}
        calls = {"dense": _call(dense, q, k, v), MATMUL: matmul(q.dtype), **calls}
        times = interleaved(calls, settings.repeats)
    grid = "x".join(map(str, settings.grid))
    setting = {"grid": grid, "seq": q.shape[2], "heads": settings.heads, "dim": settings.dim}
    setting |= {"dtype": dtype, "threads": settings.threads}
    flops = dense_flops(1, settings.heads, q.shape[2], settings.dim)
    memory = _added_memory if settings.memory else _nothing
    mass = {f"mass_of_best_{density:g}": mass_of_best(inputs, density) for density in settings.density}
    yield Row(
        NAME,
        "dense",
        setting,
        density=1.0,
        time=times["dense"],
        dense=times["dense"],
        rates=rates(flops, 1.0, times["dense"], times[MATMUL]),
        figures=memory(dense, (q, k, v)) | mass,
    )
    exact = dense(q, k, v)
    for density, method in chosen:
        time = times[f"{method.name} {density}"]
        yield Row(
            NAME,
            method.name,
            {**setting, "density": density},
            density=method.density,
            time=time,
            dense=times["dense"],
            rates=rates(flops, method.density, time, times[MATMUL]),
            error=distance(method(q, k, v), exact, to="dense"),
            figures=memory(method, (q, k, v)),
        )


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own attention."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _call(method: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    return lambda: method(*inputs)


def _added_memory(method: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    return {"added_mib": in_fresh_process(_measure_memory, method, inputs)}


def _nothing(*_: object) -> dict[str, float]:
    return {}


def _measure_memory(method: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    """MiB by which one call raises the peak memory of this process."""
    few = [x[:, :, :_WARM_UP_TOKENS].contiguous() for x in inputs]
    dense(*few), Method("block_topk", "block_topk_attention", 1.0)(*few)  # what the first call loads is not counted
    before = peak_mib(reset=True)
    method(*inputs)
    return peak_mib() - before


def _window(tiles: list[int], density: float) -> tuple[int, int, int]:
    """The window of odd or full sides whose share of the tiles is nearest to the density, the most cubic of equals."""
    sides = [[side for side in range(1, n + 1) if side % 2 or side == n] for n in tiles]
    windows = [(t, h, w) for t in sides[0] for h in sides[1] for w in sides[2]]
    return min(windows, key=lambda w: (abs(_product(w) / _product(tiles) - density), max(w) - min(w)))


def _product(sizes: tuple[int, ...] | list[int]) -> int:
    return sizes[0] * sizes[1] * sizes[2]


CASE = Case(NAME, run, Settings(), Settings((4, 8, 16), 1, 32, ("bf16",), (0.25,), 1, 1, memory=False))
