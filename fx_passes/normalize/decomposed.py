"""decomposed: what `run_decompositions` made of attention becomes one SDPA node again.

    before:  s = bmm(q * c, k.transpose(-2, -1) * c) + mask;  out = bmm(safe_softmax(s), v)     (products through views)
    after:   out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=c * c)

`safe_softmax` is softmax with rows of -inf alone set to 0, which is SDPA's own rule. Up to rounding the same function:
scores are scaled once instead of twice, and half dtypes that the decomposition computed in fp32 are computed as SDPA
does. A product that anybody else reads is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .contraction import transposed_of
from .graph import (
    Size,
    argument,
    insert,
    is_cast,
    is_plain,
    nodes_between,
    number_of,
    op_of,
    same_shape,
    same_size,
    value_of,
    written_meanwhile,
)
from .layout import copy_to_keep_layout
from .record import Normalized

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_SAME = frozenset({"clone", "contiguous", "expand"})


def join_decomposed(module: fx.GraphModule) -> list[Normalized]:
    """Put an SDPA node beside every decomposed attention of one graph and give it the users; see `fuse_unfused`."""
    matches = [_match(node) for node in list(module.graph.nodes) if op_of(node) == "reshape" and node.users]
    return [_join(match) for match in matches if match is not None]


@dataclass(frozen=True)
class _Match:
    """Attention as it was read, all operands (B, H, S, D); `node` is what its users read."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node, fx.Node]
    mask: fx.Node | None
    scale: float | None
    matched: tuple[fx.Node, ...]


def _match(node: fx.Node) -> _Match | None:
    walk = _Walk(node)
    product = walk.product(node)
    weights = None if product is None else walk.softmax(product[0])
    if product is None or weights is None:
        return None
    logits, mask = walk.sum(weights)
    scores = walk.product(logits)
    if scores is None:
        return None
    q, left = walk.scaled(scores[0])
    k, right = walk.transposed(scores[1])
    if k is None or not left * right > 0 or not _shapes_fit(q, k, product[1], node):
        return None
    out, operands = _in_half(node, (q, k, product[1]), walk)
    matched = walk.in_order()
    if not walk.is_closed(out) or written_meanwhile(out, matched) or copy_to_keep_layout(out, None) is None:
        return None
    return _Match(out, operands, mask, _scale(left * right, value_of(q).shape[-1]), matched)


def _scale(product: float, dim: int | torch.SymInt) -> float | None:
    """The scale as SDPA has it: None for D ** -0.5, which was written as two roots of it."""
    return None if isinstance(dim, int) and math.isclose(product, dim**-0.5, rel_tol=1e-12) else product


