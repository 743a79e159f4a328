"""Hoist tiling: keep the tokens of a model in tile order from its first tiled site to its last.

    before:  x -> ... -> op(q, k, v) -> ... -> op(q, k, v) -> ... -> y            (every op tiles and untiles)
    after:   x -> tile -> ... -> op(q, k, v, tiled=True) -> ... -> op(q, k, v, tiled=True) -> ... -> untile -> y

Exact: what lies between works token by token, and position tables are tiled once. A grid that its tiles do not fill is
left alone: every layer would then compute on the padding, which costs more than the permutations.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from ..attn_ops.blocks.tiles import Tiling
from ..attn_ops.video_layout import VideoLayout
from .layouts.moves import operands_of
from .layouts.region import Region
from .layouts.shapes import hint, shape_of
from .normalize.graph import compute, value_of

_log = logging.getLogger(__name__)
_OWN_TILES = frozenset({"grid", "text_tokens", "text_first", "tile", "tiled"})


@dataclass(frozen=True)
class Hoisted:
    """What the pass did to a graph.

    Args:
        sites: sites that no longer tile.
        before: tensors they brought into tile order and back: queries, keys, values, gates, outputs.
        after: tensors brought into tile order and back now: tokens that come, tables of positions, tokens that leave.
    """

    sites: int = 0
    before: int = 0
    after: int = 0

    def __add__(self, other: Hoisted) -> Hoisted:
        return Hoisted(self.sites + other.sites, self.before + other.before, self.after + other.after)

    def __str__(self) -> str:
        return f"{self.sites} sites stay in tile order, {self.after} tensors reordered instead of {self.before}"


def hoist_tiling(module: fx.GraphModule) -> Hoisted:
    """Hoist the tiling of a rewritten graph, in place; sub-graphs are not entered. A second time changes nothing."""
    groups: dict[Tiling, list[fx.Node]] = {}
    for node in module.graph.nodes:
        tiling = _tiling_of(node)
        if tiling is not None and tiling.is_full and not tiling.layout.text_tokens:
            groups.setdefault(tiling, []).append(node)
    hoisted = sum((_hoist(module.graph, tiling, sites) for tiling, sites in groups.items()), Hoisted())
    if hoisted.sites:
        module.graph.lint()
        module.recompile()
    return hoisted


def _tiling_of(node: fx.Node) -> Tiling | None:
    """The tiling of a site whose op tiles by itself; None for every other node."""
    op = node.target.default if isinstance(node.target, OpOverloadPacket) else node.target  # as a user, as we write it
    if not isinstance(op, OpOverload) or op.namespace != "sparseattn":
        return None
    arguments = [argument for argument in op._schema.arguments if argument.kwarg_only]
    given: dict[str, Any] = {
        argument.name: node.kwargs.get(argument.name, argument.default_value) for argument in arguments
    }
    if not given.keys() >= _OWN_TILES or given["tiled"] or given.get("kv_grid") is not None:
        return None
    if not all(type(size) is int for size in (*given["grid"], *given["tile"], given["text_tokens"])):
        return None
    layout = VideoLayout(tuple(given["grid"]), given["text_tokens"], given["text_first"])
    return Tiling(layout, tuple(given["tile"]))


def _operands(site: fx.Node) -> list[fx.Node]:
    """The operands that have tokens, (B, H, S, D): queries, keys, values and gates."""
    return [operand for operand in dict.fromkeys(operands_of(site)) if value_of(operand).dim() == 4]


def _hoist(graph: fx.Graph, tiling: Tiling, sites: list[fx.Node]) -> Hoisted:
    region = Region(graph, sites, _operands, tiling.layout.tokens)
    inside = [_elements(tensor) for site in sites for tensor in (*_operands(site), site)]
    crossing = [_elements(tensor) for tensor, _ in (*region.entries, *region.exits)]
    trouble = region.trouble
    if not trouble and sum(crossing) >= sum(inside):
        trouble = f"{len(crossing)} tensors would have to be reordered around them"
    trouble = trouble or _Change(graph, tiling).make(region, sites)
    if trouble:
        _log.debug("%s: its %d sites keep their tiling: %s", tiling, len(sites), trouble)
        return Hoisted()
    return Hoisted(len(sites), len(inside), len(crossing))


def _elements(node: fx.Node) -> int:
    """Elements of a tensor; of a site those of its output."""
    return math.prod(map(hint, shape_of(node) or ()))


@dataclass
class _Change:
    """The change of a graph, and the way back."""

    graph: fx.Graph
    tiling: Tiling
    added: dict[fx.Node, None] = field(default_factory=dict)
    undo: list[Callable[[], object]] = field(default_factory=list)

    def make(self, region: Region, sites: list[fx.Node]) -> str:
        """Make it; why it could not be made, and nothing is changed, or ""."""
        for edges, inward in ((region.entries, True), (region.exits, False)):
            for (node, dim), users in edges.items():
                converted = self._convert(node, dim, inward=inward)
                for user in users:
                    self._keep(user)
                    user.replace_input_with(node, converted)
        for site in sites:
            self._keep(site)
            site.kwargs = {**site.kwargs, "tiled": True}
        try:
            self._trace(region)
        except (RuntimeError, ValueError) as error:  # a view that the other memory layout does not allow
            for step in reversed(self.undo):
                step()
            for node in reversed(self.added):
                self.graph.erase_node(node)
            return str(error)
        return ""

    def _keep(self, node: fx.Node) -> None:
        args, kwargs = node.args, node.kwargs

        def restore() -> None:
            node.args, node.kwargs = args, kwargs

        self.undo.append(restore)

    def _convert(self, node: fx.Node, dim: int, *, inward: bool) -> fx.Node:
        """The tensor in tile order, or back in raster order: (T, H, W) against (T/t, H/h, W/w, t, h, w)."""
        axes = list(zip(self.tiling.grid, self.tiling.tile, strict=True))
        rank = value_of(node).dim()
        if inward:
            sizes, moved = [size for axis in axes for size in axis], [0, 2, 4, 1, 3, 5]
        else:
            sizes, moved = [*self.tiling.grid, *self.tiling.tile], [0, 3, 1, 4, 2, 5]
        order = [*range(dim), *(dim + axis for axis in moved), *range(dim + 6, rank + 5)]
        aten = torch.ops.aten
        steps = (
            (aten.unflatten.int, (dim, sizes)),
            (aten.permute.default, (order,)),
            (aten.flatten.using_ints, (dim, dim + 5)),
        )
        after = node if node.op != "placeholder" else self.graph.find_nodes(op="placeholder")[-1]
        result = node
        for target, args in steps:
            with self.graph.inserting_after(after):
                result = after = self.graph.call_function(target, (result, *args))
            result.meta = {name: entry for name, entry in node.meta.items() if name != "tensor_meta"}
            self._evaluate(result, value_of(node))
            self.added[result] = None
        return result

    def _trace(self, region: Region) -> None:
        """Compute what the members are worth now, under the graph's own autocast: shapes stay, memory may not."""
        entered: dict[fx.Node, Any] = {}
        with contextlib.ExitStack() as stack:
            for node in self.graph.nodes:
                if node.target is _enter_autocast:
                    entered[node] = stack.enter_context(contextlib.ExitStack())
                    entered[node].callback(_exit_autocast, _enter_autocast(*node.args))
                elif node.target is _exit_autocast:
                    entered[node.args[0]].close()
                elif node in region.dims or node in self.added:
                    value = value_of(node)
                    self.undo.append(functools.partial(setattr, node, "meta", node.meta))
                    node.meta = {**node.meta}
                    self._evaluate(node, value[0] if isinstance(value, list | tuple) else value)

    def _evaluate(self, node: fx.Node, like: Tensor) -> None:
        target: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        key = "example_value" if "example_value" in node.meta else "val"
        args = tuple(node.args)
        node.meta[key] = compute(like, lambda *values: target(*values, **fx.map_arg(node.kwargs, value_of)), args)
