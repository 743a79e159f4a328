"""site_blocks: the key blocks that every block of queries reads at one attention site of a model, from a real call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...attn_ops.blocks.block_index import BlockIndex
from ...attn_ops.capability import Capability
from ...attn_ops.checks import default_scale
from ...attn_ops.errors import PolicyError
from ...attn_ops.param import varies
from ...attn_ops.registry import backend
from ...attn_ops.schedule import Schedule
from ...attn_ops.step_range import Step
from ...lowering.decide import decide
from ...lowering.decision import Decision
from ...lowering.policy import Policy, PolicySource
from ...lowering.steps import current_step
from ..explain import traced_afresh
from ..layouts import Grids
from ..normalize.multihead import open_multihead
from ..normalize.unfused import fuse_unfused
from ..rewrite import graphs_of
from ..sites import CallSite, find_sites
from .kept_blocks import KEPT, Parameters, Site, as_tensor


def site_blocks(model: Callable[..., Any], *args: Any, policy: PolicySource, module: str, **kwargs: Any) -> BlockIndex:
    """The blocks that a policy keeps at one site, chosen from the queries and keys that reach it when the model runs.

        index = viz.site_blocks(model, latents, t, text, policy=policy, module="blocks.2.attn1")
        viz.block_map(index).savefig("blocks.png")

    The model runs once with dense attention. Where rules follow the steps, call this inside `sparseattn.steps(i, n)`.

    Args:
        model: a module or function, not compiled; it is not changed.
        args: its positional inputs.
        policy: a Policy, or what `Policy.load` takes.
        module: path of the module that asks for attention, as reports have it. Of several sites in it, the first that
            the policy makes sparse.
        kwargs: its keyword inputs.

    Returns:
        The lists, on the device of the model. Blocks of `sta` and `vsa` are tiles, in tile order; those of `sla` and
        `sage_sla` are the ones that they attend to exactly.

    Raises:
        PolicyError: if the policy is not valid, the model has no such site, it stays dense, or its backend does not
            choose blocks.
    """
    watch = _Watch(Policy.load(policy), module)
    with torch.no_grad():
        traced_afresh(model, watch.backend)(*args, **kwargs)
    if watch.found is None:
        raise PolicyError(f"site_blocks: {watch.why_not()}")
    return watch.found


class _Watch:
    """Puts a call behind the site, which takes its queries and keys.

    Args:
        policy: decides.
        module: path of the module whose site it is.
    """

    def __init__(self, policy: Policy, module: str) -> None:
        self.found: BlockIndex | None = None
        self._policy, self._module = policy, module
        self._seen: dict[str, None] = {}
        self._why = ""

    def backend(self, gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        """For torch.compile: the graph as it is, and behind the site a call."""
        grids = Grids(gm)
        for graph in graphs_of(gm):
            open_multihead(graph)
            fuse_unfused(graph)
            for site in find_sites(graph, grids):
                self._seen[site.module] = None
                if site.module == self._module:
                    self._watch(site)
            graph.recompile()
        return gm.forward

    def why_not(self) -> str:
        """Why nothing was found."""
        if self._module in self._seen:
            return f"{self._module}: {self._why}."
        known = ", ".join(filter(None, self._seen)) or "none"
        return f"module must be that of an attention site, got {self._module!r}. The model has: {known}."

    def _watch(self, site: CallSite) -> None:
        machine, step = Capability.current(site.device), current_step()
        decision = decide(site.call, machine, self._policy, module=site.module, step=step)
        if decision.backend is None:
            self._why = self._why or f"it stays dense ({decision.why})"
            return
        if decision.backend not in KEPT:
            self._why = self._why or f"{decision.backend} does not choose blocks. Those that do: {', '.join(KEPT)}"
            return

        layout = decision.layout or site.call.layout

        def watch(q: Tensor, k: Tensor, scale: float | None) -> None:
            q, k = (x.to(site.call.dtype).contiguous() for x in (q, k))  # as the op sees them under autocast
            asked = Site(q, k, site.call.causal, default_scale(scale, q.shape[-1]), layout)
            self.found = self.found or _chosen(decision, asked, step)

        graph, node = site.node.graph, site.node
        with graph.inserting_after(node):
            graph.call_function(watch, (site.q, site.k, site.scale))


def _chosen(decision: Decision, site: Site, step: Step | None) -> BlockIndex:
    """The blocks of a decision; what varies is given as a tensor, as to the op."""
    assert decision.backend is not None
    spec = backend(decision.backend)
    given: Parameters = dict(spec.complete(decision.params))
    for param in spec.params:
        value = given[param.name]
        if varies(value):
            number = value.at(step, param.name) if isinstance(value, Schedule) else value
            given |= {param.name: param.default, param.tensor: as_tensor(number, site.q.device)}
    return KEPT[decision.backend](site, given)
