"""Workload: block-sparse attention of one size, forward or backward, by every provider that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparseattn
from sparseattn.attn_ops.blocks.block_index import BlockIndex

from harness.clock import Budget
from harness.contest import Call, Contest, MissingError, Prepare, compete
from harness.error import sampled_distance
from harness.inputs import normal, random_lists
from harness.rates import DTYPES, dense_flops
from harness.record import Row, Scalar
from suites.gpu.machine import baselines, clock_of

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_NOT_ON_A_GPU = ("cpu", "reference")


@dataclass(frozen=True)
class Workload:
    """Sizes of one contest.

    Args:
        case: the case of its rows.
        seq, heads, dim, batch: of q, k and v.
        block: tokens of a block of queries and of keys.
        keep: key blocks of every block of queries, drawn at random.
        direction: "forward" or "backward".
        dtype: of q, k and v.
        device: "cuda", or "cpu" to try the machinery.
    """

    case: str
    seq: int
    heads: int
    dim: int
    keep: int
    batch: int = 1
    block: tuple[int, int] = (64, 64)
    direction: str = "forward"
    dtype: str = "bf16"
    device: str = "cuda"

    @property
    def setting(self) -> dict[str, Scalar]:
        """What the rows say."""
        names = ("seq", "heads", "dim", "batch", "keep", "direction", "dtype")
        return {name: getattr(self, name) for name in names} | {"block": "x".join(map(str, self.block))}


@dataclass(frozen=True)
class Inputs:
    """q, k and v, the gradient of the output, and lists of key blocks."""

    qkv: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    lists: BlockIndex | None


def inputs_of(workload: Workload) -> Inputs:
    """The same for every contender."""
    torch.manual_seed(0)
    shape = workload.batch, workload.heads, workload.seq, workload.dim
    qkv = normal(shape, DTYPES[workload.dtype], workload.device)
    lists = random_lists(workload.heads, workload.seq, workload.block, keep=workload.keep, device=workload.device)
    return Inputs(qkv, torch.randn_like(qkv[0]), lists)


def timed_call(attend: Attention, inputs: Inputs, direction: str) -> Call:
    """A forward, or the backward of a forward that has run."""
    if direction == "forward":
        return torch.no_grad()(lambda: attend(*inputs.qkv))
    leaves = [x.detach().requires_grad_() for x in inputs.qkv]
    out = attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True)


def measure(
    workload: Workload,
    repeats: int,
    budget: Budget,
    others: Mapping[str, Callable[[Inputs], Attention]] | None = None,
    providers: tuple[str, ...] | None = None,
) -> Iterator[Row]:
    """The rows of our providers, or of others; dense attention takes turns with them."""
    inputs = inputs_of(workload)
    own = {name: ours(name) for name in providers or our_providers()} if others is None else others
    flops = dense_flops(workload.batch, workload.heads, workload.seq, workload.dim, workload.direction)

    def errors(result: Any) -> dict[str, Scalar]:
        # Gradients of such lengths have no cheap truth: the case `correctness` compares them at small ones.
        return sampled_distance(result, inputs.qkv, inputs.lists) if workload.direction == "forward" else {}

    def prepared(make: Callable[[Inputs], Attention]) -> Prepare:
        return lambda: timed_call(make(inputs), inputs, workload.direction)

    contest = Contest(
        workload.case,
        workload.setting,
        flops,
        {name: prepared(make) for name, make in own.items()},
        baselines(workload.device, lambda attend: timed_call(attend, inputs, workload.direction)),
        inputs.lists.density,
        errors,
        device=workload.device,
        dtype=DTYPES[workload.dtype],
    )
    yield from compete(contest, repeats, clock_of(workload.device), budget)


def our_providers(backend: str = "block_sparse") -> tuple[str, ...]:
    """Our providers of an op that are for a GPU: Triton, Gluon when there is one; vendors are peers."""
    known = sparseattn.backends()[backend].providers
    return tuple(p.name for p in known if p.name not in _NOT_ON_A_GPU and p.support.package in (None, "triton"))


def ours(provider: str) -> Callable[[Inputs], Attention]:
    """Our op by one provider, if that is right on small shapes."""

    def make(inputs: Inputs) -> Attention:
        from suites.gpu.correctness import failure

        if why := failure("block_sparse", provider, inputs.qkv[0].device.type):
            raise MissingError(why)
        lists, sizes = inputs.lists, {"block_q": inputs.lists.block_q, "block_k": inputs.lists.block_k}
        op = torch.ops.sparseattn.block_sparse_attention
        return lambda q, k, v: op(q, k, v, lists.index, lists.count, **sizes, provider=provider)[0]

    return make
