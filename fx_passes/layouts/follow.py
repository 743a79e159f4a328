"""What the dimensions of one node are, given those of its operands: `flow`, and the operations that name, join or cut.

Before: x (B, C, T, H, W) -> conv3d -> flatten(2) -> transpose(1, 2) -> cat with text. After: its dimension 1 is known
to be the run T x H x W, then the run of text.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..normalize.graph import Size, argument, is_plain, op_of, same_size, value_of
from .axis import HEIGHT, TIME, WIDTH, Axis, Dim, cut, divide, merge, unify, unknown
from .flow import flow
from .index import Kept, indexed
from .shapes import regroup, shape_of

Dims = tuple[Dim, ...]
Known = Mapping[fx.Node, Dims]

INPUT = "placeholder"
_VIDEO_RANK = 5
_CONVOLUTIONS = frozenset({"conv2d", "conv3d", "convolution"})
_SAME = frozenset(
    {"group_norm", "native_group_norm", "batch_norm", "instance_norm", "softmax", "log_softmax", "cumsum"}
)
_RESHAPES = frozenset({"reshape", "flatten", "unflatten"})
_PARTS = frozenset({"split", "split_with_sizes", "chunk"})


def follow(node: fx.Node, shape: Sequence[Size], known: Known) -> Dims:
    """The dimensions of a node; `known` holds those of its operands."""
    fresh = tuple(map(unknown, shape))
    if node.op == INPUT:
        return _input(node, shape) or fresh
    op = op_of(node)
    if op in _CONVOLUTIONS or op == "meshgrid":
        return _named(node, shape, known) or fresh
    if op in _RESHAPES:
        return _reshaped(node, shape, known) or fresh
    if op in _SAME or _is_attention(node):
        return _like_first(node, shape, known) or fresh
    through = flow(node)
    if through is None:
        return fresh
    dims = [unify([known[of][dim] for of, dim in from_]) if from_ else fresh[d] for d, from_ in enumerate(through)]
    for dim, replaced in _joined_or_cut(node, op, shape, known):
        dims[dim] = replaced
    return tuple(dims)


def _input(node: fx.Node, shape: Sequence[Size]) -> Dims | None:
    """A video given as (B, C, T, H, W) or (B, T, C, H, W): which of the two is time shows in what becomes a token."""
    value = value_of(node)
    is_video = is_plain(value) and not isinstance(value, torch.nn.Parameter) and value.is_floating_point()
    if len(shape) != _VIDEO_RANK or not is_video:
        return None
    return (unknown(shape[0]), *(((Axis(size, dim),),) for dim, size in enumerate(shape[1:], 1)))


def _named(node: fx.Node, shape: Sequence[Size], known: Known) -> Dims | None:
    """Dimensions that an operation names: the space, and time, of a convolution's result or of a mesh of positions."""
    names = (TIME, HEIGHT, WIDTH)
    if op_of(node) == "meshgrid":
        claimed = names[-len(shape) :] if len(shape) in (2, 3) else ()
        return tuple(((Axis(size, place),),) for size, place in zip(shape, claimed, strict=True)) if claimed else None
    operand = argument(node, 0, "input")
    if len(shape) not in (4, 5) or operand not in known or not _keeps_batch(operand, shape):
        return None
    space = zip(shape[2:], names[2 - len(shape) :], strict=True)
    return (known[operand][0], unknown(shape[1]), *(((Axis(size, place),),) for size, place in space))


def _keeps_batch(operand: fx.Node, shape: Sequence[Size]) -> bool:
    before = shape_of(operand)
    return before is not None and len(before) == len(shape) and same_size(before[0], shape[0])


def _reshaped(node: fx.Node, shape: Sequence[Size], known: Known) -> Dims | None:
    operand = argument(node, 0, "input")
    before = shape_of(operand)
    groups = None if before is None else regroup(before, shape)
    if groups is None:
        return None
    dims: list[Dim] = []
    for inside, outside in groups:
        sizes = [shape[dim] for dim in outside]
        if len(inside) == len(outside) == 1:
            dims.append(known[operand][inside[0]])
            continue
        run = merge([known[operand][dim] for dim in inside])
        shared = None if run is None else divide(run, sizes)
        dims += map(unknown, sizes) if shared is None else shared
    return tuple(dims)


def _is_attention(node: fx.Node) -> bool:
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "sparseattn"
    return ours or op_of(node) == "scaled_dot_product_attention"


def _like_first(node: fx.Node, shape: Sequence[Size], known: Known) -> Dims | None:
    """The first operand's dimensions, where the sizes are the same; for attention these are those of the query."""
    operand = argument(node, 0, "input", node.kwargs.get("query"))
    before = shape_of(operand) if operand in known else None
    if before is None or len(before) != len(shape):
        return None
    pairs = zip(known[operand], before, shape, strict=True)
    return tuple(dim if same_size(was, size) else unknown(size) for dim, was, size in pairs)


def _joined_or_cut(node: fx.Node, op: str, shape: Sequence[Size], known: Known) -> list[tuple[int, Dim]]:
    """Dimensions made by `cat`, a slice or a part of a split, as runs of those of the operands."""
    operand: Any = argument(node, 0, "tensors" if op == "cat" else "input")
    if op == "cat":
        place = argument(node, 1, "dim", 0) % len(shape)
        return [(place, tuple(run for part in operand for run in known[part][place]))]
    if node.target is operator.getitem and isinstance(value_of(operand), list | tuple):
        return _part(node, operand, shape, known)
    entries = indexed(node) if op in ("getitem", "slice", "narrow") else None
    found = []
    for dim, entry in enumerate(entries or ()):
        if isinstance(entry, Kept) and not entry.is_whole and (kept := cut(known[operand][entry.dim], entry)):
            found.append((dim, kept))
    return found


def _part(node: fx.Node, parts: fx.Node, shape: Sequence[Size], known: Known) -> list[tuple[int, Dim]]:
    if op_of(parts) not in _PARTS or not isinstance(node.args[1], int):
        return []
    whole, place = argument(parts, 0, "input"), argument(parts, 2, "dim", 0) % len(shape)
    sizes = [part.shape[place] for part in value_of(parts)]
    number = node.args[1] % len(sizes)
    start: Size = sum(sizes[:number])
    kept = cut(known[whole][place], Kept(place, start, start + sizes[number], 1, is_whole=False))
    return [] if kept is None else [(place, kept)]
