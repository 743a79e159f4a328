"""Shapes of nodes, and how the dimensions before and after a reshape belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..normalize.graph import Size, same_size, value_of

Groups = list[tuple[list[int], list[int]]]


def shape_of(node: fx.Node) -> Sequence[Size] | None:
    """The shape of a node's tensor, or of the first of several; None if it has none."""
    value = value_of(node)
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        value = value[0]
    return value.shape if isinstance(value, Tensor) else None


def dims_of(given: Any, rank: int) -> list[int]:
    """Dimensions counted from the front, from one or several."""
    return [dim % rank for dim in (given if isinstance(given, list | tuple) else [given])]


def hint(size: Size) -> int:
    """The number a size was traced with."""
    return size if isinstance(size, int) else int(size.node.hint)


def is_symbolic(size: Size) -> bool:
    """Whether a size is not fixed."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def regroup(before: Sequence[Size], after: Sequence[Size]) -> Groups | None:
    """The smallest runs of dimensions, before and after a reshape, that hold the same elements; None if uncertain."""
    groups: Groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = Run(before, i), Run(after, j)
        while not same_size(left.size, right.size):
            shorter = left if hint(left.size) < hint(right.size) else right
            if hint(left.size) == hint(right.size) or not shorter.grow():
                return None
        groups.append((left.dims, right.dims))
        i, j = left.stop, right.stop
    return groups


class Run:
    """Consecutive dimensions of a shape and how many elements they have; empty at the shape's end."""

    def __init__(self, shape: Sequence[Size], start: int) -> None:
        self.shape, self.start, self.stop = shape, start, start
        self.size: Size = 1
        self.grow()

    def grow(self) -> bool:
        """Take the next dimension, if there is one."""
        if self.stop == len(self.shape):
            return False
        self.size = self.size * self.shape[self.stop]
        self.stop += 1
        return True

    @property
    def dims(self) -> list[int]:
        """The dimensions taken."""
        return list(range(self.start, self.stop))


def whole(sizes: Sequence[Size], dims: Sequence[int]) -> int | None:
    """The one of some dimensions that has all the elements, the others being of size 1; None if there is none."""
    large = [dim for dim, size in zip(dims, sizes, strict=True) if not same_size(size, 1)]
    if len(large) == 1:
        return large[0]
    return dims[0] if len(dims) == 1 else None
