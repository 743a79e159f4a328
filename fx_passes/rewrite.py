"""Rewrite the attention of a graph: normalize, find sites, decide, replace.

A site that stays dense is left, or put back, exactly as it was. Sub-graphs (checkpoint, cond, scan) are rewritten too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx

from ..attn_ops.call import AttentionCall
from ..attn_ops.capability import Capability
from ..attn_ops.registry import backend
from ..attn_ops.step_range import Step
from ..lowering.context_parallel import ContextParallel
from ..lowering.decide import decide
from ..lowering.decision import Decision
from ..lowering.policy import Policy
from ..lowering.steps import current_step
from .attached import AttachedTensors
from .fused_prologue import fuse_at
from .hoist_tiling import Hoisted, hoist_tiling
from .layouts import Grids
from .normalize import PASSES, opaque_sites
from .notes import unmatched_rules, unshared
from .parallel.communication import Communication
from .parallel.exchange import Exchanges, Stay
from .parallel.ring_exchange import RingExchange
from .parallel.tokens import Shards
from .parallel.ulysses_exchange import UlyssesExchange
from .place_op import place_op
from .probes import Probes
from .report import Report, Row
from .site_check import site_key
from .sites import CallSite, find_sites, module_path, source_line
from .step_values import StepValues


def rewrite_graph(
    module: fx.GraphModule,
    policy: Policy,
    capability: Capability | None = None,
    *,
    hoist: bool = True,
    values: StepValues | None = None,
    probes: Probes | None = None,
    demoted: Mapping[Hashable, str] | None = None,
    fuse: bool | None = None,
    parallel: ContextParallel | None = None,
) -> Report:
    """Rewrite a graph and its sub-graphs in place, for the step that is set.

    Args:
        module: a graph from Dynamo or torch.export.
        policy: decides what each site becomes.
        capability: the machine to decide for; None means the one each site's tensors are on.
        hoist: keep tokens in tile order between sites, where that is exact.
        values: takes the values that follow the steps: the graph gains inputs for them. None where nobody brings them.
        probes: put dense attention beside every rewritten site and compare. None where nobody reads the comparisons.
        demoted: sites, by `site_key`, that stay dense whatever the policy says, and why.
        fuse: round q and k in the graph: wherever it is possible, nowhere, or (None) where it was measured to pay.
        parallel: exchange shards of the sequence around every site that has them. None where each rank has all.

    Raises:
        RequirementError: if a rule with mode="require" matches a site that its backend cannot serve.
        ParallelError: if a site has shards that cannot be exchanged, or may have some of another graph.
        PolicyError: if a value that follows the steps cannot reach a site.
    """
    trains = any(AttachedTensors(graph.graph).need_grad for graph in graphs_of(module))
    grids = Grids(module) if parallel is None else Shards(module)
    exchanges = Exchanges(parallel, grids) if parallel is not None and isinstance(grids, Shards) else None
    rewriter = _Rewriter(
        policy, capability, current_step(), grids, values, trains, probes, demoted or {}, fuse, exchanges
    )
    rows = [row for graph in graphs_of(module) for row in rewriter.rewrite(graph)]
    if exchanges is not None and rows:
        exchanges.refuse_untold(graph.graph for graph in graphs_of(module))
    # Only now: a grid is read in raster order, through the graphs before it.
    hoisted = sum(map(hoist_tiling, graphs_of(module) if hoist else ()), Hoisted())
    for graph in graphs_of(module):
        graph.graph.lint()
        graph.recompile()
    named = tuple(dict.fromkeys(name for rule in policy.rules for name in rule.use))
    machine = str(capability or _capability_of(rows))
    notes = (*unmatched_rules(policy, rows), *([] if parallel is None else unshared(rows)))
    return Report(tuple(rows), policy.name, policy.hash, machine, hoisted, named, notes)


def graphs_of(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and, depth first, the sub-graphs it uses; Dynamo leaves behind those of regions that it inlined."""
    yield module
    used = {node.target for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule) and name in used:
            yield from graphs_of(child)