class _Walk:
    """A walk from the result to the operands; remembers what it passed."""

    def __init__(self, node: fx.Node) -> None:
        self._node = node
        self._passed: dict[fx.Node, None] = {node: None}

    def product(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Read `view(bmm(view(a), view(b)))`, (B, H, m, n), as (a, b)."""
        value = value_of(node)
        if op_of(node) != "reshape" or not is_plain(value) or value.dim() != 4:
            return None
        bmm = argument(node, 0, "self")
        if op_of(bmm) != "matmul" or not _merges(value_of(bmm), value.shape):
            return None
        (*_, m, n), d = value.shape, value_of(bmm.args[0]).shape[-1]
        left = self._split(bmm.args[0], (*value.shape[:2], m, d))
        right = self._split(bmm.args[1], (*value.shape[:2], d, n))
        if left is None or right is None:
            return None
        self.passes(node, bmm)
        return left, right

    def _split(self, node: fx.Node, shape: Sequence[Size]) -> fx.Node | None:
        """Read `view(clone(expand(x)))`, which merges batch and heads of x with these sizes, as x."""
        if op_of(node) != "reshape" or not _merges(value_of(node), shape) or not isinstance(node.args[0], fx.Node):
            return None
        passed, inner = [node], node.args[0]
        while op_of(inner) in _SAME and isinstance(inner.args[0], fx.Node):
            if not same_shape(value_of(inner.args[0]).shape, shape) or not _same_dtype(inner, inner.args[0]):
                break
            passed, inner = [*passed, inner], inner.args[0]
        if not is_plain(value_of(inner)) or not same_shape(value_of(inner).shape, shape):
            return None
        self.passes(*passed)
        return inner

    def softmax(self, node: fx.Node) -> fx.Node | None:
        """Read a softmax over the last axis, or the form of it in which a row without keys gives 0, as its argument."""
        if op_of(node) == "where":
            inner = argument(node, 2, "other")
            safe = self._empty_rows(node, inner)
            self.passes(node)
            return self.softmax(inner) if safe else None
        value = value_of(node)
        scores: fx.Node | None = _inner(node, "softmax")
        last = is_plain(value) and argument(node, 1, "dim") in (-1, value.dim() - 1)
        if scores is None or not last or not _same_dtype(node, scores):
            return None
        self.passes(node)
        return scores

    def _empty_rows(self, where: fx.Node, softmax: object) -> bool:
        """Whether it is `where(~any(~(s == -inf), -1), 0, softmax(s))`."""
        condition, zero = argument(where, 0, "condition"), argument(where, 1, "self")
        some = _inner(condition, "logical_not")
        seen = _inner(some, "any")
        hidden = _inner(seen, "logical_not")
        scores = _inner(hidden, "eq")
        if scores is None or scores is not _inner(softmax, "softmax") or not _is_zero(zero):
            return False
        self.passes(condition, zero, some, seen, hidden)
        by_row = argument(some, 1, "dim") in (-1, 3) and argument(some, 2, "keepdim") is True
        return by_row and bool(argument(hidden, 1, "other") == -math.inf)

    def sum(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """The scores, and the mask that is added to them."""
        if op_of(node) != "add" or node.kwargs.get("alpha", 1) != 1:
            return node, None
        scores, mask = node.args[:2]
        if not isinstance(scores, fx.Node) or not isinstance(mask, fx.Node) or not _same_dtype(node, mask):
            return node, None
        if not 2 <= value_of(mask).dim() <= 4 or not same_shape(value_of(scores).shape, value_of(node).shape):
            return node, None
        self.passes(node)
        return scores, mask

    def scaled(self, node: fx.Node) -> tuple[fx.Node, float]:
        """Read `x * c` as (x, c)."""
        number = number_of(argument(node, 1, "other")) if op_of(node) == "mul" else None
        if number is None or not isinstance(node.args[0], fx.Node) or not _same_dtype(node, node.args[0]):
            return node, 1.0
        self.passes(node)
        return node.args[0], float(number)

    def transposed(self, node: fx.Node) -> tuple[fx.Node | None, float]:
        """Read `k.transpose(-2, -1) * c`, in either order, as (k, c)."""
        node, outer = self.scaled(node)
        k = transposed_of(node)
        if k is None:
            return None, 1.0
        self.passes(node)
        k, inner = self.scaled(k)
        return k, outer * inner

    def passes(self, *nodes: object) -> None:
        """Remember these."""
        self._passed |= {node: None for node in nodes if isinstance(node, fx.Node)}

    def is_closed(self, out: fx.Node) -> bool:
        """Whether nobody else reads what was passed; casts of operands and factories may have other readers."""
        inner = [node for node in self._passed if node is not out and not is_cast(node) and node.all_input_nodes]
        return all(user in self._passed for node in inner for user in node.users)

    def in_order(self) -> tuple[fx.Node, ...]:
        """What was passed, as it stands in the graph."""
        return tuple(node for node in self._node.graph.nodes if node in self._passed)


def _inner(node: object, op: str) -> Any:
    """The first argument of a node that is this operation, else None."""
    return node.args[0] if isinstance(node, fx.Node) and op_of(node) == op and node.args else None


def _is_zero(node: object) -> bool:
    if isinstance(node, fx.Node) and op_of(node) == "full_like":
        return bool(argument(node, 1, "fill_value") == 0)
    return op_of(node) == "zeros_like" or number_of(node) == 0


def _merges(value: object, shape: Sequence[Size]) -> bool:
    """Whether it is (B * H, m, n) for the shape (B, H, m, n)."""
    return is_plain(value) and value.dim() == 3 and same_shape(value.shape[1:], shape[2:])


def _same_dtype(left: fx.Node, right: fx.Node) -> bool:
    return bool(value_of(left).dtype == value_of(right).dtype)


def _shapes_fit(q: fx.Node, k: fx.Node, v: fx.Node, out: fx.Node) -> bool:
    """Whether they are (B, H, Sq, D), (B, H, Sk, D), (B, H, Sk, Dv) of one dtype, and `out` is of it too."""
    shapes = [value_of(operand).shape for operand in (q, k, v)]
    leading = all(same_shape(shape[:2], shapes[0][:2]) for shape in shapes)
    inner = same_size(shapes[0][3], shapes[1][3]) and same_size(shapes[1][2], shapes[2][2])
    return leading and inner and all(_same_dtype(out, operand) for operand in (q, k, v))


def _in_half(
    node: fx.Node, operands: tuple[fx.Node, fx.Node, fx.Node], walk: _Walk
) -> tuple[fx.Node, tuple[fx.Node, fx.Node, fx.Node]]:
    """The result and operands in the half dtype they were computed from in fp32, or as they are."""
    users = list(node.users)
    if len(users) != 1 or not is_cast(users[0]) or not all(map(is_cast, operands)):
        return node, operands
    q, k, v = (operand.args[0] for operand in operands)
    if not all(isinstance(x, fx.Node) and _same_dtype(x, users[0]) for x in (q, k, v)) or _same_dtype(node, users[0]):
        return node, operands
    walk.passes(*operands, users[0])
    return users[0], (q, k, v)  # type: ignore[return-value]


def _join(match: _Match) -> Normalized:
    node, before = match.node, match.node.prev
    mask = match.mask
    if mask is not None and not _same_dtype(mask, node):
        mask = insert(node, "to", mask, value_of(node).dtype)
    options: dict[str, Any] = {"attn_mask": mask, "scale": match.scale}
    with node.graph.inserting_before(node):
        site = node.graph.call_function(_SDPA, match.operands, options)
    site.meta = {name: entry for name, entry in node.meta.items() if name != "tensor_meta"}
    out = insert(node, "contiguous", site) if copy_to_keep_layout(node, None) == "after" else site
    node.replace_all_uses_with(out)
    return Normalized(site, ((node, out),), nodes_between(before, node), match.matched)
