"""Graph and Value: the body of an ONNX function, written as if its values were arrays.

Plain data, without the package onnx: `proto` turns it into what that package stores. A number that meets a value
becomes a constant: an int is INT64, a float FLOAT, a list one-dimensional INT64. Shapes are read from the values when
the body runs, so one body serves every batch and length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOAT, INT32, INT64, BOOL, FLOAT16, DOUBLE, FLOAT8 = 1, 6, 7, 9, 10, 11, 17
"""Numbers of data types in ONNX; FLOAT8 is e4m3fn."""


@dataclass(frozen=True)
class Node:
    """One operation of the standard domain; attributes are numbers, text, lists, tensors or graphs."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    def reads(self) -> Iterator[str]:
        """Names of its inputs, and of what graphs inside of it read."""
        yield from self.inputs
        for value in self.attributes.values():
            if isinstance(value, Graph):
                yield from value.outputs
                for node in value.nodes:
                    yield from node.reads()


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a graph, by its name."""

    graph: Graph
    name: str

    def __add__(self, other: Any) -> Value:
        return self.graph.op("Add", self, other)

    def __sub__(self, other: Any) -> Value:
        return self.graph.op("Sub", self, other)

    def __mul__(self, other: Any) -> Value:
        return self.graph.op("Mul", self, other)

    def __truediv__(self, other: Any) -> Value:
        return self.graph.op("Div", self, other)

    def __floordiv__(self, other: Any) -> Value:
        """Of integers that are not negative."""
        return self.graph.op("Div", self, other)

    def __mod__(self, other: Any) -> Value:
        return self.graph.op("Mod", self, other)

    def __matmul__(self, other: Value) -> Value:
        return self.graph.op("MatMul", self, other)

    def __lt__(self, other: Any) -> Value:
        return self.graph.op("Less", self, other)

    def __le__(self, other: Any) -> Value:
        return self.graph.op("LessOrEqual", self, other)

    def __gt__(self, other: Any) -> Value:
        return self.graph.op("Greater", self, other)

    def __ge__(self, other: Any) -> Value:
        return self.graph.op("GreaterOrEqual", self, other)

    def __and__(self, other: Value) -> Value:
        return self.graph.op("And", self, other)

    def __or__(self, other: Value) -> Value:
        return self.graph.op("Or", self, other)

    def __invert__(self) -> Value:
        return self.graph.op("Not", self)

    def cast(self, dtype: int) -> Value:
        """The same numbers in another type."""
        return self.graph.op("Cast", self, to=dtype)

    def size(self, axis: int) -> Value:
        """(1,) INT64: the length along an axis, counted from the front."""
        return self.graph.op("Shape", self, start=axis, end=axis + 1)

    def reshape(self, *sizes: Value | int) -> Value:
        """Another shape; one size may be -1."""
        return self.graph.op("Reshape", self, self.graph.sizes(*sizes))

    def expand(self, *sizes: Value | int) -> Value:
        """Broadcast to a shape; 1 keeps a size."""
        return self.graph.op("Expand", self, self.graph.sizes(*sizes))

    def transpose(self, *order: int) -> Value:
        """Axes in another order."""
        return self.graph.op("Transpose", self, perm=list(order))

    def unsqueeze(self, *axes: int) -> Value:
        """New axes of length 1, at these places of the result."""
        return self.graph.op("Unsqueeze", self, list(axes))

    def squeeze(self, *axes: int) -> Value:
        """Without these axes of length 1."""
        return self.graph.op("Squeeze", self, list(axes))

    def slice(self, axis: int, start: Value | int, stop: Value | int) -> Value:
        """Entries start ... stop - 1 along an axis; a stop beyond the end is the end."""
        bounds = [bound if isinstance(bound, Value) else self.graph.constant([bound]) for bound in (start, stop)]
        return self.graph.op("Slice", self, *bounds, [axis])

    def max(self, *axes: int, keep: bool = True) -> Value:
        """Largest entry along axes."""
        return self._reduce("ReduceMax", axes, keep)

    def min(self, *axes: int, keep: bool = True) -> Value:
        """Smallest entry along axes."""
        return self._reduce("ReduceMin", axes, keep)

    def sum(self, *axes: int, keep: bool = True) -> Value:
        """Sum along axes."""
        return self._reduce("ReduceSum", axes, keep)

    def mean(self, *axes: int, keep: bool = True) -> Value:
        """Mean along axes."""
        return self._reduce("ReduceMean", axes, keep)

    def at_least(self, low: Any) -> Value:
        """The larger of both."""
        return self.graph.op("Max", self, low)

    def at_most(self, high: Any) -> Value:
        """The smaller of both."""
        return self.graph.op("Min", self, high)

    def take(self, index: Any, axis: int) -> Value:
        """The entries with these numbers along an axis."""
        return self.graph.op("Gather", self, index, axis=axis)

    def _reduce(self, kind: str, axes: tuple[int, ...], keep: bool) -> Value:
        return self.graph.op(kind, self, list(axes), keepdims=int(keep))


@dataclass(eq=False)
class Graph:
    """Nodes in order. A graph inside a Scan or Loop reads the values of those around it."""

    prefix: str = ""
    inputs: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, data type and rank of the inputs: a graph inside another declares them."""
    outputs: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    opset: int = 23
    _number: Iterator[int] = field(default_factory=itertools.count)
    _constants: dict[object, Value] = field(default_factory=dict)

    def value(self, name: str) -> Value:
        """The value of that name."""
        return Value(self, name)

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> Value:
        """Append an operation with one output; None is an optional input that is not given."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: Any, **attributes: Any) -> list[Value]:
        """Append an operation with several outputs."""
        names = tuple("" if value is None else self.constant(value).name for value in inputs)
        made = tuple(self._fresh() for _ in range(outputs))
        self.nodes.append(Node(kind, names, made, attributes))
        return [Value(self, name) for name in made]

    def constant(self, value: Any) -> Value:
        """A number, list or tensor as a value; a value as itself, of this graph."""
        if isinstance(value, Value):
            return value if value.graph is self else Value(self, value.name)
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=_dtype(value))
        key = (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())
        if key not in self._constants:
            name = self._fresh()
            self.nodes.append(Node("Constant", (), (name,), {"value": tensor}))
            self._constants[key] = Value(self, name)
        return self._constants[key]

    def double(self, number: float) -> Value:
        """A constant in double precision."""
        return self.constant(torch.tensor(number, dtype=torch.float64))

    def sizes(self, *sizes: Value | int) -> Value:
        """A shape, from numbers and (1,) values."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(list(sizes))
        parts = [size if isinstance(size, Value) else self.constant([size]) for size in sizes]
        return self.op("Concat", *parts, axis=0)

    def concat(self, *parts: Any, axis: int) -> Value:
        """One after the other along an axis."""
        return self.op("Concat", *parts, axis=axis)

    def where(self, condition: Value, yes: Any, no: Any) -> Value:
        """Entries of one where the condition holds, else of the other."""
        return self.op("Where", condition, yes, no)

    def numbers(self, stop: Value | int) -> Value:
        """(stop,) INT64: 0, 1, ... stop - 1; stop is (1,)."""
        if isinstance(stop, int):
            return self.constant(list(range(stop)))
        return self.op("Range", 0, stop.squeeze(0), 1)

    def drop_unused(self, outputs: Iterable[str]) -> None:
        """Take away the nodes that these values do not need: bodies are written without asking for each option."""
        wanted, kept = set(outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.outputs):
                kept.append(node)
                wanted.update(node.reads())
        self.nodes = kept[::-1]

    def inner(self) -> Graph:
        """An empty graph for a Scan or Loop in this one."""
        return Graph(prefix=f"{self._fresh()}_", opset=self.opset)

    def declare(self, dtype: int, rank: int) -> Value:
        """One more input."""
        name = self._fresh()
        self.inputs.append((name, dtype, rank))
        return Value(self, name)

    def _fresh(self) -> str:
        return f"{self.prefix}{next(self._number)}"


def _dtype(value: Any) -> torch.dtype:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if isinstance(first, bool):
        return torch.bool
    return torch.float32 if isinstance(first, float) else torch.int64
