"""Normalized: one attention site that a pass put beside what it stands for, and the way back.

Until `commit` the original nodes are all still there, so `restore` gives the graph that was, node for node.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True, eq=False)
class Normalized:
    """What a pass changed at one place. Call `restore` or `commit`, once.

    Args:
        site: the SDPA node.
        redirected: pairs (original, replacement); the users of the original now use the replacement.
        added: the nodes of the pass, in graph order, `site` among them.
        matched: the nodes that the site stands for, in graph order; unused while the site is there.
        attributes: names of constants that the pass stored on the module.
    """

    site: fx.Node
    redirected: tuple[tuple[fx.Node, fx.Node], ...]
    added: tuple[fx.Node, ...]
    matched: tuple[fx.Node, ...]
    attributes: tuple[str, ...] = ()

    def restore(self) -> None:
        """Put everything back exactly as it was."""
        graph = self.site.graph
        for original, replacement in self.redirected:
            replacement.replace_all_uses_with(original)
        for node in reversed(self.added):
            graph.erase_node(node)
        for name in self.attributes:
            delattr(graph.owning_module, name)

    def commit(self) -> None:
        """Erase the nodes that were matched or added and that nothing uses any more; no other node."""
        graph = self.site.graph
        there = set(graph.nodes)
        for node in reversed((*self.matched, *self.added)):
            if node in there and node is not self.site and not node.users:
                graph.erase_node(node)
