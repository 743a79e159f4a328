"""Graphs as a backend gets them, and models compiled with a graph that a pass has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend

Change = Callable[[fx.GraphModule], object]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Import it in a test file: no test sees the compiled code of another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def capture(model: Callable[..., Any], *args: Any, dynamic: bool | None = None, grad: bool = False) -> fx.GraphModule:
    """The graph that Dynamo gives a backend for `model(*args)`."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(*args)
    return graphs[0]


def compiled(model: Callable[..., Any], change: Change, dynamic: bool | None = None) -> Callable[..., Any]:
    """`model`, compiled with `change` applied to its graph, which is then traced again and run by AOTAutograd."""
    run = lookup_backend("aot_eager")

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        change(graph)
        graph.graph.lint()
        graph.recompile()
        return run(graph, inputs)

    return torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)


def exported(model: torch.nn.Module, *args: Any, **options: Any) -> torch.export.ExportedProgram:
    """The exported program of `model(*args)`."""
    return torch.export.export(model, args, **options)


def count(graph: fx.GraphModule, *targets: object) -> int:
    """How many nodes of a graph have one of these targets."""
    return sum(node.target in targets for node in graph.graph.nodes)


def listing(graph: fx.GraphModule) -> tuple[str, list[str]]:
    """The printed code of a graph and its nodes in order: equal listings are byte-identical graphs."""
    graph.recompile()
    return graph.code, [node.format_node() or node.name for node in graph.graph.nodes]


def find_node(graph: fx.GraphModule, name: str) -> fx.Node:
    """The node of this name."""
    found: fx.Node = next(node for node in graph.graph.nodes if node.name == name)
    return found
