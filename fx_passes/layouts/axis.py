"""What a dimension enumerates: runs (one after the other, as after `cat`), each the product of axes, slowest first.

An axis may claim to be one of time, height and width: where it came from says so. Where two claims differ, the result
is an axis that claims nothing and says why.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..normalize.graph import Size, same_size
from .index import Kept
from .shapes import hint

TIME, HEIGHT, WIDTH = 2, 3, 4
"""Places of the axes of a video, as in (B, C, T, H, W); of (B, T, C, H, W) the time is at 1."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis.

    Args:
        size: how many.
        place: which axis of a video it claims to be, 1 to 4; None claims nothing.
        conflict: the two claims that differ, if it is all that is left of them.
    """

    size: Size
    place: int | None = None
    conflict: str = ""


Run = tuple[Axis, ...]
Dim = tuple[Run, ...]


def unknown(size: Size) -> Dim:
    """A dimension of which nothing is known but its size."""
    return ((Axis(size),),)


def product(axes: Sequence[Axis]) -> Size:
    """The number of elements."""
    total: Size = 1
    for axis in axes:
        total = total * axis.size
    return total


def merge(dims: Sequence[Dim]) -> Run | None:
    """Axes of several dimensions taken as one; None if one of them is several runs."""
    if any(len(dim) != 1 for dim in dims):
        return None
    return tuple(itertools.chain.from_iterable(dim[0] for dim in dims))


def divide(axes: Run, sizes: Sequence[Size]) -> list[Dim] | None:
    """Share axes out over dimensions of these sizes; None if they cannot be.

    An axis that is cut keeps its claim in its slower part: H as (H / p, p) are patches and their inside.
    """
    rest = list(axes)
    dims: list[Run] = []
    for size in reversed(sizes):
        taken: list[Axis] = []
        need: Any = size  # an int or a SymInt: both know % and //
        while not same_size(need, 1):
            if not rest:
                return None
            axis = rest.pop()
            if same_size(need % axis.size, 0):
                taken.append(axis)
                need = need // axis.size
            elif same_size(axis.size % need, 0):
                rest.append(Axis(axis.size // need, axis.place, axis.conflict))
                taken.append(Axis(need))
                need = 1
            else:
                return None
        dims.append(tuple(reversed(taken)))
    if any(not same_size(axis.size, 1) for axis in rest):
        return None
    if dims:
        dims[-1] = (*rest, *dims[-1])
    return [(run or (Axis(1),),) for run in reversed(dims)]


def cut(dim: Dim, kept: Kept) -> Dim | None:
    """The runs that a slice keeps; None if it does not keep whole runs."""
    if kept.step != 1:
        return None
    position: Size = 0
    begin = end = None
    for place, size in enumerate([*map(product, dim), None]):
        if begin is None and same_size(position, kept.start):
            begin = place
        if same_size(position, kept.stop):
            end = place
        position = position if size is None else position + size
    return None if begin is None or end is None or begin >= end else dim[begin:end]


def unify(dims: Sequence[Dim]) -> Dim:
    """What a dimension is that comes from several at once: the most that any claims, if none contradicts it."""
    best = max(dims, key=_knowledge)
    for other in dims:
        if other is not best and _claims(other) and not _coarser(other, best):
            return _conflict(best, other)
    return best


def grid_of(run: Run) -> tuple[Size, Size, Size] | None:
    """Sizes (T, H, W) of a run that is the raster of a video, or (1, H, W) of an image; else None."""
    places = [axis.place for axis in run]
    if places[-2:] != [HEIGHT, WIDTH] or len(run) > 3 or (len(run) == 3 and places[0] not in (TIME - 1, TIME)):
        return None
    time = run[0].size if len(run) == 3 else 1
    return time, run[-2].size, run[-1].size


def conflict_of(dim: Dim) -> str:
    """Why a dimension claims nothing, if two claims differ."""
    return next((axis.conflict for run in dim for axis in run if axis.conflict), "")


def _claims(dim: Dim) -> bool:
    return any(axis.place is not None for run in dim for axis in run)


def _knowledge(dim: Dim) -> tuple[bool, int, int, int]:
    claimed = sum(axis.place is not None for run in dim for axis in run)
    return bool(conflict_of(dim)), claimed, len(dim), sum(map(len, dim))


def _coarser(dim: Dim, finer: Dim) -> bool:
    """Whether every border between the runs and axes of `dim` is one of `finer` too."""
    if len(dim) > len(finer) or (len(dim) != len(finer) and len(dim) != 1):
        return False
    if len(dim) != len(finer):  # one run that says nothing of the text beside it
        return len(dim[0]) == 1
    return all(
        any(same_size(border, known) for known in _borders(fine))
        for run, fine in zip(dim, finer, strict=True)
        for border in _borders(run)
    )


def _borders(run: Run) -> list[Size]:
    return [product(run[place:]) for place in range(len(run))]


def _conflict(one: Dim, two: Dim) -> Dim:
    total: Size = sum(map(product, one))
    return ((Axis(total, conflict=f"its tokens are {_text(one)} and {_text(two)} at once"),),)


def _text(dim: Dim) -> str:
    return "+".join("x".join(str(hint(axis.size)) for axis in run) for run in dim)
