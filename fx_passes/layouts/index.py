"""Basic indexing of a tensor, however the graph writes it: x[:, 8:], select, slice, narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..normalize.graph import Size, argument, op_of, same_size, value_of
from .shapes import is_symbolic, shape_of


@dataclass(frozen=True)
class Kept:
    """A dimension of the result that is `start:stop:step` of dimension `dim` of the operand."""

    dim: int
    start: Size
    stop: Size
    step: int
    is_whole: bool


_END = 2**62  # exported graphs write a number beyond it for "to the end"

Entry = Kept | None
"""None is a new dimension of size 1."""


def indexed(node: fx.Node) -> list[Entry] | None:
    """What each dimension of the result is; None if the index is no basic one."""
    operand = argument(node, 0, "input")
    shape = shape_of(operand) if isinstance(operand, fx.Node) else None
    if shape is None:
        return None
    if op_of(node) == "getitem":
        return entries(argument(node, 1, "index"), shape)
    dim = argument(node, 1, "dim", 0) % len(shape)
    index: list[Any] = [slice(None)] * len(shape)
    start = argument(node, 2, "index" if op_of(node) == "select" else "start")
    if op_of(node) == "select":
        index[dim] = start
    elif op_of(node) == "narrow":
        index[dim] = slice(start, start + argument(node, 3, "length"))
    else:
        index[dim] = slice(start, argument(node, 3, "end"), argument(node, 4, "step", 1))
    return entries(tuple(index), shape)


def entries(index: Any, shape: Sequence[Size]) -> list[Entry] | None:
    """What `x[index]` keeps of an x of this shape; None if it is no basic indexing."""
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(item is not None and item is not Ellipsis for item in items)
    places = [place for place, item in enumerate(items) if item is Ellipsis]
    if len(places) > 1 or used > len(shape):
        return None
    place = places[0] if places else len(items)
    items[place : place + 1] = [slice(None)] * (len(shape) - used)
    kept: list[Entry] = []
    dim = 0
    for item in items:
        if item is None:
            kept.append(None)
            continue
        if isinstance(item, slice):
            entry = _kept(item, dim, shape[dim])
            if entry is None:
                return None
            kept.append(entry)
        elif not isinstance(value_of(item), int | torch.SymInt) or isinstance(value_of(item), bool):
            return None
        dim += 1
    return kept


def _kept(item: slice, dim: int, size: Size) -> Kept | None:
    start, stop, step = (value_of(bound) for bound in (item.start, item.stop, item.step))
    step = 1 if step is None else step
    bounds = [_bound(start, size, 0), _bound(stop, size, size)]
    if type(step) is not int or step < 1 or bounds[0] is None or bounds[1] is None:
        return None
    is_whole = step == 1 and same_size(bounds[0], 0) and same_size(bounds[1], size)
    return Kept(dim, bounds[0], bounds[1], step, is_whole)


def _bound(given: object, size: Size, default: Size) -> Size | None:
    """A bound of a slice as an index from the front; None if it is not certain on which side of the end it lies."""
    if given is None:
        return default
    if not isinstance(given, int | torch.SymInt):
        return None
    if same_size(given, size):
        return size
    if is_symbolic(given) or is_symbolic(size):
        if statically_known_true(given < 0):
            return size + given
        return size if isinstance(given, int) and given >= _END else given
    return max(0, size + given) if given < 0 else min(given, size)
