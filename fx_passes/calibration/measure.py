"""Measure candidates on a model's own q, k and v: at every site, behind its dense attention, while the model runs.

The graphs that Dynamo traces run op by op, with a call to a `Probe` behind each site. What the model computes stays
dense attention's; nothing of q, k and v is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from ...attn_ops.capability import Capability
from ...lowering.decide import decide
from ...lowering.policy import Policy
from ..layouts import Grids
from ..normalize.multihead import open_multihead
from ..normalize.unfused import fuse_unfused
from ..place_op import arguments_of
from ..rewrite import graphs_of
from ..sites import CallSite, find_sites
from .candidates import Candidate
from .choose import DENSE
from .ledger import Ledger, Objective, Place

_REPEATS = 3

Attend = Callable[..., Tensor]


@dataclass
class Measurement:
    """What is measured, and where the numbers go.

    Args:
        candidates: what is tried at every site.
        bucket: number of the range of steps that the loop is in now.
        objective: without "time", nothing is timed.
        ledger: takes the sums.
        machine: the one that the sites are on, once they were found.
    """

    candidates: Sequence[Candidate]
    bucket: Callable[[], int]
    objective: Objective
    ledger: Ledger = field(default_factory=Ledger)
    machine: Capability | None = None
    _refused: set[tuple[str, str]] = field(default_factory=set)

    def backend(self, gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        """For torch.compile: the graph as it is, with a probe behind every site."""
        grids = Grids(gm)
        for graph in graphs_of(gm):
            open_multihead(graph)
            fuse_unfused(graph)
            for site in find_sites(graph, grids):
                self._probe(site)
            graph.recompile()
        return gm.forward

    def kept(self, number: int) -> float | None:
        """The share of the scores that a candidate computes, or dense attention; None if it is not known."""
        return 1.0 if number == DENSE else self.candidates[number].kept

    def why_not(self) -> str:
        """Why each candidate could not serve the sites that were found, one line for each."""
        return "".join(f"\n  {module}: {reason}" for module, reason in sorted(self._refused))

    def _probe(self, site: CallSite) -> None:
        attends = {number: attend for number, one in enumerate(self.candidates) if (attend := self._attend(site, one))}
        if not attends:
            return
        probe = Probe(site, attends, self)
        graph, node = site.node.graph, site.node
        with graph.inserting_after(node):
            graph.call_function(probe, (site.q, site.k, site.v, node, node.args, node.kwargs))

    def _attend(self, site: CallSite, candidate: Candidate) -> Attend | None:
        self.machine = Capability.current(site.device)
        decision = decide(site.call, self.machine, Policy([candidate.rule]), module=site.module)
        if decision.is_dense or isinstance(site.scale, fx.Node):
            self._refused.add((site.module, decision.why))
            return None
        op = getattr(torch.ops.sparseattn, decision.op).default
        arguments = arguments_of(site, decision, None)
        return lambda q, k, v: op(q, k, v, **arguments)[0]


class Probe:
    """Stands behind a site: runs every candidate on the tensors that are there.

    Args:
        site: the site.
        attends: the candidates that can serve it, by number.
        into: takes the sums.
    """

    __name__ = "probe"  # the code of a graph calls it by name

    def __init__(self, site: CallSite, attends: dict[int, Attend], into: Measurement) -> None:
        self._module, self._kind, self._dense = site.module, site.call.kind, cast("Attend", site.node.target)
        self._attends, self._into = attends, into

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Compare every candidate with `dense`, which the site computes from args and kwargs."""
        place = Place(self._module, self._kind, self._into.bucket())
        ledger, run = self._into.ledger, _timed if self._into.objective == "time" else _untimed
        scores = float(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        seconds = _timed(lambda: self._dense(*args, **kwargs))[1] if run is _timed else math.inf
        ledger.at(place, DENSE).add(dense, dense, seconds, scores)
        for number, attend in self._attends.items():
            ours, seconds = run(partial(attend, q, k, v))
            kept = self._into.kept(number)
            ledger.at(place, number).add(ours, dense, seconds, scores if kept is None else scores * kept)


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it gives, and the least of a few times; the first run, which may compile a kernel, is not one."""
    out = run()
    times = []
    for _ in range(_REPEATS):
        _wait(out)
        start = time.perf_counter()
        run()
        _wait(out)
        times.append(time.perf_counter() - start)
    return out, min(times)


def _untimed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    return run(), math.inf


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
