"""repeat_kv: look through the repetition of key and value heads, so that grouped heads reach the op.

    before:  k (B, Hkv, S, D) -> k[:, :, None].expand(B, Hkv, n, S, D).reshape(B, Hkv * n, S, D) -> attention
    read as: k (B, Hkv, S, D), each head shared by n query heads

Pure analysis: the graph is not changed. The order is checked by shapes: head h of the result must read head h // n.
"""

from __future__ import annotations

from torch import Tensor, fx

from .graph import argument, is_plain, op_of, same_shape, same_size, value_of

_SAME_VALUES = frozenset(
    {"contiguous", "clone", "to", "type", "type_as", "float", "half", "bfloat16", "alias", "slice"}
)


def peel_repeat_kv(node: fx.Node, heads_q: int) -> tuple[fx.Node, int]:
    """Find the key or value before its heads were repeated, and how often each was.

    Args:
        node: a key or value, (B, Hq, S, D).
        heads_q: Hq.

    Returns:
        (k, n), k: (B, Hq / n, S, D), head h of `node` equal to head h // n of k; (node, 1) if nothing is repeated.
    """
    value = value_of(node)
    if not is_plain(value) or value.dim() != 4 or not same_size(value.shape[1], heads_q):
        return node, 1
    repeated = _unchanged(node)
    source = _interleaved(repeated) or _broadcast(repeated) or _expanded(repeated)
    if source is None:
        return node, 1
    heads = value_of(source).shape[1]
    return (source, heads_q // heads) if isinstance(heads, int) and _groups(source, value, heads_q) else (node, 1)


def _groups(source: fx.Node, value: Tensor, heads_q: int) -> bool:
    """Whether `source` is `value` with fewer heads."""
    shape = value_of(source).shape
    same = same_shape((shape[0], *shape[2:]), (value.shape[0], *value.shape[2:]))
    return same and value_of(source).dtype == value.dtype and heads_q % shape[1] == 0


def _unchanged(node: fx.Node) -> fx.Node:
    """Go back to the node that made the values: past copies and casts that do nothing."""
    while op_of(node) in _SAME_VALUES and node.args and isinstance(node.args[0], fx.Node):
        before, after = value_of(node.args[0]), value_of(node)
        if not is_plain(before) or before.dtype != after.dtype or before.device != after.device:
            break
        if not same_shape(before.shape, after.shape):
            break
        node = node.args[0]
    return node


def _interleaved(node: fx.Node) -> fx.Node | None:
    """Find k in `k.repeat_interleave(n, dim=1)`."""
    if op_of(node) != "repeat_interleave" or argument(node, 2, "dim") not in (1, -3):
        return None
    k, repeats = argument(node, 0, "input"), argument(node, 1, "repeats")
    return k if isinstance(k, fx.Node) and isinstance(repeats, int) and value_of(k).dim() == 4 else None


def _broadcast(node: fx.Node) -> fx.Node | None:
    """Find k in `k.expand(B, H, S, D)` with k: (B, 1, S, D), one head for all."""
    if op_of(node) not in ("expand", "broadcast_to") or not isinstance(node.args[0], fx.Node):
        return None
    before = value_of(node.args[0])
    return node.args[0] if before.dim() == 4 and same_size(before.shape[1], 1) else None


def _expanded(node: fx.Node) -> fx.Node | None:
    """Find k in `k[:, :, None].expand(B, Hkv, n, S, D).reshape(B, Hkv * n, S, D)`; flatten and repeat do too."""
    if op_of(node) not in ("reshape", "flatten") or not isinstance(node.args[0], fx.Node):
        return None
    wide = _unchanged(node.args[0])
    if op_of(wide) not in ("expand", "repeat", "broadcast_to") or not isinstance(wide.args[0], fx.Node):
        return None
    narrow = _unchanged(wide.args[0])
    k = _unsqueezed(narrow)
    if k is None:
        return None
    one, many, merged = value_of(narrow).shape, value_of(wide).shape, value_of(node).shape
    if len(many) != 5 or not same_shape((*one[:2], *one[3:]), (*many[:2], *many[3:])):
        return None
    return k if same_shape(merged, (many[0], many[1] * many[2], many[3], many[4])) else None


def _unsqueezed(node: fx.Node) -> fx.Node | None:
    """Find k in `k[:, :, None]` or `k.unsqueeze(2)`: a new axis between heads and tokens and nothing else."""
    if op_of(node) not in ("getitem", "unsqueeze", "reshape") or not isinstance(node.args[0], fx.Node):
        return None
    k = _unchanged(node.args[0])
    before, after = value_of(k), value_of(node)
    if not is_plain(before) or not is_plain(after) or before.dim() != 4:
        return None
    if op_of(node) == "getitem" and not _only_new_axes(node.args[1]):
        return None
    return k if same_shape(after.shape, (*before.shape[:2], 1, *before.shape[2:])) else None


def _only_new_axes(index: object) -> bool:
    """Whether an index only adds axes: it has no reversal, no gather, nothing that reorders."""
    entries = index if isinstance(index, tuple) else (index,)
    return all(entry is None or entry is Ellipsis or entry == slice(None) for entry in entries)
