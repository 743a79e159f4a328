"""Rewrite the attention of a graph: normalize, find sites, decide, replace.

    before:  out = scaled_dot_product_attention(q, k, v, attn_mask=None, ...)
    after:   pair = torch.ops.sparseattn.<op>(q, k, v, causal=..., provider="...", ...);  out = pair[0]

A site that stays dense is left, or put back, exactly as it was. Sub-graphs (checkpoint, cond, scan) are rewritten too.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..attn_ops.call import AttentionCall
from ..attn_ops.capability import Capability
from ..lowering.decide import decide
from ..lowering.decision import Decision
from ..lowering.policy import Policy
from .hoist_tiling import Hoisted, hoist_tiling
from .layouts import Grids
from .normalize.graph import value_of
from .normalize.multihead import opaque_sites, open_multihead
from .normalize.unfused import fuse_unfused
from .report import Report, Row
from .sites import CallSite, find_sites, module_path, source_line

_META_KEYS = ("example_value", "val")


def rewrite_graph(
    module: fx.GraphModule, policy: Policy, capability: Capability | None = None, *, hoist: bool = True
) -> Report:
    """Rewrite a graph and its sub-graphs in place.

    Args:
        module: a graph from Dynamo or torch.export.
        policy: decides what each site becomes.
        capability: the machine to decide for; None means the one each site's tensors are on.
        hoist: keep tokens in tile order between sites, where that is exact.

    Raises:
        RequirementError: if a rule with mode="require" matches a site that its backend cannot serve.
    """
    grids = Grids(module)
    rows = [row for graph in _graphs(module) for row in _rewrite_one(graph, policy, capability, grids)]
    # Only now: a grid is read in raster order, through the graphs before it.
    hoisted = sum(map(hoist_tiling, _graphs(module) if hoist else ()), Hoisted())
    named = tuple(dict.fromkeys(name for rule in policy.rules for name in rule.use))
    machine = str(capability or _capability_of(rows))
    return Report(tuple(rows), policy.name, policy.hash, machine, hoisted, named)


def _graphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and, depth first, the sub-graphs it uses; Dynamo leaves behind those of regions that it inlined."""
    yield module
    used = {node.target for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule) and name in used:
            yield from _graphs(child)


def _rewrite_one(module: fx.GraphModule, policy: Policy, capability: Capability | None, grids: Grids) -> list[Row]:
    opaque = [_opaque_row(node, reason, capability) for node, reason in opaque_sites(module)]
    records = {record.site: record for record in (*open_multihead(module), *fuse_unfused(module))}
    rows, dense = [], set()
    for site in find_sites(module, grids):  # each is read after those before it were replaced: one may feed another
        decision = decide(site.call, capability or Capability.current(site.device), policy, module=site.module)
        if site.grid.note:
            decision = replace(decision, why=f"{decision.why}; no token grid: {site.grid.note}")
        rows.append(Row(site.module, site.source, site.call, decision))
        if decision.is_dense:
            dense.add(site.node)
        else:
            _replace(site, decision)
    for site_node, record in records.items():
        if site_node in dense:
            record.restore()
        else:
            record.commit()
    module.graph.lint()
    module.recompile()
    return [*rows, *opaque]


def _opaque_row(node: fx.Node, reason: str, capability: Capability | None) -> Row:
    """A row for attention that is hidden in a node and cannot be opened."""
    device = capability.device if capability else "cpu"
    call = AttentionCall(0, 1, 1, 0, 0, 0, device=device, barrier=reason)
    decision = Decision(why=reason)
    return Row(module_path(node), source_line(node), call, decision)


def _capability_of(rows: list[Row]) -> Capability:
    return Capability.current(rows[0].call.device if rows else "cpu")


