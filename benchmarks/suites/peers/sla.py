"""SLA's own kernel on its own benchmark: choice of blocks, sparse part and linear part. Written against thu-ml/SLA."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from harness.case import Case
from harness.clock import Budget
from harness.record import Row
from suites.gpu.machine import why_not
from suites.gpu.method import measure, ours
from suites.gpu.sla import Settings, contest
from suites.gpu.workload import Attention, Inputs, our_providers
from suites.peers.packages import needed

NAME = "peers.sla"


def run(settings: Settings) -> Iterator[Row]:
    """Rows of both directions; each has half of the seconds."""
    for direction in ("forward", "backward"):
        own = contest(settings, direction, NAME)
        mine = {name: ours(own, name) for name in (our_providers("sla") if settings.device == "cuda" else ("cpu",))}
        yield from measure(own, settings.repeats, Budget(settings.seconds / 2), {**mine, "SLA": _upstream(settings)})


def _upstream(settings: Settings) -> Callable[[Inputs], Attention]:
    def make(_: Inputs) -> Attention:
        install = "pip install git+https://github.com/thu-ml/SLA"
        kernel = needed("sparse_linear_attention.kernel", install)._attention
        get_block_map = needed("sparse_linear_attention.utils", install).get_block_map

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            blocks = {"BLKQ": 128, "BLKK": 64}
            sparse_map, lists, kept = get_block_map(q, k, topk_ratio=1 - settings.sparsity, **blocks)
            return kernel.apply(q, k, v, sparse_map, lists, kept, 128, 64)

        return attend

    return make


CASE = Case(NAME, run, Settings(), Settings((1, 2, 512, 32), 0.5, 1, device="cpu"), why_not)
