"""Layouts: where the tokens of a video lie in a sequence, read from the graph.

The files, from the bottom: `shapes` and `index` (reshapes and slices), `moves` and `flow` (which dimension comes from
which), `axis` (what a dimension enumerates), `follow` (one node), `grids` (the graph, and a site's answer).
"""

from .grids import Grids, TokenGrid

__all__ = ["Grids", "TokenGrid"]
