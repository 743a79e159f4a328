"""The recipe of a tensor that depends on sizes alone: the nodes that make it, run on real CPU tensors at chosen sizes.

Only operations known to be pure are run, and none that reads a parameter, a buffer or an input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from .graph import op_of, value_of, writes, written_by

Assignment = Mapping[sympy.Symbol, sympy.Integer]

_FACTORIES = frozenset({"arange", "full", "ones", "scalar_tensor", "tensor", "zeros"})
_ARITHMETIC = frozenset(
    {
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "floordiv",
        "floor_divide",
        "mod",
        "remainder",
        "neg",
        "abs",
        "minimum",
        "maximum",
    }
    | {"clamp", "cumsum", "diff", "all", "any"}
)
_LOGIC = frozenset(
    {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "invert", "where", "masked_fill", "tril", "triu"}
    | {"logical_and", "logical_or", "logical_xor", "logical_not"}
    | {"bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"}
)
_CASTS = frozenset(
    {"bool", "int", "long", "float", "double", "half", "bfloat16", "to", "type_as"}
    | {"contiguous", "clone", "alias", "detach", "lift_fresh_copy"}
    | {"new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like"}
)
_SHAPES = frozenset(
    {"getitem", "index", "select", "slice", "narrow", "expand", "expand_as", "broadcast_to", "reshape", "flatten"}
    | {"unsqueeze", "squeeze", "transpose", "permute", "t", "mT", "cat", "stack", "repeat", "repeat_interleave"}
    | {"flip", "roll"}
)
_PURE = _FACTORIES | _ARITHMETIC | _LOGIC | _CASTS | _SHAPES
_CPU = torch.device("cpu")
_NO_SIZE = 2**31  # a larger number in a graph is "to the end", not a size
_NO_POSITION = 65504.0  # a float beyond it is a fill value, not compared with a position


@dataclass(frozen=True)
class Symbol:
    """A symbolic size: its least and greatest value, and the one it was traced with."""

    low: int
    high: int | None
    hint: int | None


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor is made from sizes.

    Args:
        steps: the nodes to run, in graph order; the last is the tensor.
        leaves: nodes whose value is a size, a number or a tuple of them.
        symbols: the symbolic sizes that it depends on.
        numbers: the numbers that appear in its making and could be compared with a size or a position.
    """

    steps: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    symbols: Mapping[sympy.Symbol, Symbol]
    numbers: frozenset[int]

    def evaluate(self, assignment: Assignment) -> Tensor | None:
        """Compute the tensor at these sizes; None if the graph cannot run at them."""
        values: dict[fx.Node, Any] = {leaf: concrete(value_of(leaf), assignment) for leaf in self.leaves}
        with _disable_current_modes(), torch.no_grad():
            try:
                for step in self.steps:
                    values[step] = _run(step, values, assignment)
            except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                return None
        result = values[self.steps[-1]]
        return result if isinstance(result, Tensor) else None


def read_recipe(node: fx.Node) -> Recipe | None:
    """Read the recipe of a tensor; None if it depends on more than sizes or is written to elsewhere."""
    steps: set[fx.Node] = set()
    leaves: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        current = todo.pop()
        if current in steps or current in leaves:
            continue
        if _is_size(value_of(current)):
            leaves[current] = None
        elif op_of(current) in _PURE:
            steps.add(current)
            todo += current.all_input_nodes
        else:
            return None
    if node not in steps or _written_elsewhere(node.graph, steps):
        return None
    ordered = tuple(other for other in node.graph.nodes if other in steps)
    symbols = _symbols([value_of(leaf) for leaf in leaves])
    numbers = frozenset(number for step in ordered for number in _numbers((step.args, step.kwargs)))
    return None if symbols is None else Recipe(ordered, tuple(leaves), symbols, numbers)


def concrete(value: Any, assignment: Assignment) -> Any:
    """Put numbers for the symbols of a size, or of a tuple of sizes."""
    if isinstance(value, torch.SymInt):
        return int(value.node.expr.xreplace(assignment))
    if isinstance(value, torch.SymFloat):
        return float(value.node.expr.xreplace(assignment))
    if isinstance(value, tuple):
        return tuple(concrete(entry, assignment) for entry in value)
    return value


def _is_size(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_size, value))
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat)


def _written_elsewhere(graph: fx.Graph, steps: set[fx.Node]) -> bool:
    """Whether a node outside the recipe writes to one of its tensors, or to something made from one."""
    for node in graph.nodes:
        if node not in steps and writes(node) and any(_made_from(target, steps) for target in written_by(node)):
            return True
    return False


def _made_from(target: object, steps: set[fx.Node]) -> bool:
    """Whether a tensor is one of the steps or, by its first arguments, comes from one: it may be a view of it."""
    while isinstance(target, fx.Node):
        if target in steps:
            return True
        target = target.args[0] if target.args else None
    return False


def _symbols(values: list[object]) -> dict[sympy.Symbol, Symbol] | None:
    """Collect the symbols in sizes and what is known of each; None if one of them is a float."""
    symbols: dict[sympy.Symbol, Symbol] = {}
    for value in _flat(values):
        if isinstance(value, torch.SymFloat) and not value.node.expr.is_number:
            return None
        if isinstance(value, torch.SymInt):
            ranges = value.node.shape_env.var_to_range
            for symbol in value.node.expr.free_symbols:
                hint = value.node.hint if value.node.expr == symbol else None
                known = symbols.get(symbol)
                if known is None or known.hint is None:
                    symbols[symbol] = _symbol(ranges.get(symbol), hint)
    return symbols


def _symbol(bounds: Any, hint: int | None) -> Symbol:
    low = int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 0
    high = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer and bounds.upper < _NO_SIZE else None
    return Symbol(max(low, 0), high, hint)


def _flat(values: object) -> Iterator[object]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    else:
        yield values


def _numbers(argument: object) -> Iterator[int]:
    """Whole numbers in arguments, wherever they stand."""
    if isinstance(argument, slice):
        argument = (argument.start, argument.stop, argument.step)
    if isinstance(argument, dict):
        argument = tuple(argument.values())
    if isinstance(argument, list | tuple):
        for entry in argument:
            yield from _numbers(entry)
    if isinstance(argument, torch.SymInt):
        yield from (abs(int(atom)) for atom in argument.node.expr.atoms(sympy.Integer))
    elif isinstance(argument, fx.Node) and _is_size(value_of(argument)):
        yield from _numbers(value_of(argument))
    elif isinstance(argument, int) and not isinstance(argument, bool) and abs(argument) < _NO_SIZE:
        yield abs(argument)
    elif isinstance(argument, float) and abs(argument) < _NO_POSITION:
        yield abs(round(argument))


def _run(step: fx.Node, values: dict[fx.Node, Any], assignment: Assignment) -> Any:
    args, kwargs = fx.map_arg((step.args, step.kwargs), lambda node: values[node])
    args = tuple(_here(concrete(argument, assignment), step) for argument in args)
    kwargs = {name: _here(concrete(argument, assignment), step) for name, argument in kwargs.items()}
    kwargs.pop("pin_memory", None)
    if op_of(step) in _FACTORIES or "device" in kwargs:
        kwargs["device"] = _CPU
    target = getattr(Tensor, step.target) if isinstance(step.target, str) else step.target
    return target(*args, **kwargs)


def _here(argument: Any, step: fx.Node) -> Any:
    """Replace a device by the CPU."""
    is_device = isinstance(argument, torch.device) or (isinstance(argument, str) and op_of(step) == "to")
    return _CPU if is_device else argument
