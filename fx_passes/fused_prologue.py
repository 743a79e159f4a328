"""Fused prologue: round q and k in the graph, where Inductor fuses it with the norm and rotary embedding before it.

    before:  sage_attention(q, k, v, granularity="per_thread", provider="cpu")
    after:   mean, sub, abs, amax, div, round -> q8, q_scale, k8, k_scale (PyTorch's own operators, traced)
             -> sage_attention_quantized(q8, k8, v, q_scale, k_scale, provider="cpu")

The integers are computed by the function that the one-call op uses. A site that is not fused keeps that op.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..attn_ops.capability import Capability
from ..attn_ops.registry import backend, backends
from ..attn_ops.spec import BackendSpec, Prologue
from ..lowering.decision import Decision
from .normalize.graph import is_plain, value_of
from .sites import CallSite

NAME = "fused prologue"


def fuse_at(
    site: CallSite, decision: Decision, capability: Capability, asked: bool | None
) -> tuple[Decision, Prologue | None]:
    """Choose for a site, and say so in its decision.

    Args:
        site: the site.
        decision: the op that it becomes.
        capability: the machine it is decided for.
        asked: True wherever it is possible, False nowhere, None where it was measured to pay.

    Returns:
        The decision, told what was chosen, and the prologue to put there or None.
    """
    spec = _stands_for(decision)
    if spec is None or spec.prologue is None or asked is False:
        return decision, None
    reasons = _why_not(spec, spec.prologue, site, decision, capability, even_if_slower=asked is True)
    if reasons:
        rejected = (*decision.rejected, (f"{decision.backend}/{NAME}", tuple(reasons)))
        return replace(decision, rejected=rejected), None
    return replace(decision, why=f"{decision.why}; quantization fused into the graph"), spec.prologue


def _stands_for(decision: Decision) -> BackendSpec | None:
    found = (spec for spec in backends().values() if spec.prologue and spec.prologue.of == decision.backend)
    return next(found, None)


def _why_not(
    spec: BackendSpec,
    prologue: Prologue,
    site: CallSite,
    decision: Decision,
    capability: Capability,
    *,
    even_if_slower: bool,
) -> list[str]:
    assert decision.backend is not None
    call = replace(site.call, params=backend(decision.backend).complete(decision.params))
    reasons = prologue.why_not(call, capability)
    if decision.provider not in [provider.name for provider in spec.providers]:
        reasons.append(f"{decision.provider} quantizes in its own kernels")
    if not all(is_plain(value_of(operand)) for operand in (site.q, site.k, site.v)):
        reasons.append("its operands are no plain tensors")
    if not reasons and not even_if_slower and prologue.break_even:
        loss = prologue.break_even(call, capability)
        reasons += [loss] if loss else []
    return reasons


def insert_prologue(
    prologue: Prologue, node: fx.Node, operands: tuple[fx.Node, ...], arguments: Mapping[str, Any]
) -> fx.Node:
    """Trace it in front of the node of a site.

    Args:
        prologue: what to trace.
        node: the node of the site.
        operands: q, k and v.
        arguments: keyword arguments of the op it stands for.

    Returns:
        The node of the output, with its value.
    """
    values = [value_of(operand) for operand in operands]
    dtype, key = value_of(node).dtype, "example_value" if "example_value" in node.meta else "val"

    def attend(*tensors: Tensor) -> Tensor:
        out: Tensor = prologue.attend(*(tensor.to(dtype) for tensor in tensors), **arguments)[0]
        return out

    # What autocast casts is cast above; what is traced is in the precision it is written for.
    with torch.no_grad(), torch.autocast(values[0].device.type, enabled=False):
        traced = make_fx(attend, tracing_mode="symbolic")(*values).graph
    traced.eliminate_dead_code()
    copies: dict[fx.Node, fx.Node] = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
    with node.graph.inserting_before(node):
        out = node.graph.graph_copy(traced, copies)
    assert isinstance(out, fx.Node)
    common = {name: entry for name, entry in node.meta.items() if name not in (key, "tensor_meta")}
    for inner, copy in copies.items():
        if copy not in operands:
            copy.meta = {**common, key: inner.meta["val"]}
    return out
