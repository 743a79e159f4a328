"""Read what stands between the two products of attention: casts, dropout, softmax, masks, biases and scales.

    p = dropout(softmax(scale * factors * (q @ k.T) + biases, where not hidden))

Only nodes with one user are walked, so nobody else sees a weight that would no longer be computed. A node that is not
one of these (a softcap, a multiplied mask) ends the walk: the site is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from .contraction import Scores, read_scores
from .graph import argument, is_cast, is_plain, number_of, op_of, same_shape, value_of


@dataclass(frozen=True)
class Factor:
    """A factor on the scores that is no number: a symbol, or a tensor that is constant along each row."""

    node: fx.Node
    op: Literal["mul", "div"]


@dataclass(frozen=True)
class Hidden:
    """A bool mask; its entries equal to `when` are filled with `fill` (after the scale)."""

    mask: fx.Node
    when: bool
    fill: float


@dataclass(frozen=True)
class Weights:
    """The weights of attention as the graph writes them; tuples are in the order from softmax to product."""

    matched: tuple[fx.Node, ...] = ()
    dropout: float = 0.0
    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    biases: tuple[fx.Node, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    scores: Scores | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether something was scaled between here and softmax."""
        return self.scale != 1.0 or bool(self.factors)


def read_weights(node: fx.Node) -> Weights | None:
    """Read from the probabilities, as the second product uses them, down to the first product; None if it cannot."""
    inner: object = node
    weights = Weights()
    while isinstance(inner, fx.Node) and len(inner.users) == 1:
        weights = replace(weights, matched=(*weights.matched, inner))
        if op_of(inner) == "softmax":
            return _read_logits(inner, weights)
        if op_of(inner) == "dropout":
            dropout = _dropout(inner)
            if dropout is None or weights.dropout:
                return None
            weights = replace(weights, dropout=dropout)
        elif not is_cast(inner):
            return None
        inner = argument(inner, 0, "input")
    return None


def _dropout(node: fx.Node) -> float | None:
    """Read the probability in effect: 0 outside training; None if the graph computes it."""
    training = argument(node, 2, "training", node.kwargs.get("train", True))
    probability = number_of(argument(node, 1, "p", 0.5))
    if probability is None or not isinstance(training, bool):
        return None
    return float(probability) if training else 0.0


def _read_logits(softmax: fx.Node, weights: Weights) -> Weights | None:
    value, logits = value_of(softmax), argument(softmax, 0, "input")
    if not isinstance(logits, fx.Node) or not is_plain(value) or not value.is_floating_point():
        return None
    last = argument(softmax, 1, "dim") in (-1, value.dim() - 1)
    return _descend(logits, weights) if last else None


def _descend(node: fx.Node, weights: Weights) -> Weights | None:
    """Follow the scores down to the first product."""
    if len(node.users) != 1 or not is_plain(value_of(node)):
        return None
    weights = replace(weights, matched=(*weights.matched, node))
    scores = read_scores(node)
    if scores is not None:
        return _with_scores(scores, weights)
    read = _READERS.get(op_of(node), _read_cast)
    for inner, seen in read(node, weights):
        if isinstance(inner, fx.Node) and is_plain(value_of(inner)):
            same = same_shape(value_of(inner).shape, value_of(node).shape)
            found = _descend(inner, seen) if same else None
            if found is not None:
                return found
    return None


def _with_scores(scores: Scores, weights: Weights) -> Weights | None:
    if scores.bias is not None:
        if weights.is_scaled:
            return None
        weights = replace(weights, biases=(*weights.biases, scores.bias))
    return replace(weights, scores=scores, scale=weights.scale * scores.scale)


Steps = Iterator[tuple[object, Weights]]


def _read_cast(node: fx.Node, weights: Weights) -> Steps:
    if is_cast(node):
        yield node.args[0], weights


def _read_product(node: fx.Node, weights: Weights) -> Steps:
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    for inner, by in ((left, right), (right, left)):
        number = number_of(by)
        if number is not None:
            yield inner, replace(weights, scale=weights.scale * number)
        elif isinstance(by, fx.Node) and _is_row_factor(by):
            yield inner, replace(weights, factors=(*weights.factors, Factor(by, "mul")))


def _read_quotient(node: fx.Node, weights: Weights) -> Steps:
    inner, by = argument(node, 0, "input"), argument(node, 1, "other")
    number = number_of(by)
    if node.kwargs.get("rounding_mode") is not None or number == 0:
        return
    if number is not None:
        yield inner, replace(weights, scale=weights.scale / number)
    elif isinstance(by, fx.Node) and _is_row_factor(by):
        yield inner, replace(weights, factors=(*weights.factors, Factor(by, "div")))


def _is_row_factor(node: fx.Node) -> bool:
    """Whether scaling the scores by it is scaling q by it: it does not change along a row."""
    value = value_of(node)
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return True
    return isinstance(value, Tensor) and value.is_floating_point() and all(size == 1 for size in _tail(value))


def _tail(value: Tensor) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else 0 for size in value.shape[-2:])


def _read_sum(node: fx.Node, weights: Weights) -> Steps:
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    if weights.is_scaled or node.kwargs.get("alpha", 1) != 1:
        return
    for inner, bias in ((left, right), (right, left)):
        if isinstance(bias, fx.Node) and isinstance(value_of(bias), Tensor):
            yield inner, replace(weights, biases=(*weights.biases, bias))


def _read_fill(node: fx.Node, weights: Weights) -> Steps:
    mask = argument(node, 1, "mask")
    yield from _hide(argument(node, 0, "input"), mask, True, argument(node, 2, "value"), weights)


def _read_where(node: fx.Node, weights: Weights) -> Steps:
    mask = argument(node, 0, "condition")
    yes, no = argument(node, 1, "input", node.kwargs.get("self")), argument(node, 2, "other")
    if node.op == "call_method":  # x.where(condition, other)
        mask, yes = yes, mask
    yield from _hide(yes, mask, False, no, weights)
    yield from _hide(no, mask, True, yes, weights)


def _hide(inner: object, mask: object, when: bool, fill: object, weights: Weights) -> Steps:
    number = number_of(fill)
    value = value_of(mask)
    if number is None or weights.factors or not isinstance(mask, fx.Node) or not isinstance(value, Tensor):
        return
    if value.dtype == torch.bool:
        yield inner, replace(weights, hidden=(*weights.hidden, Hidden(mask, when, number * weights.scale)))


_READERS: dict[str, Callable[[fx.Node, Weights], Steps]] = {
    "add": _read_sum,
    "div": _read_quotient,
    "masked_fill": _read_fill,
    "mul": _read_product,
    "where": _read_where,
}
