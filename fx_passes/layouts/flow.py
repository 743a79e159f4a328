"""Where the dimensions of a result come from.

Result dimension d has the source (operand, dim) if the result at index i along d depends on that operand at index i
along dim alone. A dimension without sources is made by the operation, or mixes indices. Only operations known by name
are answered, and a size is compared only where that is certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import fx
from torch._ops import OpOverload

from ..normalize.graph import Size, argument, number_of, op_of, same_size
from .moves import MOVES, Flow, Rule, Source, aligned, first_of, operands_of
from .shapes import dims_of, shape_of

CASTS = frozenset(
    {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "alias"}
    | {"empty_like", "zeros_like", "ones_like"}
)
"""They read the values of their first operand, or none at all."""

_POINTWISE = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "pow", "rpow", "square", "sqrt", "rsqrt", "reciprocal", "abs", "sign"}
    | {"exp", "log", "sin", "cos", "erf", "floor", "round", "clamp", "clip", "maximum", "minimum", "where", "lerp"}
    | {"addcmul", "addcdiv", "masked_fill", "nan_to_num", "eq", "ne", "lt", "le", "gt", "ge"}
    | {"logical_and", "logical_or", "logical_xor", "logical_not"}
    | {"sigmoid", "tanh", "relu", "relu6", "silu", "gelu", "mish", "softplus", "elu", "leaky_relu", "hardswish"}
    | {"hardsigmoid", "logsigmoid", "selu", "celu"}
)
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "var", "std", "prod"})


class DenseAttention(NamedTuple):
    """The operands of exact attention."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None


def flow(node: fx.Node) -> Flow | None:
    """The sources of every dimension of the node's result (of each tensor, if it gives several); None if unknown."""
    op, shape = op_of(node), shape_of(node)
    if shape is None or node.kwargs.get("out") is not None:
        return None
    if op in _POINTWISE:
        return aligned(operands_of(node), shape)
    if op in CASTS:
        return aligned(operands_of(node)[:1], shape)
    rule = _RULES.get(op, _attention)
    sources = None if rule is None else rule(node, shape)
    return sources if sources is not None and len(sources) == len(shape) else None


def _leading(node: fx.Node, kept: int) -> Flow | None:
    """The first `kept` dimensions of the first operand go through; the others do not."""
    operand, shape = argument(node, 0, "input"), shape_of(node)
    if not isinstance(operand, fx.Node) or shape is None or not 0 <= kept <= len(shape):
        return None
    return tuple(((operand, dim),) if dim < kept else () for dim in range(len(shape)))


def _linear(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    return _leading(node, len(shape) - 1)


def _norm(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    normalized = argument(node, 1, "normalized_shape")
    return _leading(node, len(shape) - len(normalized)) if isinstance(normalized, list | tuple) else None


def _dropout(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    training = argument(node, 2, "training", argument(node, 2, "train", True))
    idle = number_of(argument(node, 1, "p", 0.5)) == 0 or training is False
    return _leading(node, len(shape)) if idle else None


def _matmul(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    left, right = argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2"))
    sizes = [shape_of(operand) if isinstance(operand, fx.Node) else None for operand in (left, right)]
    if any(size is None or len(size) < 2 for size in sizes):
        return None
    sources: list[list[Source]] = [[] for _ in shape]
    for operand, size in zip((left, right), sizes, strict=True):
        rank = len(size or ())
        for dim in range(-rank, -2):
            if not same_size((size or ())[dim], 1):
                sources[dim].append((operand, dim + rank))
    sources[-2].append((left, len(sizes[0] or ()) - 2))
    sources[-1].append((right, len(sizes[1] or ()) - 1))
    return tuple(map(tuple, sources))


def _addmm(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    bias, left, right = (argument(node, place, name) for place, name in enumerate(("input", "mat1", "mat2")))
    added = aligned([bias], shape) if isinstance(bias, fx.Node) else None
    if added is None or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    return ((left, 0), *added[0]), ((right, 1), *added[1])


def _reduce(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    first, over = first_of(node), argument(node, 1, "dim")
    if first is None or over is None:
        return None
    operand, sizes = first
    gone = dims_of(over, len(sizes))
    if len(shape) == len(sizes):
        return tuple(() if dim in gone else ((operand, dim),) for dim in range(len(sizes)))
    return tuple(((operand, dim),) for dim in range(len(sizes)) if dim not in gone)


def _softmax(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    first, over = first_of(node), argument(node, 1, "dim")
    if first is None or not isinstance(over, int):
        return None
    return tuple(() if dim == over % len(shape) else ((first[0], dim),) for dim in range(len(shape)))


def dense_attention(node: fx.Node) -> DenseAttention | None:
    """The operands of exact attention whose rows do not depend on their place; None if it is another node."""
    if op_of(node) == "scaled_dot_product_attention":
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        q, k, v, mask, *position = (argument(node, place, name) for place, name in enumerate(names))
    elif isinstance(node.target, OpOverload) and node.target.name() == "sparseattn::flash_attention":
        (q, k, v), mask = node.args[:3], None
        position = [node.kwargs.get(name) for name in ("causal", "window")]
    else:
        return None
    return DenseAttention(q, k, v, mask) if all(value in (None, False, 0) for value in position) else None


def _attention(node: fx.Node, shape: Sequence[Size]) -> Flow | None:
    attention = dense_attention(node)
    if attention is None or len(shape) != 4:
        return None
    q, k, v, mask = attention
    heads = [(operand, 1) for operand in (q, k, v)]
    if not all(same_size((shape_of(operand) or (0, 0))[1], shape[1]) for operand, _ in heads):
        heads = []  # grouped: heads and groups of them do not go together one by one
    sources: list[list[Source]] = [[(q, 0), (k, 0), (v, 0)], heads, [(q, 2)], [(v, 3)]]
    sizes = (shape_of(mask) if mask is not None else None) or ()
    for dim in range(-len(sizes), -1):
        if not same_size(sizes[dim], 1) and sources[dim]:
            sources[dim].append((mask, dim + len(sizes)))  # type: ignore[arg-type]  # it has a shape: it is a node
    return tuple(map(tuple, sources))


_RULES: dict[str, Rule] = {
    **MOVES,
    "addmm": _addmm,
    "dropout": _dropout,
    "layer_norm": _norm,
    "linear": _linear,
    "log_softmax": _softmax,
    "matmul": _matmul,
    "mm": _matmul,
    "rms_norm": _norm,
    "softmax": _softmax,
    **dict.fromkeys(_REDUCTIONS, _reduce),
}
