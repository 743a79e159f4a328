"""The part of a graph that can work on tokens in any order, and where tensors enter and leave it.

It begins at sites and grows along `flow`, both ways: every member keeps the tokens along one dimension and depends, at
a token, on that token of its operands alone. What is not proved to do so is outside. An edge that crosses the border
must be converted; a tensor that is written to may not cross.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, fx

from ..normalize.graph import Size, op_of, same_size, value_of, writes, written_by
from .flow import CASTS, dense_attention, flow
from .index import Kept, entries
from .moves import MOVES, Source, operands_of
from .shapes import shape_of

Edges = dict[Source, list[fx.Node]]
"""Users, by the tensor that crosses and the dimension of its tokens."""

TOKENS = 2  # dimension of the tokens in (B, H, S, D)
_ASKS_FOR_SIZES = frozenset({"size", "dim", "numel", "sym_size"})


class Region:
    """A region of a graph; what it found is in its attributes.

    `dims` has every member with the dimension of its tokens, `writers` the nodes that write into members. `entries` and
    `exits` are the edges that cross. `trouble` says why the region cannot be used, "" if it can.

    Args:
        graph: the graph.
        sites: nodes that take and give tokens in any order along dimension 2, but all of them in the same.
        operands: the operands of a site that have tokens.
        size: the number of tokens.
    """

    def __init__(
        self, graph: fx.Graph, sites: Sequence[fx.Node], operands: Callable[[fx.Node], list[fx.Node]], size: Size
    ) -> None:
        self._operands, self._size = operands, size
        self.dims: dict[fx.Node, int] = dict.fromkeys(sites, TOKENS)
        self._sites = set(sites)
        self.writers: list[fx.Node] = []
        self.entries: Edges = {}
        self.exits: Edges = {}
        self.trouble = ""
        self._grow()
        for node in graph.nodes:
            self._connect(node)
        self._check_writes(graph)

    def _grow(self) -> None:
        todo = list(self.dims)
        while todo:
            node = todo.pop()
            for other, dim in [*self._taken(node), *self._onwards(node)]:
                if other not in self.dims and self._works_by_token(other, dim):
                    self.dims[other] = dim
                    todo.append(other)

    def _taken(self, node: fx.Node) -> Sequence[Source]:
        """What a member, or a node that writes into one, takes token by token."""
        if node in self._sites:
            return [(operand, TOKENS) for operand in self._operands(node)]
        if node in self.dims:
            through = flow(node)
            return () if through is None else through[self.dims[node]]
        return self._written(node) if self._is_writer(node) else ()

    def _onwards(self, node: fx.Node) -> Iterator[Source]:
        """Users that keep the tokens of a member, and along which dimension."""
        for user in node.users:
            through = None if user in self.dims else flow(user)
            kept = [dim for dim, sources in enumerate(through or ()) if (node, self.dims[node]) in sources]
            if len(kept) == 1:
                yield user, kept[0]

    def _works_by_token(self, node: fx.Node, dim: int) -> bool:
        through, shape = flow(node), shape_of(node)
        if through is None or shape is None or not same_size(shape[dim], self._size) or writes(node):
            return False
        given, taken = operands_of(node), [operand for operand, _ in through[dim]]
        if not taken:  # it makes the tokens
            return False
        if op_of(node) not in CASTS and any(given.count(operand) != taken.count(operand) for operand in taken):
            return False  # it takes one operand by token, and as a whole
        whole, of = through[dim][0]
        is_part = not isinstance(value_of(whole), Tensor)
        return not is_part or whole in self.dims or self._works_by_token(whole, of)

    def _connect(self, node: fx.Node) -> None:
        """Find the edges to one node that cross."""
        if self._is_writer(node):
            self.writers.append(node)
            if not self._taken(node):
                self.trouble = f"{node} does not write token by token"
        taken = self._taken(node)
        for operand in self._read(node):
            wanted = [dim for of, dim in taken if of is operand]
            own = self.dims.get(operand)
            if own is None and wanted:
                self.entries.setdefault((operand, wanted[0]), []).append(node)
            elif own is not None and not wanted:
                self.exits.setdefault((operand, own), []).append(node)
            if len(set(wanted)) > 1 or (own is not None and wanted and own != wanted[0]):
                self.trouble = f"{node} takes the tokens of {operand} along two dimensions"
            if bool(wanted) != (own is not None) and not isinstance(value_of(operand), Tensor):
                self.trouble = f"{operand} is several tensors"

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """The operands whose values, and their order, matter."""
        operands = list(dict.fromkeys(operands_of(node)))
        if op_of(node) in _ASKS_FOR_SIZES:
            return []
        if op_of(node) in CASTS:
            return operands[:1]
        attention = dense_attention(node)
        if attention is not None and attention.mask is None and node in self.dims:
            keys = {attention.k, attention.v} - {attention.q}
            if all(self.dims.get(operand) == TOKENS for operand in keys):
                return [operand for operand in operands if operand not in keys]  # any order is right, if it is one
        return operands

    def _is_writer(self, node: fx.Node) -> bool:
        return node.op == "call_function" and op_of(node) == "setitem" and node.args[0] in self.dims

    def _written(self, node: fx.Node) -> list[Source]:
        """What `x[index] = value` takes token by token, x included; nothing if it does not write so."""
        target, index, value = node.args[:3]
        if not isinstance(target, fx.Node):
            return []
        kept = entries(index, shape_of(target) or ()) or []
        places = [p for p, e in enumerate(kept) if isinstance(e, Kept) and e.is_whole and e.dim == self.dims[target]]
        if not places:
            return []
        sizes = (shape_of(value) if isinstance(value, fx.Node) else None) or ()
        dim = places[0] - len(kept) + len(sizes)
        by_token = isinstance(value, fx.Node) and dim >= 0 and not same_size(sizes[dim], 1)
        return [(target, self.dims[target]), *([(value, dim)] if by_token else [])]  # type: ignore[list-item]

    def _check_writes(self, graph: fx.Graph) -> None:
        crossing = {node for node, _ in (*self.entries, *self.exits)}
        for node in graph.nodes:
            if not writes(node):
                continue
            written = [alias for target in written_by(node) for alias in _aliases(target)]
            if crossing.intersection(written) or (
                node not in self.writers and not self.dims.keys().isdisjoint(written)
            ):
                self.trouble = f"{node} writes to a tensor that would be converted"


def _aliases(node: fx.Node) -> set[fx.Node]:
    """The node, what it may be a view of, and what may be a view of that."""
    while op_of(node) in MOVES or op_of(node) in CASTS:
        base = node.args[0] if node.args else None
        if not isinstance(base, fx.Node):
            break
        node = base
    found, todo = {node}, [node]
    while todo:
        views = [user for user in todo.pop().users if op_of(user) in MOVES or op_of(user) in CASTS]
        todo += [view for view in views if view not in found]
        found.update(views)
    return found
