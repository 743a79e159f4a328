"""Values that follow the steps, or differ from head to head: inputs of the compiled graph, brought by every call.

    before:  graph(x, weight)                    op(q, k, v, keep_ratio=Schedule(...))
    after:   graph(x, weight, keep_ratio)        op(q, k, v, keep_ratios=keep_ratio)

So one graph serves every step, and nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ..attn_ops.errors import PolicyError
from ..attn_ops.schedule import Number, Schedule
from ..attn_ops.step_range import Step
from ..lowering.steps import current_step
from .normalize.graph import value_of
from .regions import HANDED_ON, region_name, regions_of


class Values(Protocol):
    """Brings the value of a parameter that is not one number to a site."""

    def node(self, graph: fx.Graph, name: str, given: Schedule | tuple[float, ...], like: fx.Node) -> Any:
        """What stands for the value in the graph, on the device of `like`."""


@dataclass(frozen=True)
class _Value:
    """One value: the name of its parameter, what a rule gave, and where its tensor must be."""

    name: str
    given: Schedule | tuple[float, ...]
    device: torch.device

    def at(self, step: Step | None) -> Tensor:
        number = self.given.at(step, self.name) if isinstance(self.given, Schedule) else self.given
        return _tensor(number, self.device)


@functools.lru_cache(maxsize=4096)
def _tensor(number: Number, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be saved for a backward later
        if isinstance(number, tuple):
            return torch.tensor(number, dtype=torch.float32, device=device)
        return torch.full((), number, dtype=torch.float32, device=device)


class StepValues:
    """The values of one graph and its sub-graphs, in the order of the inputs that bring them.

    Args:
        root: the graph that Dynamo traced.
    """

    def __init__(self, root: fx.GraphModule) -> None:
        self._root = root
        self._values: list[_Value] = []
        self._nodes: dict[tuple[fx.Graph, _Value], fx.Node] = {}

    def node(self, graph: fx.Graph, name: str, given: Schedule | tuple[float, ...], like: fx.Node) -> fx.Node:
        """The node of a graph, the root's or a sub-graph's, that holds a parameter's value, on the device of `like`.

        Raises:
            PolicyError: if no value can be brought into that sub-graph.
        """
        value = _Value(name, given, value_of(like).device)
        if value not in self._values:
            self._bring(self._root.graph, value, like)
            self._values.append(value)
        return self._bring(graph, value, like)

    def _bring(self, graph: fx.Graph, value: _Value, like: fx.Node) -> fx.Node:
        if (graph, value) not in self._nodes:
            self._nodes[graph, value] = _placeholder(graph, value, like)
            for region in self._regions(graph) if graph is not self._root.graph else ():
                region.args = (*region.args, self._bring(region.graph, value, like))
        return self._nodes[graph, value]

    def _regions(self, graph: fx.Graph) -> list[fx.Node]:
        """The nodes that run a sub-graph."""
        regions = regions_of(self._root, graph)
        for region in regions:
            if region_name(region) not in HANDED_ON:
                raise PolicyError(
                    f"a parameter that follows the steps or differs by head cannot enter a region of {region.target}. "
                    "Give its layers one number, in a rule of their own."
                )
        return regions

    def examples(self) -> list[Tensor]:
        """Inputs to compile with, after those that Dynamo gave."""
        return [_tensor(_first(value.given), value.device) for value in self._values]

    def bound(self, step: Step | None) -> dict[fx.Node, Tensor]:
        """The inputs that were added to the root's graph, and their values at one step.

        Raises:
            PolicyError: if one follows the steps and there is none, or it is outside of what it follows.
        """
        return {self._nodes[self._root.graph, value]: value.at(step) for value in self._values}

    def feed(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled graph as Dynamo calls it; the values of the step are added to every call."""
        if not self._values:
            return compiled

        def fed(*inputs: Any) -> Any:
            step = current_step()
            return compiled(*inputs, *(value.at(step) for value in self._values))

        return fed


def with_room(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph, which shares its sub-graphs, that may gain inputs and outputs: Dynamo keeps its own."""
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, nodes))
    graph.set_codegen(module.graph._codegen)
    graph.output_node().meta = dict(module.graph.output_node().meta)
    for node in module.graph.find_nodes(op="placeholder"):
        if hasattr(node, "_dynamo_source"):  # AOTAutograd reads it; those of a sub-graph have none
            nodes[node]._dynamo_source = node._dynamo_source
    copy = fx.GraphModule(module, graph)
    copy.meta = module.meta
    if hasattr(module, "_param_name_to_source"):
        copy._param_name_to_source = module._param_name_to_source
    return copy


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph and its sub-graphs, each with room; parameters and constants are shared."""
    copy = with_room(module)
    for name, child in copy.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(copy, name, copied(child))
    return copy


def _first(given: Schedule | tuple[float, ...]) -> Number:
    return given.extremes[0] if isinstance(given, Schedule) else given


def _placeholder(graph: fx.Graph, value: _Value, like: fx.Node) -> fx.Node:
    last: Sequence[fx.Node] = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(f"sparseattn_{value.name}_{len(last)}")  # two layers may follow schedules of their own
    with getattr(value_of(like), "fake_mode", None) or contextlib.nullcontext():
        shape = () if isinstance(number := _first(value.given), float) else (len(number),)
        key = "example_value" if "example_value" in like.meta else "val"
        node.meta[key] = torch.empty(shape, dtype=torch.float32, device=value.device)
    node._dynamo_source = None  # it is no variable of the user's
    return node
