"""Measure windows of Sliding Tile Attention on a model's own q, k and v: behind every site, while the model runs dense.

The graphs that Dynamo traces run op by op, with a call to a `Probe` behind each site. Sums are kept, on the device and
for every step, layer and head: memory does not grow with the samples, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..attn_ops.blocks.tiles import Tiling
from ..attn_ops.registry import backend
from ..lowering.rule import Rule
from ..lowering.sta_strategy import Window
from ..lowering.steps import current_step
from .calibration.attend import Attend, at_every_site, serve
from .sites import CallSite


@dataclass
class LossSums:
    """Sums over the calls of one layer at one step.

    Args:
        losses: (2, windows, heads) fp64, of squared and of absolute differences.
        entries: how many differences of one head and window they are sums of.
    """

    losses: Tensor
    entries: int

    def add(self, losses: Tensor, entries: int) -> None:
        """Add one call's."""
        self.losses, self.entries = self.losses + losses, self.entries + entries

    def mean(self) -> Tensor:
        """(2, windows, heads) fp64, on the CPU."""
        return (self.losses / self.entries).cpu()


@dataclass
class WindowLosses:
    """What is measured, and the sums.

    Args:
        rules: the rule of every window, which says for which sites.
        sums: by step and module, in the order in which the model came to them.
        fulls: windows of all tiles that the sites have, each with one that has it.
        refused: why the windows cannot serve a site, by its name.
        called: modules that were measured since it was last cleared.
    """

    rules: Mapping[Window, Rule]
    sums: dict[tuple[int, str], LossSums] = field(default_factory=dict)
    fulls: dict[Window, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    def backend(self, gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        """For torch.compile: the graph as it is, with a probe behind every site that the windows can serve."""
        return at_every_site(gm, self._probe)

    def _probe(self, site: CallSite) -> None:
        if site.call.kind != "self":
            return
        served = [rule.mismatch(site.call, site.module) or serve(site, rule) for rule in self.rules.values()]
        why = next((attend for attend in served if isinstance(attend, str)), "")
        if why or not site.module:
            self.refused[site.module or site.source] = why or "no module owns it, so that no rule could name it"
            return
        self.fulls.setdefault(_full(site, next(iter(self.rules.values()))), site.module)
        probe = Probe(site.module, cast("list[Attend]", served), self)
        with site.node.graph.inserting_after(site.node):
            site.node.graph.call_function(probe, (site.q, site.k, site.v, site.node))


class Probe:
    """Stands behind a site: runs every window on the tensors that are there.

    Args:
        module: of the site.
        attends: the attention of every window.
        into: takes the sums.
    """

    __name__ = "probe"  # the code of a graph calls it by name

    def __init__(self, module: str, attends: Sequence[Attend], into: WindowLosses) -> None:
        self._module, self._attends, self._into = module, attends, into

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> None:
        """Compare every window with `dense`, the site's own output; all (B, H, S, D)."""
        losses = torch.stack([_differences(attend(q, k, v), dense) for attend in self._attends], dim=1)
        entries, step = dense[:, 0].numel(), current_step()
        place = (0 if step is None else step.index, self._module)
        self._into.called.add(self._module)
        if place in self._into.sums:
            self._into.sums[place].add(losses, entries)
        else:
            self._into.sums[place] = LossSums(losses, entries)


def _full(site: CallSite, rule: Rule) -> Window:
    """The window of all tiles of a site that the rule can serve."""
    layout = rule.layout or site.call.layout
    assert layout is not None
    return Tiling(layout, cast(Window, dict(backend("sta").complete(rule.params))["tile"])).grid


def _differences(ours: Tensor, dense: Tensor) -> Tensor:
    """(2, H) fp64, sums of squared and of absolute differences; head by head, which needs the least memory."""
    sums = []
    for one, other in zip(ours.unbind(1), dense.unbind(1), strict=True):
        difference = one.float() - other.float()
        terms = (difference.square(), difference.abs())
        sums.append(torch.stack([term.sum(dtype=torch.float64) for term in terms]))
    return torch.stack(sums, dim=1)
