"""multihead: open the node that torch.compile keeps nn.MultiheadAttention in, so that its SDPA is seen.

    before:  out, _ = multi_head_attention_forward(x, x, x, embed_dim, heads, in_proj_weight, ...)
    after:   the projections, scaled_dot_product_attention and the output projection, as aten ops in its place

Exact: the nodes are the ones PyTorch itself runs. If the graph does not use the returned weights they are not computed,
which is what lets PyTorch take SDPA. A node whose weights are used stays.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .graph import is_plain, value_of
from .record import Normalized

_MULTIHEAD = torch.nn.functional.multi_head_attention_forward
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_FAST_PATH = (
    "the fast path of nn.TransformerEncoderLayer is one opaque op; "
    "call torch.backends.mha.set_fastpath_enabled(False) before compiling"
)
_WEIGHTS_USED = "nn.MultiheadAttention returns its weights and they are used; pass need_weights=False"


def open_multihead(module: fx.GraphModule) -> list[Normalized]:
    """Open every multi_head_attention_forward node of one graph that computes SDPA; sub-graphs are not entered.

    Returns:
        One record per node; the original stays until its `commit`, and `restore` brings it back.
    """
    nodes = [node for node in module.graph.nodes if node.target is _MULTIHEAD and _can_open(node)]
    records = (_open(module, node, _trace(node)) for node in nodes)
    return [record for record in records if record is not None]


def opaque_sites(module: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """Nodes that compute attention where no pass can see it, each with the reason and what to do."""
    fast = (torch._transformer_encoder_layer_fwd, torch.ops.aten._transformer_encoder_layer_fwd.default)
    for node in module.graph.nodes:
        if node.target in fast:
            yield node, _FAST_PATH
        elif node.target is _MULTIHEAD and _weights_used(node):
            yield node, _WEIGHTS_USED


def _weights_used(node: fx.Node) -> bool:
    """Whether anything but item 0 of the result is read."""
    return any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users)


def _can_open(node: fx.Node) -> bool:
    tensors = [value for value in map(value_of, node.all_input_nodes) if isinstance(value, Tensor)]
    used = any(item.users for item in node.users)
    return used and not _weights_used(node) and all(map(is_plain, tensors))


def _trace(node: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Trace the call as aten ops, on the values the node was traced with; also the nodes that are its inputs."""
    bound = inspect.signature(_MULTIHEAD).bind(*node.args, **node.kwargs)
    # without the weights `is_causal` would replace the mask, which is only a promise of the caller
    bound.arguments |= {"need_weights": False} | ({"is_causal": False} if _needs_weights(bound) else {})
    leaves, spec = pytree.tree_flatten(dict(bound.arguments))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def call(*values: Any) -> Tensor:
        filled = dict(enumerate(leaves)) | dict(zip(places, values, strict=True))
        result: Tensor = _MULTIHEAD(**pytree.tree_unflatten(list(filled.values()), spec))[0]
        return result

    values = [value_of(leaves[place]) for place in places]
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    out = value_of(node)[0]
    with mode, torch.set_grad_enabled(out.requires_grad), _autocast_of(out, values):
        traced = make_fx(call, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    return traced, [leaves[place] for place in places]


def _autocast_of(out: Tensor, values: list[Any]) -> AbstractContextManager[object]:
    """Autocast as it must have been if no input has the dtype of the result: the graph may switch it on by itself."""
    given = {value.dtype for value in values if isinstance(value, Tensor)}
    return contextlib.nullcontext() if out.dtype in given else torch.autocast(out.device.type, out.dtype)


def _needs_weights(bound: inspect.BoundArguments) -> bool:
    return bool(bound.arguments.get("need_weights", True))


def _open(module: fx.GraphModule, node: fx.Node, traced: tuple[fx.GraphModule, list[fx.Node]]) -> Normalized | None:
    inner, inputs = traced
    if sum(step.target is _SDPA for step in inner.graph.nodes) != 1:
        return None
    copies: dict[fx.Node, Any] = {}
    attributes: list[str] = []
    feeds = iter(inputs)
    out: Any = None
    with module.graph.inserting_before(node):
        for step in inner.graph.nodes:
            if step.op == "placeholder":
                copies[step] = next(feeds)
            elif step.op == "output":
                out = fx.map_arg(step.args[0], copies.__getitem__)
            else:
                copies[step] = module.graph.node_copy(step, copies.__getitem__)
                copies[step].meta = _meta(node, step)
                if step.op == "get_attr":
                    attributes.append(_store(module, copies[step], getattr(inner, str(step.target))))
    site = next(copies[step] for step in inner.graph.nodes if step.target is _SDPA)
    added = tuple(copy for step, copy in copies.items() if step.op != "placeholder")
    return _redirect(node, site, out, added, tuple(attributes))


def _meta(node: fx.Node, step: fx.Node) -> dict[str, Any]:
    meta = {name: entry for name, entry in node.meta.items() if name != "example_value"}
    return meta | ({"example_value": step.meta["val"]} if "val" in step.meta else {})


def _store(module: fx.GraphModule, node: fx.Node, constant: Any) -> str:
    """Keep a constant of the trace on the module under a name of its own."""
    name = f"_multihead_{node.name}"
    setattr(module, name, constant)
    node.target = name
    return name


def _redirect(
    node: fx.Node, site: fx.Node, out: fx.Node, added: tuple[fx.Node, ...], attributes: tuple[str, ...]
) -> Normalized:
    items = tuple(user for user in node.users)
    for item in items:
        item.replace_all_uses_with(out)
    return Normalized(site, tuple((item, out) for item in items), added, (node, *items), attributes)
