"""Find every scaled_dot_product_attention in a graph and describe it as an AttentionCall.

Reads graphs from Dynamo (meta["example_value"]) and from torch.export (meta["val"]); changes nothing. What cannot be
read for certain becomes a `barrier`, a sentence that keeps the site as it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..attn_ops.call import AttentionCall, MaskKind
from .layouts import Grids, TokenGrid
from .normalize.graph import number_of, value_of
from .normalize.masks import prove_mask
from .normalize.repeat_kv import peel_repeat_kv

SDPA_TARGETS = (
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
_SIZES = ("batch", "heads", "kv_heads", "seq_q", "seq_k", "head_dim")


@dataclass(frozen=True)
class CallSite:
    """One place in a graph that asks for attention.

    Args:
        node: its SDPA node.
        q: node of the query.
        k: node of the key, before any repetition of heads.
        v: node of the value, likewise.
        scale: factor on the scores as the node has it: a number, None, or a node.
        call: what is asked, as plain values.
        module: path of the module that owns it, "blocks.0.attn1"; "" if unknown.
        source: "file.py:12" of the line that calls it; "" if unknown.
        device: device of the query.
        grid: what the graph says about the token grid; its layout is that of the call.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float | fx.Node | None
    call: AttentionCall
    module: str
    source: str
    device: torch.device
    grid: TokenGrid = field(default_factory=TokenGrid)


def find_sites(module: fx.GraphModule, grids: Grids | None = None) -> Iterator[CallSite]:
    """Every SDPA node of one graph in graph order, each read when it is asked for; sub-graphs are not entered.

    `grids` knows the token grids of the graph, or of the one it is a part of; without it none is read.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in SDPA_TARGETS:
            yield read_site(node, grids)


def read_site(node: fx.Node, grids: Grids | None = None) -> CallSite:
    """Describe one SDPA node."""
    given: dict[str, Any] = {**_DEFAULTS, **dict(zip(_PARAMETERS, node.args, strict=False)), **node.kwargs}
    q, k, v, scale = given["query"], given["key"], given["value"], number_of(given["scale"])
    scale = given["scale"] if scale is None else scale
    common: dict[str, Any] = {"node": node, "scale": scale, "module": module_path(node), "source": source_line(node)}
    values = [value_of(operand) for operand in (q, k, v)]
    if barrier := _why_unreadable(values):
        device = values[0].device if isinstance(values[0], Tensor) else torch.device("cpu")
        call = AttentionCall(0, 1, 1, 0, 0, 0, device=device.type, barrier=barrier)
        return CallSite(q=q, k=k, v=v, call=call, device=device, **common)
    heads = values[0].shape[1]
    k, v = _peel_together(k, v, heads)
    call = _describe(value_of(q), value_of(k), value_of(v), value_of(node))
    call = _with_mask(replace(call, scale=None if isinstance(scale, fx.Node) else scale), given)
    grid = grids.at(q, k, v) if grids is not None and call.kind == "self" else TokenGrid()
    call = replace(call, layout=grid.layout)
    return CallSite(q=q, k=k, v=v, call=call, device=values[0].device, grid=grid, **common)


def _why_unreadable(values: list[object]) -> str | None:
    for name, value in zip(("query", "key", "value"), values, strict=True):
        if not isinstance(value, Tensor):
            return f"the {name} has no recorded shape"
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            return "it is inside a torch.func transform (vmap, grad, jvp), where custom ops have no rule"
        if _is_dtensor(value):
            return f"the {name} is a DTensor, whose sharding it does not know"
        if value.dim() != 4:
            return f"the {name} has {value.dim()} dimensions, not 4"
        if not all(map(_has_hint, value.shape)):
            return f"the {name} has a size that depends on data"
    q, k, v = (value for value in values if isinstance(value, Tensor))
    if not (q.dtype == k.dtype == v.dtype):
        return f"query, key and value have different dtypes ({q.dtype}, {k.dtype}, {v.dtype})"
    if not _same(q.shape[0], k.shape[0]) or not _same(k.shape[0], v.shape[0]) or not _same(k.shape[1], v.shape[1]):
        return "query, key and value broadcast over batch or heads"
    if not _same(k.shape[2], v.shape[2]) or not _same(q.shape[3], k.shape[3]):
        return "key has another length than value, or another head_dim than query"
    return None


def _same(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    return bool(statically_known_true(left == right))


def _is_dtensor(value: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _peel_together(k: fx.Node, v: fx.Node, heads: int) -> tuple[fx.Node, fx.Node]:
    """Key and value before `repeat_kv`, if both were repeated alike."""
    peeled_k, groups_k = peel_repeat_kv(k, heads)
    peeled_v, groups_v = peel_repeat_kv(v, heads)
    return (peeled_k, peeled_v) if groups_k == groups_v else (k, v)


def _describe(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> AttentionCall:
    shape = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    batch, heads, kv_heads, seq_q, seq_k, head_dim = (_hint(size) for size in shape)
    return AttentionCall(
        *(batch, heads, kv_heads, seq_q, seq_k, head_dim),
        dtype=out.dtype,  # under autocast the operands still have theirs
        device=q.device.type,
        value_dim=_hint(v.shape[3]),
        needs_grad=out.requires_grad,
        kind="self" if _same(q.shape[2], k.shape[2]) else "cross",
        dynamic=tuple(name for name, size in zip(_SIZES, shape, strict=True) if _is_dynamic(size)),
    )


def _has_hint(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or size.node.has_hint()


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _is_dynamic(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _with_mask(call: AttentionCall, given: dict[str, Any]) -> AttentionCall:
    """Add causal flag, mask and dropout to a call, turning a mask that is proved to be a flag into one."""
    causal, dropout, mask = given["is_causal"], given["dropout_p"], given["attn_mask"]
    if not isinstance(causal, bool):
        return replace(call, barrier="is_causal is computed in the graph")
    dropout = number_of(dropout)
    if dropout is None:
        return replace(call, barrier="dropout_p is computed in the graph")
    call = replace(call, causal=causal, dropout=dropout)
    if mask is None:
        return call
    fact = None if causal else prove_mask(mask, call.seq_q, call.seq_k)
    if fact is not None:
        return replace(call, causal=fact.causal, window=fact.window)
    value = value_of(mask)
    kind: MaskKind = "bool" if isinstance(value, Tensor) and value.dtype == torch.bool else "float"
    return replace(call, mask=kind)


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward made the node, from its meta: "blocks.0.attn1"."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    path = re.sub(r"^(.*\.cell_contents|[LG]\['\w+'\]|self)", "", path)
    path = re.sub(r"\.__dict__\['_modules'\]|\._modules", "", path)
    return re.sub(r"\[(\d+)\]|\['([^']*)'\]", lambda match: f".{match[1] or match[2]}", path).removeprefix(".")


def source_line(node: fx.Node) -> str:
    """`file.py:12` of the innermost frame that made the node, from its meta."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line = frames[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line}"