def _replace(site: CallSite, decision: Decision) -> None:
    """Put the chosen op in the place of the site's node."""
    node, graph = site.node, site.node.graph
    if decision.layout is not None:
        _hold(site, decision)
    op = getattr(torch.ops.sparseattn, decision.op).default
    with graph.inserting_before(node):
        operands = tuple(_unit_stride(graph, operand) for operand in (site.q, site.k, site.v))
        pair = graph.call_function(op, operands, _arguments(site, decision))
        out = graph.call_function(operator.getitem, (pair, 0))
        _describe_result(node, site.q, pair, out)
        result = _in_layout_of(node, out)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _hold(site: CallSite, decision: Decision) -> None:
    """Guard the sizes that the layout stands for: a constant of the graph must not outlive them."""
    read = site.grid.sizes if decision.layout == site.call.layout else ()
    if torch._guards.TracingContext.try_get() is None:  # no guard can be made: the op checks its lengths when it runs
        return
    for size in (*read, *(value_of(operand).shape[2] for operand in (site.q, site.k))):
        int(size)


def _arguments(site: CallSite, decision: Decision) -> dict[str, Any]:
    """Keyword arguments of the op: what the site asks, then what the rule set, then who computes it."""
    arguments: dict[str, Any] = {}
    if site.call.causal:
        arguments["causal"] = True
    if site.call.window is not None:
        arguments["window"] = site.call.window
    if site.scale is not None:
        arguments["scale"] = site.scale
    if decision.layout is not None:
        arguments |= {"grid": decision.layout.grid}
        if decision.layout.text_tokens:
            arguments |= {"text_tokens": decision.layout.text_tokens, "text_first": decision.layout.text_first}
    return {**arguments, **dict(decision.params), "provider": decision.provider}


def _unit_stride(graph: fx.Graph, operand: fx.Node) -> fx.Node:
    """The operand, made contiguous if its head_dim is not: our kernels read rows."""
    value = value_of(operand)
    if not isinstance(value, Tensor) or value.shape[-1] == 1 or value.stride(-1) == 1:
        return operand
    fresh = graph.call_function(torch.ops.aten.contiguous.default, (operand,))
    fresh.meta = {**operand.meta, _key_of(operand): _meta_value(value, value.contiguous)}
    return fresh


def _describe_result(node: fx.Node, q: fx.Node, pair: fx.Node, out: fx.Node) -> None:
    """Carry the meta over: caches and printed code rely on it. The value is read, never computed under a transform."""
    value, like = value_of(node), value_of(q)
    key = _key_of(node)
    common = {name: entry for name, entry in node.meta.items() if name not in (*_META_KEYS, "tensor_meta")}
    result = _meta_value(value, lambda: torch.empty_like(like, dtype=value.dtype, requires_grad=value.requires_grad))
    lse = _meta_value(value, lambda: value.new_empty(value.shape[:-1], dtype=torch.float32))
    pair.meta = {**common, key: (result, lse)}
    out.meta = {**common, key: result}


def _in_layout_of(node: fx.Node, out: fx.Node) -> fx.Node:
    """`out` in the layout the graph was traced with.

    Our ops follow the query's layout. SDPA on CUDA may give (B, S, H, D) order whatever the query has, and a `view`
    that was legal on that must stay so.
    """
    traced, ours = value_of(node), value_of(out)
    if traced.stride() == ours.stride() or not traced.transpose(1, 2).is_contiguous():
        return out
    swap, compact = torch.ops.aten.transpose.int, torch.ops.aten.contiguous.default
    for target, dims in ((swap, (1, 2)), (compact, ()), (swap, (1, 2))):
        value = _meta_value(traced, functools.partial(target, value_of(out), *dims))
        out = node.graph.call_function(target, (out, *dims))
        out.meta = {**node.meta, _key_of(node): value}
    return out


def _key_of(node: fx.Node) -> str:
    return "example_value" if "example_value" in node.meta else "val"


def _meta_value(like: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Compute a value under the fake mode of `like`; inside a backend the ambient mode is another one."""
    with getattr(like, "fake_mode", contextlib.nullcontext()):
        return compute()
