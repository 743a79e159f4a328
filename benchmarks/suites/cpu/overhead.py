"""One eager call on tiny tensors, where the arithmetic is nearly free: what an op costs before it computes anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import sparseattn  # noqa: F401  (registers the ops)
from sparseattn.attn_ops.blocks.block_index import BlockIndex

from harness.case import Case
from harness.clock import interleaved
from harness.record import Row
from suites.cpu.threads import threads

NAME = "overhead"
SHAPES = ((1, 2, 64, 32), (1, 2, 128, 32), (1, 4, 256, 64))
BLOCK = 32


@dataclass(frozen=True)
class Settings:
    """The fraction of the blocks, the turns, and the calls of a turn."""

    density: float = 0.5
    repeats: int = 9
    loops: int = 50


def run(settings: Settings) -> Iterator[Row]:
    """A row for every shape and op; figures are microseconds per call."""
    for shape in SHAPES:
        with threads(1):
            torch.manual_seed(0)
            times = interleaved(calls(shape, settings.density), settings.repeats, loops=settings.loops)
        setting = dict(zip(("batch", "heads", "seq", "dim"), shape, strict=True))
        for name, time in times.items():
            yield Row(NAME, name, setting, time=time, dense=times["dense"])


def calls(shape: tuple[int, int, int, int], density: float) -> dict[str, Callable[[], object]]:
    """The attentions on q, k, v of one shape; ragged lists of blocks, with and without a causal edge."""
    q, k, v = (torch.randn(shape) for _ in range(3))
    blocks = shape[2] // BLOCK
    mask = torch.rand(1, shape[1], blocks, blocks) < density
    mask[..., 0] = True
    lists = BlockIndex.from_mask(mask, block_q=BLOCK, block_k=BLOCK)
    ops = torch.ops.sparseattn

    def sparse(causal: bool) -> Callable[[], object]:
        return lambda: ops.block_sparse_attention(
            q, k, v, lists.index, lists.count, block_q=BLOCK, block_k=BLOCK, causal=causal
        )

    return {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "flash_attention": lambda: ops.flash_attention(q, k, v),
        "block_sparse": sparse(causal=False),
        "block_sparse causal": sparse(causal=True),
    }


CASE = Case(NAME, run, Settings(), Settings(0.5, 1, 2))
