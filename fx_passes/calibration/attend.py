"""Candidates at the sites of a graph that runs op by op, as Dynamo traced it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...attn_ops.capability import Capability
from ...attn_ops.schedule import Schedule
from ...lowering.decide import decide
from ...lowering.decision import Decision
from ...lowering.policy import Policy, Rule
from ..layouts import Grids
from ..normalize import PASSES
from ..place_op import arguments_of, hold_layout
from ..rewrite import graphs_of
from ..sites import CallSite, find_sites

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A candidate at a site: q, k and v to the output."""


def at_every_site(gm: fx.GraphModule, visit: Callable[[CallSite], None]) -> Callable[..., object]:
    """The graph of a backend, to be run op by op; `visit` may change it at each of its sites."""
    grids = Grids(gm)
    for graph in graphs_of(gm):
        for normalize in PASSES:
            normalize(graph)
        for site in find_sites(graph, grids):
            visit(site)
        graph.recompile()
    return gm.forward


def decision_at(site: CallSite, rule: Rule, machine: Capability) -> Decision:
    """What a rule does to a site, without gradients."""
    return decide(replace(site.call, needs_grad=False), machine, Policy([rule]), module=site.module)


def serve(site: CallSite, rule: Rule) -> Attend | str:
    """A rule at a site: what computes it here, without gradients, or why nothing can."""
    decision = decision_at(site, rule, Capability.current(site.device))
    if decision.is_dense:
        return decision.why
    if isinstance(site.scale, fx.Node):
        return "the scale is a tensor of the graph"
    if decision.layout is not None:
        hold_layout(site, decision)
    op = getattr(torch.ops.sparseattn, str(decision.op)).default
    arguments = arguments_of(site, decision, _Constants(site.device))
    return lambda q, k, v: op(q, k, v, **arguments)[0]


@dataclass(frozen=True)
class _Constants:
    """Brings a value that differs by head as a tensor; one that follows the steps is no candidate."""

    device: torch.device

    def node(self, _graph: fx.Graph, name: str, given: Schedule | tuple[float, ...], _like: fx.Node) -> Tensor:
        assert not isinstance(given, Schedule), name
        return torch.tensor(given, dtype=torch.float32, device=self.device)
