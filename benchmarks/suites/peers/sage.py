"""sageattention on its own benchmark: dense INT8 attention. Written against sageattention 1.0.6, in Triton."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from harness.case import Case
from harness.clock import Budget
from harness.record import Row
from suites.gpu.machine import why_not
from suites.gpu.method import measure, ours
from suites.gpu.sage import Settings, contest
from suites.gpu.workload import Attention, Inputs, our_providers
from suites.peers.packages import needed

NAME = "peers.sage"


def run(settings: Settings) -> Iterator[Row]:
    """Rows of values in fp16, which is what it has."""
    own = contest(settings, "fp16", NAME)
    mine = {name: ours(own, name) for name in (our_providers("sage") if settings.device == "cuda" else ("cpu",))}
    yield from measure(own, settings.repeats, Budget(settings.seconds), {**mine, "sageattention": upstream})


def upstream(_: Inputs) -> Attention:
    """Its front door, which subtracts k's mean in place: it gets a copy, as it would need in a model."""
    sageattn = needed("sageattention", "pip install sageattention==1.0.6").sageattn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sageattn(q, k.clone(), v, tensor_layout="HND", is_causal=False)

    return attend


CASE = Case(NAME, run, Settings(), Settings((1, 2, 512, 32), ("fp16",), 1, device="cpu"), why_not)
