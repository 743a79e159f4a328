"""Measure candidates on a model's own q, k and v: at every site, behind its dense attention, while the model runs.

The graphs that Dynamo traces run op by op, with a call to a `Probe` behind each site. What the model computes stays
dense attention's; nothing of q, k and v is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from ...attn_ops.capability import Capability
from ..sites import CallSite
from .attend import Attend, at_every_site, decision_at, serve
from .candidates import Candidate
from .clock import Clock, Predicted, timed, untimed
from .ledger import DENSE, Ledger, Objective, Place


@dataclass
class Measurement:
    """What is measured, and where the numbers go.

    Args:
        candidates: what is tried at every site.
        bucket: number of the range of steps that the loop is in now.
        objective: without "time", nothing is timed.
        ledger: takes the sums.
        target: a machine that is not here, whose times are predicted instead.
        machine: the one that the sites are on, once they were found.
    """

    candidates: Sequence[Candidate]
    bucket: Callable[[], int]
    objective: Objective
    ledger: Ledger = field(default_factory=Ledger)
    target: Capability | None = None
    machine: Capability | None = None
    _refused: set[tuple[str, str]] = field(default_factory=set)

    def backend(self, gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        """For torch.compile: the graph as it is, with a probe behind every site."""
        return at_every_site(gm, self._probe)

    def kept(self, number: int) -> float | None:
        """The share of the scores that a candidate computes, or dense attention; None if it is not known."""
        return 1.0 if number == DENSE else self.candidates[number].kept

    def why_not(self) -> str:
        """Why each candidate could not serve the sites that were found, one line for each."""
        return "".join(f"\n  {module}: {reason}" for module, reason in sorted(self._refused))

    def _probe(self, site: CallSite) -> None:
        attends = {number: attend for number, one in enumerate(self.candidates) if (attend := self._serve(site, one))}
        if not attends:
            return
        probe = Probe(site, attends, self._clock(site), self)
        graph, node = site.node.graph, site.node
        with graph.inserting_after(node):
            graph.call_function(probe, (site.q, site.k, site.v, node, node.args, node.kwargs))

    def _serve(self, site: CallSite, candidate: Candidate) -> Attend | None:
        self.machine = Capability.current(site.device)
        served = serve(site, candidate.rule)
        there = None if self.target is None else decision_at(site, candidate.rule, self.target)
        why = served if isinstance(served, str) else there.why if there is not None and there.is_dense else ""
        if why:
            self._refused.add((site.module, why))
        return None if why or isinstance(served, str) else served

    def _clock(self, site: CallSite) -> Clock:
        if self.objective != "time":
            return untimed
        return timed if self.target is None else Predicted(site.call, self.candidates, self.target)


class Probe:
    """Stands behind a site: runs every candidate on the tensors that are there.

    Args:
        site: the site.
        attends: the candidates that can serve it, by number.
        clock: tells what they cost.
        into: takes the sums.
    """

    __name__ = "probe"  # the code of a graph calls it by name

    def __init__(self, site: CallSite, attends: dict[int, Attend], clock: Clock, into: Measurement) -> None:
        self._module, self._kind = site.module, site.call.kind
        self._dense = cast("Callable[..., Tensor]", site.node.target)
        self._attends, self._clock, self._into = attends, clock, into

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Compare every candidate with `dense`, which the site computes from args and kwargs."""
        place = Place(self._module, self._kind, self._into.bucket())
        ledger = self._into.ledger
        scores = float(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        _, seconds = self._clock(DENSE, partial(self._dense, *args, **kwargs))
        ledger.at(place, DENSE).add(dense, dense, seconds, scores)
        for number, attend in self._attends.items():
            ours, seconds = self._clock(number, partial(attend, q, k, v))
            kept = self._into.kept(number)
            ledger.at(place, number).add(ours, dense, seconds, scores if kept is None else scores * kept)
