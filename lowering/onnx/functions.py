"""Give the bare nodes of an exported model their functions, one for every way they are called.

Functions of one op are told apart by their overload, so that a runtime with a kernel for `sparseattn::<op>` finds all
of its nodes under that name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from onnx import GraphProto, ModelProto, NodeProto

from .proto import function_of
from .symbolic import DOMAIN, EXACT
from .translations import function_body, tensors_of

OVERLOADS_SINCE = 10
"""Version of the file format that has overloads."""


def our_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of our domain, those of sub-graphs included."""
    for node in graph.node:
        if node.domain == DOMAIN:
            yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from our_nodes(inner)


def drop_unused_lse(model: ModelProto) -> None:
    """Take away the second output where nobody reads it: without it, attention has a cheaper body."""
    read = set(_names_read(model.graph))
    for node in our_nodes(model.graph):
        if len(node.output) == 2 and node.output[1] not in read:
            del node.output[1:]


def add_functions(model: ModelProto) -> None:
    """Append a function for every different call of an op of ours, and point its nodes to it."""
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    overloads: dict[tuple[str, ...], str] = {}
    numbers: Counter[str] = Counter()
    for node in our_nodes(model.graph):
        exact = next(entry.value for entry in node.metadata_props if entry.key == EXACT)
        names = tensors_of(node.op_type)
        inputs = [name if given else "" for name, given in zip(names, node.input, strict=False)]
        key = node.op_type, exact, ",".join(inputs), str(len(node.output))
        if key not in overloads:
            numbers[node.op_type] += 1
            overloads[key] = str(numbers[node.op_type]) if numbers[node.op_type] > 1 else ""
            attributes = json.loads(exact)
            body, outputs = function_body(node.op_type, inputs, attributes, lse=len(node.output) == 2, opset=opset)
            model.functions.append(
                function_of(body, node.op_type, overloads[key], names[: len(inputs)], outputs, attributes)
            )
        node.overload = overloads[key]
    model.ir_version = max(model.ir_version, OVERLOADS_SINCE)


def _names_read(graph: GraphProto) -> Iterator[str]:
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _names_read(inner)
