"""Forward and backward of block-sparse attention beside dense attention, with the native kernel and without a compiler.

Errors are those of the gradients, relative L2 to fp64, of at most 4,096 tokens: more need all memory in fp64. Which
kernel there is, a process decides once: each has its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparseattn
from sparseattn.attn_ops.blocks.block_index import BlockIndex

from harness.case import Case
from harness.clock import interleaved
from harness.fresh import in_fresh_process
from harness.inputs import random_lists
from harness.rates import DTYPES, MATMUL, dense_flops, matmul, rates
from harness.record import Row
from suites.cpu.threads import threads

NAME = "training"
KERNELS = {"native": "1", "gathered": "0"}
MOST_EXACT = 4096

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Settings:
    """Sizes, fewer tokens without a compiler; of kernel, density and dtype every combination is measured."""

    seq: int = 16384
    gathered_seq: int = 4096
    dim: int = 128
    heads: int = 2
    block: int = 64
    kernel: tuple[str, ...] = ("native", "gathered")
    density: tuple[float, ...] = (0.25, 0.1)
    dtype: tuple[str, ...] = ("fp32", "bf16")
    threads: int = 2
    repeats: int = 5


@dataclass(frozen=True)
class Point:
    """One combination."""

    kernel: str
    seq: int
    dim: int
    heads: int
    block: int
    density: float
    dtype: str
    threads: int


def run(settings: Settings) -> Iterator[Row]:
    """Two rows for every combination: the whole step, and the backward alone."""
    for kernel, density, dtype in itertools.product(settings.kernel, settings.density, settings.dtype):
        seq = settings.seq if kernel == "native" else settings.gathered_seq
        sizes = seq, settings.dim, settings.heads, settings.block
        point = Point(kernel, *sizes, density, dtype, settings.threads)
        yield from in_fresh_process(
            measure, point, settings.repeats, environment={"SPARSEATTN_CPU_KERNEL": KERNELS[kernel]}
        )


def measure(point: Point, repeats: int) -> list[Row]:
    """The rows of one combination."""
    served = next(p for p in sparseattn.backends()["block_sparse"].providers if p.name == "cpu").detail
    assert served is not None
    with threads(point.threads):
        dtype = DTYPES[point.dtype]
        few = replace(point, seq=min(point.seq, MOST_EXACT))
        sparse, inputs, grad, lists = made(few)
        errors = gradient_errors(sparse, inputs, grad, lists.token_mask())
        sparse, inputs, grad, lists = made(point)
        rows = []
        for direction, call in (("forward and backward", both_ways), ("backward", only_back)):
            calls = {"dense": call(scaled_dot_product_attention, inputs, grad), "sparse": call(sparse, inputs, grad)}
            times = interleaved({**calls, MATMUL: matmul(dtype)}, repeats)
            flops = dense_flops(1, point.heads, point.seq, point.dim, direction)
            rows.append(
                Row(
                    NAME,
                    direction,
                    {**asdict(point), "served": served()()},
                    density=lists.density,
                    time=times["sparse"],
                    dense=times["dense"],
                    rates=rates(flops, lists.density, times["sparse"], times[MATMUL]),
                    error=errors,
                )
            )
        return rows


def made(point: Point) -> tuple[Attention, list[Tensor], Tensor, BlockIndex]:
    """Sparse attention to random lists, its inputs, the gradient of its output, and the lists."""
    torch.manual_seed(0)
    shape, dtype = (1, point.heads, point.seq, point.dim), DTYPES[point.dtype]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    lists = random_lists(point.heads, point.seq, point.block, density=point.density)

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.sparseattn.block_sparse_attention(
            q, k, v, lists.index, lists.count, block_q=point.block, block_k=point.block, provider="cpu"
        )[0]
        return out

    return sparse, inputs, torch.randn(shape).to(dtype), lists


def both_ways(attend: Attention, inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """A forward and a backward."""
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def only_back(attend: Attention, inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """The backward of a forward that has run."""
    out = attend(*inputs)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def gradient_errors(attend: Attention, inputs: list[Tensor], grad: Tensor, mask: Tensor) -> dict[str, float | str]:
    """Relative L2 errors of the gradients against fp64, one head at a time."""
    got = torch.autograd.grad(attend(*inputs), inputs, grad)
    wrong, whole = [0.0] * 3, [0.0] * 3
    for head in range(grad.shape[1]):
        exact_inputs = [x[:, head].detach().double().requires_grad_() for x in inputs]
        dense = scaled_dot_product_attention(*exact_inputs, attn_mask=mask[:, head])
        for i, exact in enumerate(torch.autograd.grad(dense, exact_inputs, grad[:, head].double())):
            wrong[i] += float((got[i][:, head].double() - exact).square().sum())
            whole[i] += float(exact.square().sum())
    names = ("dq_relative_l2", "dk_relative_l2", "dv_relative_l2")
    return {"to": "fp64"} | {name: (a / b) ** 0.5 for name, a, b in zip(names, wrong, whole, strict=True)}


CASE = Case(NAME, run, Settings(), Settings(256, 256, 32, 1, 64, ("native",), (0.5,), ("fp32",), 1, 1))
