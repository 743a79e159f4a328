"""Find what modules hand to the attention inside them, and give it to the ops that take it.

before:  attach(["weight", "bias"], [w, b]);  out = scaled_dot_product_attention(q, k, v)
after:   pair = sparse_linear_attention(q, k, v, ..., weight=w, bias=b);  out = pair[0]
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..attn_ops.attach import ATTACH
from ..attn_ops.errors import PolicyError
from ..attn_ops.registry import backend
from .normalize.graph import insert, value_of
from .sites import CallSite, module_path

_TARGETS = (ATTACH, ATTACH.overloadpacket)  # as we write it, and as Dynamo does


class AttachedTensors:
    """What is handed over in one graph, without its sub-graphs."""

    def __init__(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        self._place = {node: place for place, node in enumerate(nodes)}
        self._handing = [node for node in nodes if node.op == "call_function" and node.target in _TARGETS]

    @property
    def need_grad(self) -> bool:
        """Whether a gradient will be asked of any of them."""
        given = [value_of(tensor) for node in self._handing for tensor in node.args[1]]
        return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)

    def of(self, site: CallSite, name: str) -> dict[str, fx.Node]:
        """The arguments of the backend's op that the module of a site hands over: what it last did before the site.

        Raises:
            PolicyError: if a tensor with tokens has not those of the site.
        """
        wanted = backend(name).attached
        before = [node for node in self._handing if self._place[node] < self._place[site.node]]
        for node in reversed(before):
            if module_path(node) == site.module and set(wanted) <= set(node.args[0]):
                given = dict(zip(node.args[0], node.args[1], strict=True))
                return {argument: _by_head(given[argument], site) for argument in wanted}
        return {}

    def erase(self) -> None:
        """Remove the nodes that hand over."""
        for node in self._handing:
            node.graph.erase_node(node)


def _by_head(tensor: fx.Node, site: CallSite) -> fx.Node:
    """A tensor (B, S, H * D) as (B, H, S, D); others, which have no tokens, as they are."""
    value, q = value_of(tensor), value_of(site.q)
    if value.dim() != 3:
        return tensor
    batch, heads, tokens, dim = q.shape
    if tuple(value.shape) != (batch, tokens, heads * dim):
        raise PolicyError(
            f"{site.module}: its attention has {tokens} tokens and {heads} heads of {dim} channels, "
            f"and what is attached is {tuple(value.shape)}. Leave this module out of sparseattn.convert."
        )
    return insert(site.node, "transpose", insert(site.node, "unflatten", tensor, -1, (heads, dim)), 1, 2)
