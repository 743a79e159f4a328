"""Block-sparse attention beside torch's dense attention, at random lists of key blocks; errors are to fp64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from harness.case import Case
from harness.clock import interleaved
from harness.error import block_sparse_distance
from harness.inputs import normal, random_lists
from harness.rates import DTYPES, MATMUL, dense_flops, matmul, rates
from harness.record import Row
from suites.cpu.threads import threads

NAME = "block_sparse"


@dataclass(frozen=True)
class Settings:
    """Sizes; of density, block, dtype and threads every combination is measured."""

    seq: int = 16384
    dim: int = 128
    heads: int = 2
    density: tuple[float, ...] = (1.0, 0.25, 0.1)
    block: tuple[int, ...] = (64,)
    dtype: tuple[str, ...] = ("fp32", "bf16")
    threads: tuple[int, ...] = (2,)
    repeats: int = 5
    provider: str = "auto"


@dataclass(frozen=True)
class Point:
    """One combination."""

    seq: int
    dim: int
    heads: int
    density: float
    block: int
    dtype: str
    threads: int


def run(settings: Settings) -> Iterator[Row]:
    """A row for every combination."""
    sizes = settings.seq, settings.dim, settings.heads
    for number in settings.threads:
        for density, block, dtype in itertools.product(settings.density, settings.block, settings.dtype):
            with threads(number):
                yield measure(Point(*sizes, density, block, dtype, number), settings.repeats, settings.provider)


def measure(point: Point, repeats: int, provider: str) -> Row:
    """The row of one combination; the recorded density is that of the lists."""
    torch.manual_seed(0)
    dtype = DTYPES[point.dtype]
    q, k, v = normal((1, point.heads, point.seq, point.dim), dtype)
    lists = random_lists(point.heads, point.seq, point.block, density=point.density)

    def sparse() -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.ops.sparseattn.block_sparse_attention(
            q, k, v, lists.index, lists.count, block_q=point.block, block_k=point.block, provider=provider
        )
        return result

    def dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    times = interleaved({"dense": dense, "sparse": sparse, MATMUL: matmul(dtype)}, repeats)
    flops = dense_flops(1, point.heads, point.seq, point.dim)
    return Row(
        NAME,
        provider,
        asdict(point),
        density=lists.density,
        time=times["sparse"],
        dense=times["dense"],
        rates=rates(flops, lists.density, times["sparse"], times[MATMUL]),
        error=block_sparse_distance(*sparse(), (q, k, v), lists),
    )


CASE = Case(NAME, run, Settings(), Settings(256, 32, 1, (0.5,), (64,), ("fp32",), (1,), 1))
