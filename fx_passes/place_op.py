"""Put an op of ours in the place of a site.

before:  out = scaled_dot_product_attention(q, k, v, attn_mask=None, ...)
after:   pair = torch.ops.sparseattn.<op>(q, k, v, causal=..., provider="...", ...);  out = pair[0]
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..attn_ops.errors import PolicyError
from ..attn_ops.param import varies
from ..attn_ops.registry import backend
from ..attn_ops.spec import Prologue
from ..lowering.decision import Decision
from .fused_prologue import insert_prologue
from .normalize.graph import value_of
from .sites import CallSite
from .step_values import StepValues, Values

_META_KEYS = ("example_value", "val")


def place_op(
    site: CallSite,
    decision: Decision,
    values: StepValues | None,
    attached: dict[str, fx.Node],
    prologue: Prologue | None = None,
) -> fx.Node:
    """Replace the node of a site by the op that was chosen.

    Args:
        site: the site.
        decision: what to put there.
        values: takes the values that follow the steps; None where the graph has nobody to bring them.
        attached: arguments that the module of the site hands over.
        prologue: what to put in the place of the op: see `fused_prologue`.

    Returns:
        The node of its output, which every user of the site now reads.

    Raises:
        PolicyError: if such a value cannot reach the site.
    """
    node, graph = site.node, site.node.graph
    if decision.layout is not None:
        hold_layout(site, decision)
    op = getattr(torch.ops.sparseattn, decision.op).default
    with graph.inserting_before(node):
        operands = tuple(_unit_stride(graph, operand) for operand in (site.q, site.k, site.v))
        arguments = {**arguments_of(site, decision, values), **attached}
        if prologue is None:
            pair = graph.call_function(op, operands, arguments)
            out = graph.call_function(operator.getitem, (pair, 0))
            _describe_result(node, site.q, pair, out)
        else:
            out = insert_prologue(prologue, node, operands, arguments)
        result = _in_layout_of(node, out)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result


def hold_layout(site: CallSite, decision: Decision) -> None:
    """Guard the sizes that the layout stands for: a constant of the graph must not outlive them."""
    read = site.grid.sizes if decision.layout == site.call.layout else ()
    if torch._guards.TracingContext.try_get() is None:  # no guard can be made: the op checks its lengths when it runs
        return
    for size in (*read, *(value_of(operand).shape[2] for operand in (site.q, site.k))):
        int(size)


def arguments_of(site: CallSite, decision: Decision, values: Values | None) -> dict[str, Any]:
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
    return {**arguments, **_parameters(site, decision, values), "provider": decision.provider}


def _parameters(site: CallSite, decision: Decision, values: Values | None) -> dict[str, Any]:
    """What the rule set; a value that varies goes to the argument that takes it as a tensor."""
    assert decision.backend is not None
    tensors = {param.name: param.tensor for param in backend(decision.backend).params if param.tensor}
    given: dict[str, Any] = dict(decision.params)
    for name in [name for name, value in given.items() if varies(value)]:
        if values is None:
            raise PolicyError(
                f"{name} of {site.module or 'a site'} follows the steps or differs by head: only a model compiled with "
                'backend="sparseattn" is told the step. Give one number.'
            )
        given[tensors[name]] = values.node(site.node.graph, name, given.pop(name), site.q)
    return given


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
