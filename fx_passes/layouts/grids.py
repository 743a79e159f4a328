"""The token grid of an attention site, where its graph proves it.

Every dimension is followed from where it is named (the output of a convolution, the axes of a video given as input, a
mesh of positions) through the graph to the tokens of the query and key. No model is known by name. A grid is reported
only if query and key agree and nothing contradicts.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ...attn_ops.video_layout import VideoLayout
from ..normalize.graph import Size, same_shape
from .axis import Dim, conflict_of, grid_of, product, unify, unknown
from .follow import INPUT, Dims, follow
from .shapes import hint, is_symbolic, shape_of

_TOKENS = 2  # dimension of the tokens in (B, H, S, D)


@dataclass(frozen=True)
class TokenGrid:
    """What the graph says about the tokens of one site.

    Args:
        layout: the grid at the sizes traced with, or None if it is not known.
        sizes: the sizes it was read from, symbolic ones among them: the layout holds while they keep their value.
        note: why it is not known, where there is more to say than that nothing names it.
    """

    layout: VideoLayout | None = None
    sizes: tuple[Size, ...] = ()
    note: str = ""


class Grids:
    """Reads the grids of a graph and of its sub-graphs, which get the dimensions of what their callers pass."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._known: dict[fx.Node, Dims] = {}
        self._callers: dict[fx.Graph, list[fx.Node]] = {}
        self._called: dict[fx.Node, list[fx.Graph]] = {}
        self._collect(module)

    def at(self, q: fx.Node, k: fx.Node, v: fx.Node) -> TokenGrid:
        """The grid of the tokens that query and key share."""
        dims = [self._tokens(operand) for operand in (q, k, v)]
        for dim in dims:
            if note := conflict_of(dim):
                return TokenGrid(note=note)
        found = [_read(dim) for dim in dims]
        query, key, value = found
        if query.layout is None or query.layout != key.layout or not same_shape(query.sizes, key.sizes):
            return TokenGrid(note=query.note or key.note)
        if value.layout not in (None, query.layout):
            return TokenGrid(note=f"the values lie as {value.layout}, query and key as {query.layout}")
        if any(map(is_symbolic, query.sizes)) and torch._guards.TracingContext.try_get() is None:
            return TokenGrid(note=f"the grid {query.layout} is symbolic and an exported graph cannot be guarded")
        return query

    def _tokens(self, operand: fx.Node) -> Dim:
        dims = self.dims(operand)
        return dims[_TOKENS] if len(dims) > _TOKENS else unknown(1)

    def dims(self, node: fx.Node) -> Dims:
        """What every dimension of a node is (of each tensor, if it gives several)."""
        todo = [node]
        while todo:
            current = todo[-1]
            waiting = [other for other in self._needs(current) if other not in self._known]
            if current in self._known or not waiting:
                todo.pop()
                if current not in self._known:
                    self._known[current] = self._follow(current)
            else:
                todo += waiting
        return self._known[node]

    def _needs(self, node: fx.Node) -> Iterator[fx.Node]:
        if node.op == INPUT:
            yield from (caller for caller, _ in self._passed(node))
        elif (inner := self._inner_of(node)) is not None:
            yield inner
        else:
            yield from (other for other in node.all_input_nodes if shape_of(other) is not None)

    def _follow(self, node: fx.Node) -> Dims:
        shape = shape_of(node)
        if shape is None:
            return ()
        if node.op == INPUT and node.graph in self._callers:
            return self._from_callers(node, shape)
        if (inner := self._inner_of(node)) is not None:
            return self._known[inner]
        return follow(node, shape, self._known)

    def _from_callers(self, node: fx.Node, shape: Sequence[Size]) -> Dims:
        passed = [self._known[caller] for caller, fits in self._passed(node) if fits]
        if len(passed) != len(self._callers[node.graph]) or not passed:
            return tuple(map(unknown, shape))
        return tuple(unify([dims[dim] for dims in passed]) for dim in range(len(shape)))

    def _passed(self, node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
        """What each caller passes for a placeholder of a sub-graph, and whether it has its shape."""
        placeholders = node.graph.find_nodes(op=INPUT)
        for caller in self._callers.get(node.graph, ()):
            operands = _operands(caller)[-len(placeholders) :]
            if len(operands) == len(placeholders):
                operand = operands[placeholders.index(node)]
                sizes, shape = shape_of(operand), shape_of(node)
                fits = sizes is not None and shape is not None and same_shape(sizes, shape)
                yield operand, fits

    def _inner_of(self, node: fx.Node) -> fx.Node | None:
        """The node inside a sub-graph that a result of calling it comes from."""
        if node.target is not operator.getitem or type(node.args[1]) is not int:
            return None
        graphs = self._called.get(cast(fx.Node, node.args[0]), [])
        if len(graphs) != 1:  # none, or the branches of a cond
            return None
        outputs: Any = graphs[0].output_node().args[0]
        inner = outputs[node.args[1]] if isinstance(outputs, list | tuple) else None
        return inner if isinstance(inner, fx.Node) else None

    def _collect(self, module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            for given in node.all_input_nodes if node.op == "call_function" else ():
                child = getattr(module, str(given.target), None) if given.op == "get_attr" else None
                if isinstance(child, fx.GraphModule):
                    if child.graph not in self._callers:
                        self._collect(child)
                    self._callers.setdefault(child.graph, []).append(node)
                    self._called.setdefault(node, []).append(child.graph)


def _operands(caller: fx.Node) -> list[fx.Node]:
    leaves = tree_leaves((caller.args, caller.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def _read(dim: Dim) -> TokenGrid:
    """The layout that a dimension of tokens has: one grid, and other tokens on one side of it."""
    grids = [(place, sizes) for place, run in enumerate(dim) if (sizes := grid_of(run)) is not None]
    if len(grids) != 1:
        return TokenGrid(note="there is more than one grid in the sequence" if grids else "")
    place, sizes = grids[0]
    before, after = dim[:place], dim[place + 1 :]
    if before and after:
        return TokenGrid(note="there are other tokens before and after the grid")
    text: Size = sum(map(product, (*before, *after)))
    time, height, width = map(hint, sizes)
    layout = VideoLayout((time, height, width), hint(text), bool(before) and hint(text) > 0)
    return TokenGrid(layout, (*sizes, text))
