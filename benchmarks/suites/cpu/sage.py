"""INT8 attention (sage) beside dense attention, over lengths and head dims: where it pays on this CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import sparseattn  # noqa: F401  (registers the ops)

from harness.case import Case
from harness.clock import interleaved
from harness.error import distance
from harness.inputs import normal
from harness.rates import DTYPES, MATMUL, dense_flops, matmul, rates
from harness.record import Row
from suites.cpu.threads import threads

NAME = "sage"


@dataclass(frozen=True)
class Settings:
    """Of seq, dim, dtype and threads every combination is measured, with its default options."""

    seq: tuple[int, ...] = (1024, 2048, 4096, 8192)
    dim: tuple[int, ...] = (64, 128)
    dtype: tuple[str, ...] = ("fp32", "bf16")
    heads: int = 2
    threads: tuple[int, ...] = (1,)
    repeats: int = 5


def run(settings: Settings) -> Iterator[Row]:
    """A row for every combination."""
    for number, name, dim, seq in itertools.product(settings.threads, settings.dtype, settings.dim, settings.seq):
        with threads(number):
            torch.manual_seed(0)
            q, k, v = normal((1, settings.heads, seq, dim), DTYPES[name])

            def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

            def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                out: Tensor = torch.ops.sparseattn.sage_attention(q, k, v)[0]
                return out

            times = interleaved({"dense": dense, "sage": ours, MATMUL: matmul(q.dtype)}, settings.repeats)
            yield Row(
                NAME,
                "sage",
                {"seq": seq, "dim": dim, "heads": settings.heads, "dtype": name, "threads": number},
                density=1.0,
                time=times["sage"],
                dense=times["dense"],
                rates=rates(dense_flops(1, settings.heads, seq, dim), 1.0, times["sage"], times[MATMUL]),
                error=distance(ours(), dense(*(x.float() for x in (q, k, v))), to="fp32"),
            )


CASE = Case(NAME, run, Settings(), Settings((256,), (32,), ("bf16",), 1, (1,), 1))
