"""Regions: the sub-graphs of a Dynamo graph (checkpoint, cond, scan, nested regions) and the nodes that run them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

HANDED_ON = (
    *("tag_activation_checkpoint", "wrap", "invoke_subgraph"),
    *("wrap_with_autocast", "wrap_with_set_grad_enabled"),
)
"""Regions whose last arguments are the operands of their sub-graph, and whose results are its results, as they are."""


def regions_of(root: fx.GraphModule, graph: fx.Graph) -> list[fx.Node]:
    """The nodes that run a sub-graph, wherever in `root` they are."""
    return [user for getter in _getters(root, graph) for user in getter.users]


def region_name(region: fx.Node) -> str:
    """What kind of region a node runs: "cond"."""
    return getattr(region.target, "__name__", str(region.target))


def _getters(module: fx.GraphModule, graph: fx.Graph) -> Iterator[fx.Node]:
    """The get_attr nodes of a sub-graph, wherever they are."""
    for node in module.graph.find_nodes(op="get_attr"):
        child = getattr(module, node.target, None)
        if isinstance(child, fx.GraphModule):
            if child.graph is graph:
                yield node
            yield from _getters(child, graph)
