"""Read matmul, bmm, baddbmm and einsum as the two products of attention, whatever order their axes have.

    scores = q @ k.T     canonical q (..., i, d), k (..., j, d)
    output = p @ v       canonical p (..., i, j), v (..., j, d)

`...` is one or two leading axes, the same in every operand; an operand in another order carries the permutation to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from .graph import Size, argument, insert, is_plain, number_of, op_of, value_of

Order = tuple[int, ...] | None
_LEADING = "0123"  # stand for the axes of "...", which no equation can name


@dataclass(frozen=True)
class Operand:
    """A node and the permutation that brings it to canonical order; None if it is in that order."""

    node: fx.Node
    order: Order = None

    @property
    def shape(self) -> tuple[Size, ...]:
        """Shape in canonical order."""
        shape = value_of(self.node).shape
        return tuple(shape) if self.order is None else tuple(shape[axis] for axis in self.order)

    def place(self, anchor: fx.Node) -> fx.Node:
        """Put the operand in canonical order, before `anchor`."""
        return self.node if self.order is None else insert(anchor, "permute", self.node, self.order)


@dataclass(frozen=True)
class Scores:
    """`scale * q @ k.T + bias`."""

    q: Operand
    k: Operand
    scale: float = 1.0
    bias: fx.Node | None = None


@dataclass(frozen=True)
class Output:
    """`p @ v`, its canonical result permuted by `order`; `between` are nodes between p and the product."""

    p: fx.Node
    v: Operand
    order: Order = None
    between: tuple[fx.Node, ...] = ()


def read_scores(node: fx.Node) -> Scores | None:
    """Read a node as the product that makes the scores; None if it is no such product."""
    op = op_of(node)
    if op == "einsum":
        return _scores_of_einsum(node)
    if op == "baddbmm":
        return _scores_of_baddbmm(node)
    operands = _operands(node) if op == "matmul" else None
    return None if operands is None else Scores(Operand(operands[0]), _swapped(operands[1]))


def read_outputs(node: fx.Node) -> Iterator[Output]:
    """Yield every way to read a node as probabilities times values."""
    if op_of(node) == "einsum":
        yield from _outputs_of_einsum(node)
    operands = _operands(node) if op_of(node) == "matmul" else None
    if operands is not None:
        left, right = operands
        yield Output(left, Operand(right))
        transposed = transposed_of(right)
        if transposed is not None:  # (p @ v).T written as v.T @ p.T
            yield Output(transposed, _swapped(left), _swap(node), between=(right,))


def transposed_of(node: object) -> fx.Node | None:
    """x, if the node is x with its last two axes swapped."""
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if not is_plain(value_of(node)):
        return None
    op, rank = op_of(node), len(value_of(node).shape)
    if op == "transpose":
        axes = [argument(node, 1, "dim0"), argument(node, 2, "dim1")]
        swapped = {axis % rank for axis in axes if isinstance(axis, int)} == {rank - 2, rank - 1}
    elif op == "permute":
        order = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], Sequence) else node.args[1:]
        swapped = tuple(axis % rank for axis in order if isinstance(axis, int)) == _swap(node)
    else:
        swapped = op in ("mT", "getattr") and node.args[1:] in ((), ("mT",))
    return node.args[0] if swapped else None


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    left, right = argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2"))
    if (
        isinstance(left, fx.Node)
        and isinstance(right, fx.Node)
        and is_plain(value_of(left))
        and is_plain(value_of(right))
    ):
        return left, right
    return None


def _swap(node: fx.Node) -> tuple[int, ...]:
    rank = len(value_of(node).shape)
    return (*range(rank - 2), rank - 1, rank - 2)


def _swapped(node: fx.Node) -> Operand:
    """Transpose a node: what it transposes, or a permutation of it."""
    while op_of(node) in ("contiguous", "clone") and transposed_of(node.args[0]) is not None:
        node = node.args[0]  # type: ignore[assignment]
    source = transposed_of(node)
    return Operand(node, _swap(node)) if source is None else Operand(source)


def _scores_of_baddbmm(node: fx.Node) -> Scores | None:
    """`beta * bias + alpha * q @ k.T`; with beta 0 the bias is ignored, even if it is nan."""
    bias, q, kt = argument(node, 0, "input"), argument(node, 1, "batch1"), argument(node, 2, "batch2")
    beta, alpha = (number_of(argument(node, index, name, 1)) for index, name in ((3, "beta"), (4, "alpha")))
    if not isinstance(q, fx.Node) or not isinstance(kt, fx.Node) or not is_plain(value_of(kt)):
        return None
    if alpha is None or beta not in (0, 1):
        return None
    return Scores(Operand(q), _swapped(kt), float(alpha), bias if beta == 1 else None)


def _scores_of_einsum(node: fx.Node) -> Scores | None:
    terms = _terms(node)
    if terms is None:
        return None
    *batch, i, j = terms.result
    for left, right in (terms.operands, terms.operands[::-1]):
        summed = set(left.letters) - set(terms.result)
        if len(summed) == 1:
            (d,) = summed
            q, k = left.ordered((*batch, i, d)), right.ordered((*batch, j, d))
            if q is not None and k is not None:
                return Scores(q, k)
    return None


def _outputs_of_einsum(node: fx.Node) -> Iterator[Output]:
    terms = _terms(node)
    if terms is None:
        return
    for p, values in (terms.operands, terms.operands[::-1]):
        *batch, i, j = p.letters
        free = set(values.letters) - set(p.letters)
        if len(free) == 1:
            (d,) = free
            v, canonical = values.ordered((*batch, j, d)), (*batch, i, d)
            if v is not None and set(canonical) == set(terms.result):
                yield Output(p.node, v, _order(canonical, terms.result))


@dataclass(frozen=True)
class _Term:
    node: fx.Node
    letters: tuple[str, ...]

    def ordered(self, canonical: tuple[str, ...]) -> Operand | None:
        if len(self.letters) != len(canonical) or set(self.letters) != set(canonical):
            return None
        return Operand(self.node, _order(self.letters, canonical))


@dataclass(frozen=True)
class _Terms:
    operands: tuple[_Term, _Term]
    result: tuple[str, ...]


def _terms(node: fx.Node) -> _Terms | None:
    """Read an explicit einsum of two operands without repeated letters; "..." becomes letters."""
    equation, *operands = node.args
    nodes = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], Sequence) else operands
    if not isinstance(equation, str) or "->" not in equation or equation.count(",") != 1 or len(nodes) != 2:
        return None
    left, _, result = equation.replace(" ", "").partition("->")
    terms = []
    for letters, operand in zip(left.split(","), nodes, strict=True):
        if not isinstance(operand, fx.Node) or not is_plain(value_of(operand)):
            return None
        leading = len(value_of(operand).shape) - len(letters.replace("...", ""))
        terms.append(_Term(operand, tuple(letters.replace("...", _LEADING[:leading]))))
    longest = max((term.letters for term in terms), key=len)
    written = tuple(result.replace("...", "".join(letter for letter in longest if letter in _LEADING)))
    distinct = all(len(set(term)) == len(term) in (3, 4) for term in (written, *(term.letters for term in terms)))
    return _Terms((terms[0], terms[1]), written) if distinct else None


def _order(given: tuple[str, ...], wanted: tuple[str, ...]) -> Order:
    return None if given == wanted else tuple(given.index(letter) for letter in wanted)
