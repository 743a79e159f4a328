"""The memory layout a product had, where somebody may see it: SDPA gives its result in another one.

Keeping it costs a copy, so it is kept only in front of a view, a question about strides, or the end of the graph.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, fx
from torch._prims_common import make_contiguous_strides_for

from .graph import op_of, same_shape, value_of

Copy = Literal["none", "before", "after"]

_LAYOUT_IS_FRESH = frozenset({"addmm", "contiguous", "linear", "matmul", "mm"})
_LAYOUT_IS_SEEN = frozenset(
    {"view", "view_as", "as_strided", "unflatten", "stride", "is_contiguous", "view_as_complex"}
)
_VIEWING_TARGETS = (torch.ops.aten.view.default, torch.ops.aten.as_strided.default, torch.ops.aten.unflatten.int)


def copy_to_keep_layout(node: fx.Node, order: tuple[int, ...] | None) -> Copy | None:
    """Where SDPA's result must be copied to lie as `node` does: nowhere, before or after it is permuted by `order`.

    None if `node` has a layout that neither gives, and it is seen.
    """
    value: Tensor = value_of(node)
    if not _is_seen(node):
        return "none"
    if _is_contiguous(value):
        return "after"
    return "before" if order is not None and _is_contiguous(value.permute(inverse(order))) else None


def inverse(order: tuple[int, ...]) -> list[int]:
    """Permutation that undoes `order`."""
    return [order.index(axis) for axis in range(len(order))]


def _is_contiguous(value: Tensor) -> bool:
    return same_shape(value.stride(), make_contiguous_strides_for(value.shape))


def _is_seen(node: fx.Node) -> bool:
    """Whether the strides of a value reach something that depends on them; any operation may pass them on."""
    seen: set[fx.Node] = set()
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if user in seen or op_of(user) in _LAYOUT_IS_FRESH:
            continue
        if user.op == "output" or user.target in _VIEWING_TARGETS or _name(user) in _LAYOUT_IS_SEEN:
            return True
        seen.add(user)
        todo += user.users
    return False


def _name(user: fx.Node) -> str:
    return user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