@dataclass(frozen=True)
class _Rewriter:
    """What one graph and its sub-graphs are rewritten with."""

    policy: Policy
    capability: Capability | None
    step: Step | None
    grids: Grids
    values: StepValues | None
    trains: bool
    """A module hands over what is trained: its gradient flows through every site, even where nothing else is."""
    probes: Probes | None
    demoted: Mapping[Hashable, str]
    fuse: bool | None
    exchanges: Exchanges | None

    def rewrite(self, module: fx.GraphModule) -> list[Row]:
        """Rewrite one graph, without its sub-graphs."""
        opaque = [_opaque_row(node, reason, self.capability) for node, reason in opaque_sites(module)]
        records = {record.site: record for normalize in PASSES for record in normalize(module)}
        attached = AttachedTensors(module.graph)
        rows, dense = [], set()
        for site in find_sites(module, self.grids):  # each is read after those before it: one may feed another
            if self.trains:
                site = replace(site, call=replace(site.call, needs_grad=True))
            exchange = Stay(site) if self.exchanges is None else self.exchanges.at(site)
            asked = exchange.whole
            decision = self._decide(asked)
            handed = {} if decision.backend is None else attached.of(site, decision.backend)
            if isinstance(exchange, RingExchange):
                communication: Communication | None = exchange.place(decision, self.values)
            else:
                exchange = exchange.decided(decision)
                communication = exchange.communication(handed)
                site, handed = exchange.insert(handed)
                if not decision.is_dense:
                    decision = self._place(site, exchange.of_rank(decision), handed)
                elif not isinstance(exchange, UlyssesExchange):
                    dense.add(site.node)
            rows.append(Row(asked.module, asked.source, asked.call, decision, communication=communication))
        for site_node, record in records.items():
            if site_node in dense:
                record.restore()
            else:
                record.commit()
        attached.erase()
        if self.exchanges is not None:
            self.exchanges.refuse_hidden(module.graph)
        return [*rows, *opaque]

    def _place(self, site: CallSite, decision: Decision, handed: dict[str, fx.Node]) -> Decision:
        """Rewrite a site; returns the decision with what was found on the way."""
        decision, prologue = fuse_at(site, decision, self._machine(site), self.fuse)
        dense = None if self.probes is None else self.probes.keep_dense(site)
        out = place_op(site, decision, self.values, handed, prologue)
        if self.probes is not None and dense is not None:
            self.probes.compare(out, dense)
        return _with_training(decision, handed)

    def _machine(self, site: CallSite) -> Capability:
        return self.capability or Capability.current(site.device)

    def _decide(self, site: CallSite) -> Decision:
        decision = decide(site.call, self._machine(site), self.policy, module=site.module, step=self.step)
        if why := self.demoted.get(site_key(site.module, site.source, site.call, decision)):
            return _left_dense(decision, why)
        if site.grid.note:
            decision = replace(decision, why=f"{decision.why}; no token grid: {site.grid.note}")
        return decision


def _left_dense(decision: Decision, why: str) -> Decision:
    """The decision, overruled."""
    rejected = ((f"{decision.backend}/{decision.provider}", (why,)), *decision.rejected)
    return Decision(rule=decision.rule, rule_text=decision.rule_text, why=f"{why}. left dense", rejected=rejected)


def _with_training(decision: Decision, handed: dict[str, fx.Node]) -> Decision:
    """The decision with a word on the trained parameters, for a method that has some."""
    wanted = () if decision.backend is None else backend(decision.backend).attached
    if not wanted:
        return decision
    what = f"with its {' and '.join(handed)}" if handed else f"training-free, without {' and '.join(wanted)}"
    return replace(decision, why=f"{decision.why}; {what}")


def _opaque_row(node: fx.Node, reason: str, capability: Capability | None) -> Row:
    """A row for attention that is hidden in a node and cannot be opened."""
    device = capability.device if capability else "cpu"
    call = AttentionCall(0, 1, 1, 0, 0, 0, device=device, barrier=reason)
    decision = Decision(why=reason)
    return Row(module_path(node), source_line(node), call, decision)


def _capability_of(rows: list[Row]) -> Capability:
    return Capability.current(rows[0].call.device if rows else "cpu")
