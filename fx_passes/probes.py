"""Probes: dense attention beside each site, and how far the two are apart as further outputs of the graph.

    before:  pair = op(q, k, v);  out = pair[0];  ...;  return (y,)
    after:   dense = scaled_dot_product_attention(q, k, v);  pair = op(q, k, v);  out = pair[0]
             error = attention_error(out, dense);  ...;  return (y, error)

Nothing waits for the device, and what the graph gave before is what it gives.
"""

from __future__ import annotations

import contextlib
import operator

import torch
from torch import fx

from ..attn_ops.attention_error import ATTENTION_ERROR
from .normalize.graph import value_of
from .regions import region_name, regions_of
from .sites import CallSite

_OPEN = ("tag_activation_checkpoint", "wrap")
"""Regions whose results are those of their sub-graph, as they are, and may be more."""


class Probes:
    """The comparisons of one graph and its sub-graphs, in the order of the rewritten sites.

    Args:
        root: the graph that Dynamo traced.
    """

    def __init__(self, root: fx.GraphModule) -> None:
        self._root = root
        self._errors: list[fx.Node] = []

    def keep_dense(self, site: CallSite) -> fx.Node:
        """A second node of a site's dense attention, which stays when the first is replaced."""
        with site.node.graph.inserting_before(site.node):
            return site.node.graph.node_copy(site.node)

    def compare(self, ours: fx.Node, dense: fx.Node) -> None:
        """Put the comparison behind the attention of a rewritten site."""
        with ours.graph.inserting_after(ours):
            error = ours.graph.call_function(ATTENTION_ERROR, (ours, dense))
        like = value_of(ours)
        with getattr(like, "fake_mode", None) or contextlib.nullcontext():
            value = torch.empty(6, dtype=torch.float64, device=like.device)
        error.meta = {**ours.meta, _key_of(ours): value}
        self._errors.append(error)

    def bring_out(self) -> list[tuple[int, ...] | str]:
        """Make every comparison an output of the graph.

        Returns:
            For each site the outputs it has, counted from the first that was added (several where its sub-graph runs
            several times), or why it can have none.
        """
        outputs: list[fx.Node] = []
        places: list[tuple[int, ...] | str] = []
        for error in self._errors:
            if closed := self._why_closed(error.graph):
                dense = error.args[1]
                error.graph.erase_node(error)
                if isinstance(dense, fx.Node):
                    dense.graph.erase_node(dense)
                places.append(closed)
            else:
                found = self._at_root(error)
                places.append(tuple(range(len(outputs), len(outputs) + len(found))))
                outputs += found
        for node in outputs:
            _return_too(self._root.graph, node)
        for module in self._root.modules():
            if isinstance(module, fx.GraphModule):
                module.graph.lint()
                module.recompile()
        return places

    def _why_closed(self, graph: fx.Graph) -> str:
        """Why a sub-graph cannot have one more result; "" if it can."""
        if graph is self._root.graph:
            return ""
        for region in regions_of(self._root, graph):
            if region_name(region) not in _OPEN or not isinstance(value_of(region), tuple | list):
                return f"it is inside a region of {region_name(region)}"
            if outside := self._why_closed(region.graph):
                return outside
        return ""

    def _at_root(self, error: fx.Node) -> list[fx.Node]:
        """The comparison as nodes of the root's graph, one for each time its sub-graph runs."""
        if error.graph is self._root.graph:
            return [error]
        place = _return_too(error.graph, error)
        found = []
        for region in regions_of(self._root, error.graph):
            region.meta[_key_of(region)] = (*value_of(region), value_of(error))
            with region.graph.inserting_after(region):
                item = region.graph.call_function(operator.getitem, (region, place))
            item.meta = {**region.meta, _key_of(region): value_of(error)}
            found += self._at_root(item)
        return found


def _return_too(graph: fx.Graph, node: fx.Node) -> int:
    """Add a result to a graph; its place."""
    output = graph.output_node()
    (results,) = output.args
    assert isinstance(results, tuple | list)
    output.args = ((*results, node),)
    return len(results)


def _key_of(node: fx.Node) -> str:
    return "example_value" if "example_value" in node.meta else "val"
