"""Which tokens of a site are shards: followed through the graph from where they were made, as token grids are.

    x -> shard_tokens -> ... -> q (B, H, L + text, D)     L of the S tokens of x, and text that every rank holds

What cannot be followed is an error, not a guess: attention over a part of its tokens would be silently wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...attn_ops.errors import ParallelError
from ...attn_ops.sharding import SHARD_TOKENS
from ..layouts import Grids
from ..layouts.axis import Axis, Dim, Run, conflict_of, product, unknown
from ..layouts.flow import flow
from ..layouts.follow import Dims
from ..layouts.shapes import shape_of
from ..normalize.graph import op_of, same_size
from ..sites import module_path, source_line
from .ulysses import Piece

_SHARD = (SHARD_TOKENS, SHARD_TOKENS.overloadpacket)  # as we write it, and as Dynamo does
_CLAIM = -1
"""The `place` of an axis of sharded tokens: a claim that is none of a video's."""

_KEEP_RUNS = frozenset({"getitem", "slice", "narrow", "split", "split_with_sizes", "chunk"})
_OPAQUE = frozenset({"multi_head_attention_forward", "_transformer_encoder_layer_fwd"})
_TOKENS = 2  # dimension of the tokens in (B, H, S, D)


@dataclass(frozen=True, eq=False)
class ShardedAxis(Axis):
    """The part of a dimension that this rank has. `whole` is what the dimension was."""

    whole: Dim = ()


class Shards(Grids):
    """Token grids that also know which dimensions are shards."""

    def pieces(self, q: fx.Node, k: fx.Node, v: fx.Node) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of the tokens of queries, keys and values.

        Raises:
            ParallelError: if shards came near one of them on a way that cannot be followed.
        """
        return tuple(self._pieces(node) for node in (q, k, v))

    def whole(self, node: fx.Node) -> Dim:
        """What the tokens of an operand enumerate over all ranks."""
        return tuple(part for run in self.dims(node)[_TOKENS] for part in _whole(run))

    def know(self, node: fx.Node, dims: Dims) -> None:
        """Take it from who made the node."""
        self._known[node] = dims

    def refuse_mixed(self, graph: fx.Graph) -> None:
        """Raise if a graph has attention over shards that is not a site: its softmax would see a part of it.

        Raises:
            ParallelError: naming the place.
        """
        for node in graph.nodes:
            op = op_of(node)
            opaque = getattr(node.target, "__name__", "") in _OPAQUE
            if not opaque and op not in ("softmax", "log_softmax", "matmul"):
                continue
            if any(self._mixes(node, operand) for operand in node.all_input_nodes if self._has_shards(operand)):
                raise ParallelError(
                    f"parallel: attention over shards must be scaled_dot_product_attention, and {op or node.target} at "
                    f"{_place(node)} sees the tokens of one rank. Use that, or gather before it."
                )

    def are_made_in(self, graph: fx.Graph) -> bool:
        """Whether a graph itself makes shards, and does not only get them."""
        return any(node.target in _SHARD for node in graph.nodes)

    def _mixes(self, node: fx.Node, operand: fx.Node) -> bool:
        """Whether a dimension of shards goes into a node and does not come out."""
        through = flow(node)
        if through is None:
            return True
        kept = {source for sources in through for source in sources}
        return any(
            (operand, place) not in kept
            for place, dim in enumerate(self.dims(operand))
            if any(axis.place == _CLAIM for run in dim for axis in run)
        )

    def _tokens(self, operand: fx.Node) -> Dim:
        """A grid is one of the whole sequence."""
        return self.whole(operand) if len(self.dims(operand)) > _TOKENS else unknown(1)

    def _follow(self, node: fx.Node) -> Dims:
        if node.target not in _SHARD:
            return super()._follow(node)
        operand, dim = node.args[0], node.args[1]
        assert isinstance(operand, fx.Node)
        assert isinstance(dim, int)
        dims, shape = list(self._known[operand]), shape_of(node)
        assert shape is not None
        dims[dim] = ((ShardedAxis(shape[dim], _CLAIM, whole=dims[dim]),),)
        return tuple(dims)

    def _pieces(self, node: fx.Node) -> tuple[Piece, ...]:
        dims = self.dims(node)
        tokens = dims[_TOKENS] if len(dims) == 4 else unknown(1)
        if (conflict := conflict_of(tokens)) and any(map(self._has_shards, node.all_input_nodes)):
            raise ParallelError(f"parallel: the tokens of {_place(node)} must be followed to their shards: {conflict}.")
        pieces: list[Piece] = []
        for run in tokens:
            axis = _sharded(run)
            if axis is not None:
                pieces.append(Piece(int(axis.size), int(sum(map(product, axis.whole))), sharded=True))
            elif any(part.place == _CLAIM for part in run):
                raise ParallelError(f"parallel: the shards of {_place(node)} must stay whole, and they are cut.")
            else:
                size = int(product(run))
                before = pieces.pop().local if pieces and not pieces[-1].sharded else 0
                pieces.append(Piece(before + size, before + size, sharded=False))
        if not any(piece.sharded for piece in pieces):
            self._refuse_lost(node)
        return tuple(pieces)

    def _refuse_lost(self, node: fx.Node) -> None:
        """Raise if the node was made from shards by something that does not show which of its tokens are."""
        todo, seen = [node], {node}
        while todo:
            current = todo.pop()
            if "all_gather" in str(current.target):  # what was gathered is whole
                continue
            for operand in current.all_input_nodes:
                if not self._has_shards(operand):
                    if operand not in seen:
                        seen.add(operand)
                        todo.append(operand)
                elif not self._keeps_runs(current, operand):
                    shapes = f"{tuple(shape_of(current) or ())} of {tuple(shape_of(operand) or ())}"
                    raise ParallelError(
                        f"parallel: the shards at {_place(node)} must be followed through the graph, and "
                        f"{op_of(current) or current.target} at {_place(current)} makes {shapes}. "
                        "Gather before it, or shard after it."
                    )

    def _keeps_runs(self, node: fx.Node, operand: fx.Node) -> bool:
        """Whether the node takes whole runs out of the operand, those of replicated tokens."""
        if op_of(node) not in _KEEP_RUNS or shape_of(node) is None:
            return shape_of(node) is None  # a size is no tensor
        theirs = {id(axis) for dim in self.dims(operand) for run in dim for axis in run}
        return all(
            id(axis) in theirs or same_size(axis.size, 1) for dim in self.dims(node) for run in dim for axis in run
        )

    def _has_shards(self, node: fx.Node) -> bool:
        return shape_of(node) is not None and any(
            axis.place == _CLAIM for dim in self.dims(node) for run in dim for axis in run
        )


def _sharded(run: Run) -> ShardedAxis | None:
    """The axis of a run that is nothing but shards."""
    axes = [axis for axis in run if not same_size(axis.size, 1) or axis.place == _CLAIM]
    return axes[0] if len(axes) == 1 and isinstance(axes[0], ShardedAxis) else None


def _whole(run: Run) -> Dim:
    axis = _sharded(run)
    return (run,) if axis is None else axis.whole


def _place(node: fx.Node) -> str:
    where = ", ".join(part for part in (module_path(node), source_line(node)) if part)
    return where or f"node {node.name}"


def tokens_text(pieces: tuple[Piece, ...]) -> str:
    """`12 of 24 + 5` for a shard and what every rank holds."""
    return " + ".join(f"{p.local} of {p.whole}" if p.sharded else f"{p.local}" for p in pieces)
