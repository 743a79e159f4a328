"""Sources of the dimensions of a result that is its operands' elements, moved: views, permutations, pieces, joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ..normalize.graph import Size, argument, op_of, same_size, value_of
from .index import Kept, indexed
from .shapes import dims_of, regroup, shape_of, whole

Source = tuple[fx.Node, int]
Flow = tuple[tuple[Source, ...], ...]
Rule = Callable[[fx.Node, Sequence[Size]], Flow | None]


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, as often as they stand there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda operand: found.append(operand))
    return found


def aligned(operands: Sequence[fx.Node], shape: Sequence[Size]) -> Flow | None:
    """Operands that broadcast to a result of this shape; None if one does not for certain."""
    sources: list[list[Source]] = [[] for _ in shape]
    for operand in operands:
        sizes = shape_of(operand)
        if sizes is None:  # a number, a dtype
            continue
        if len(sizes) > len(shape):
            return None
        for dim, size in enumerate(sizes, -len(sizes)):
            if same_size(size, shape[dim]):
                sources[dim].append((operand, dim + len(sizes)))
            elif not same_size(size, 1):
                return None
    return tuple(map(tuple, sources))


def first_of(node: fx.Node) -> tuple[fx.Node, Sequence[Size]] | None:
    """The first operand and its shape."""
    operand = argument(node, 0, "input", node.kwargs.get("x"))
    shape = shape_of(operand) if isinstance(operand, fx.Node) else None
    return None if shape is None else (operand, shape)


def _permute(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    first, rank = first_of(node), len(shape)
    if first is None or (op_of(node) == "getattr" and node.args[1] not in ("mT", "T")[: 1 + (rank == 2)]):
        return None
    order = list(range(rank))
    if op_of(node) == "permute":
        given: Any = node.kwargs.get("dims", node.args[1:])
        order = dims_of(given[0] if len(given) == 1 else given, rank)
    elif rank >= 2:
        swap = (-2, -1)
        if op_of(node) == "transpose":
            swap = (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
        one, two = dims_of(swap, rank)
        order[one], order[two] = two, one
    return tuple(((first[0], dim),) for dim in order)


def _unsqueeze(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    first, place = first_of(node), argument(node, 1, "dim")
    if first is None or not isinstance(place, int):
        return None
    place %= len(shape)
    return tuple(() if dim == place else ((first[0], dim - (dim > place)),) for dim in range(len(shape)))


def _squeeze(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    first, gone = first_of(node), argument(node, 1, "dim")
    if first is None or gone is None:
        return None
    rank = len(first[1])
    left = [dim for dim in range(rank) if dim not in dims_of(gone, rank) or not same_size(first[1][dim], 1)]
    return tuple(((first[0], dim),) for dim in left) if len(left) == len(shape) else None


def _expand(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    first = first_of(node)
    return None if first is None else aligned([first[0]], shape)


def _repeat(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    """Dimensions whose size stays were repeated once."""
    first = first_of(node)
    if first is None or len(first[1]) != len(shape):
        return None
    operand, sizes = first
    return tuple(((operand, d),) if same_size(sizes[d], shape[d]) else () for d in range(len(shape)))


def _reshape(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    first = first_of(node)
    groups = None if first is None else regroup(first[1], shape)
    if first is None or groups is None:
        return None
    sources: list[tuple[Source, ...]] = [() for _ in shape]
    for before, after in groups:
        pair = whole([first[1][dim] for dim in before], before), whole([shape[dim] for dim in after], after)
        if pair[0] is not None and pair[1] is not None:
            sources[pair[1]] = ((first[0], pair[0]),)
    return tuple(sources)


def _cat(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    parts, along = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(parts, list | tuple) or not all(isinstance(p, fx.Node) for p in parts):
        return None
    place, new = along % len(shape), op_of(node) == "stack"
    return tuple(
        () if dim == place else tuple((part, dim - (new and dim > place)) for part in parts)
        for dim in range(len(shape))
    )


def _divide(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    """chunk, split and unbind: what holds for each of the parts."""
    first, gone = first_of(node), op_of(node) == "unbind"
    place = argument(node, 1 if gone else 2, "dim", 0)
    if first is None or not isinstance(place, int):
        return None
    place %= len(first[1])
    if gone:
        return tuple(((first[0], dim + (dim >= place)),) for dim in range(len(shape)))
    return tuple(() if dim == place else ((first[0], dim),) for dim in range(len(shape)))


def _index(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    operand = argument(node, 0, "input")
    if isinstance(value_of(operand), list | tuple):  # one of the parts
        return tuple(((operand, dim),) for dim in range(len(shape)))
    entries = indexed(node)
    if entries is None:
        return None
    return tuple(((operand, e.dim),) if isinstance(e, Kept) and e.is_whole else () for e in entries)


MOVES: dict[str, Rule] = {
    "cat": _cat,
    "chunk": _divide,
    "expand": _expand,
    "expand_as": _expand,
    "flatten": _reshape,
    "getattr": _permute,
    "getitem": _index,
    "mT": _permute,
    "narrow": _index,
    "permute": _permute,
    "repeat": _repeat,
    "repeat_interleave": _repeat,
    "reshape": _reshape,
    "select": _index,
    "slice": _index,
    "split": _divide,
    "split_with_sizes": _divide,
    "squeeze": _squeeze,
    "stack": _cat,
    "t": _permute,
    "transpose": _permute,
    "unbind": _divide,
    "unflatten": _reshape,
    "unsqueeze": _unsqueeze,
}
"""By the name of the operation."""
