"""One op against dense attention, its selection and quantization included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.clock import Budget
from harness.contest import Contest, MissingError, Prepare, compete
from harness.error import sampled_distance
from harness.inputs import normal
from harness.rates import DTYPES, dense_flops
from harness.record import Row, Scalar
from suites.gpu.correctness import failure
from suites.gpu.machine import baselines, clock_of
from suites.gpu.workload import Attention, Inputs, our_providers, timed_call


@dataclass(frozen=True)
class MethodContest:
    """An op with its arguments, on one size.

    Args:
        case: the case of its rows.
        backend: whose providers compete; each is checked on small shapes first.
        op: of torch.ops.sparseattn.
        arguments: of the op.
        density: what it computes.
        shape: B, H, S, D.
        direction: "forward" or "backward".
        tolerance: largest relative L2 error to dense attention; None for a sparse method, whose output is not dense.
        device: "cuda", or "cpu" to try the machinery.
    """

    case: str
    backend: str
    op: str
    arguments: Mapping[str, Any]
    density: float
    shape: tuple[int, int, int, int]
    direction: str = "forward"
    tolerance: float | None = None
    device: str = "cuda"

    @property
    def setting(self) -> dict[str, Scalar]:
        """What the rows say."""
        sizes = dict(zip(("batch", "heads", "seq", "dim"), self.shape, strict=True))
        return {**sizes, "dtype": "bf16", "direction": self.direction, "op": self.op} | {
            name: value for name, value in self.arguments.items() if isinstance(value, Scalar)
        }


def measure(
    method: MethodContest,
    repeats: int,
    budget: Budget,
    others: Mapping[str, Callable[[Inputs], Attention]] | None = None,
    providers: tuple[str, ...] | None = None,
) -> Iterator[Row]:
    """The rows of our providers, or of others; dense attention takes turns with them."""
    torch.manual_seed(0)
    qkv = normal(method.shape, DTYPES["bf16"], method.device)
    inputs = Inputs(qkv, torch.randn_like(qkv[0]), None)
    own = (
        {name: ours(method, name) for name in providers or our_providers(method.backend)} if others is None else others
    )

    def prepared(make: Callable[[Inputs], Attention]) -> Prepare:
        return lambda: timed_call(make(inputs), inputs, method.direction)

    def errors(result: Any) -> dict[str, Scalar]:
        # What leaving keys out of noise does says nothing about a kernel.
        exact = method.direction == "forward" and method.tolerance is not None
        return sampled_distance(result, qkv, None) if exact else {}

    batch, heads, seq, dim = method.shape
    contest = Contest(
        method.case,
        method.setting,
        dense_flops(batch, heads, seq, dim, method.direction),
        {name: prepared(make) for name, make in own.items()},
        baselines(method.device, lambda attend: timed_call(attend, inputs, method.direction)),
        method.density,
        errors,
        method.tolerance or 0.0,
        method.device,
        DTYPES["bf16"],
    )
    yield from compete(contest, repeats, clock_of(method.device), budget)


def ours(method: MethodContest, provider: str) -> Callable[[Inputs], Attention]:
    """Our op by one provider, if that is right on small shapes."""

    def make(inputs: Inputs) -> Attention:
        if why := failure(method.backend, provider, inputs.qkv[0].device.type):
            raise MissingError(why)
        op = getattr(torch.ops.sparseattn, method.op)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = op(q, k, v, **method.arguments, provider=provider)[0]
            return out

        return attend

    return make
