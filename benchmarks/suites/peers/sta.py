"""fastvideo-kernel's sliding tiles on its canvas of 18 x 48 x 80 without text. Written against fastvideo-kernel 0.3.2.

Both get q, k and v in tile order: turning tokens is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from harness.case import Case
from harness.clock import Budget
from harness.record import Row
from suites.gpu.machine import why_not
from suites.gpu.method import MethodContest, measure, ours
from suites.gpu.workload import Attention, Inputs, our_providers
from suites.peers.packages import needed

NAME = "peers.sta"
TILE = (6, 8, 8)


@dataclass(frozen=True)
class Settings:
    """The canvas and the window in tiles, heads, turns at most, and seconds that it may take."""

    grid: tuple[int, ...] = (18, 48, 80)
    window: tuple[int, ...] = (3, 3, 3)
    heads: int = 24
    dim: int = 128
    repeats: int = 20
    seconds: float = 60.0
    device: str = "cuda"


def run(settings: Settings) -> Iterator[Row]:
    """Forward only: its kernel has no backward."""
    tokens, tiles, seen = 1, 1, 1
    for size, tile, window in zip(settings.grid, TILE, settings.window, strict=True):
        tokens, tiles, seen = tokens * size, tiles * size // tile, seen * min(window, size // tile)
    arguments = {"grid": list(settings.grid), "tile": list(TILE), "window": list(settings.window), "tiled": True}
    shape = 1, settings.heads, tokens, settings.dim
    own = MethodContest(NAME, "sta", "sliding_tile_attention", arguments, seen / tiles, shape, device=settings.device)
    mine = {name: ours(own, name) for name in (our_providers("sta") if settings.device == "cuda" else ("cpu",))}
    yield from measure(
        own, settings.repeats, Budget(settings.seconds), {**mine, "fastvideo-kernel": upstream(settings)}
    )


def upstream(settings: Settings) -> Callable[[Inputs], Attention]:
    """Its kernel, with one window for all heads."""

    def make(_: Inputs) -> Attention:
        kernel = needed("fastvideo_kernel", "pip install fastvideo-kernel").sliding_tile_attention
        windows, canvas = [tuple(settings.window)] * settings.heads, "x".join(map(str, settings.grid))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return kernel(q, k, v, windows, 0, has_text=False, seq_shape=canvas)

        return attend

    return make


CASE = Case(NAME, run, Settings(), Settings((6, 16, 16), (1, 1, 1), 1, 32, 1, device="cpu"), why_not)
