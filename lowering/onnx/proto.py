"""Bodies as the package onnx stores them. The one file here that imports it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper
from torch import Tensor

from .graph import Graph, Node
from .symbolic import DOMAIN

_TYPES = {
    "torch.float32": TensorProto.FLOAT,
    "torch.float64": TensorProto.DOUBLE,
    "torch.int32": TensorProto.INT32,
    "torch.int64": TensorProto.INT64,
    "torch.bool": TensorProto.BOOL,
}


def function_of(
    body: Graph, name: str, overload: str, inputs: Iterable[str], outputs: Iterable[str], attributes: Iterable[str]
) -> FunctionProto:
    """A local function of our domain.

    Args:
        body: what it computes.
        name: name of the op.
        overload: tells functions of one name apart.
        inputs: names of its inputs, as the body reads them.
        outputs: names of the values that it returns.
        attributes: names of the parameters that nodes calling it carry. The body is made for their values.
    """
    imports = [helper.make_opsetid("", body.opset)]
    nodes = [_node(node) for node in body.nodes]
    function = helper.make_function(DOMAIN, name, list(inputs), list(outputs), nodes, imports, list(attributes))
    function.overload = overload
    return function


def _node(node: Node) -> NodeProto:
    proto = helper.make_node(node.kind, node.inputs, node.outputs)
    proto.attribute.extend(_attribute(name, value) for name, value in node.attributes.items())
    return proto


def _attribute(name: str, value: Any) -> AttributeProto:
    if isinstance(value, Graph):
        return helper.make_attribute(name, _graph(value))
    if isinstance(value, Tensor):
        return helper.make_attribute(name, _tensor(value))
    return helper.make_attribute(name, value)


def _tensor(value: Tensor) -> TensorProto:
    data = value.contiguous().numpy().tobytes()
    return helper.make_tensor("", _TYPES[str(value.dtype)], list(value.shape), data, raw=True)


def _graph(graph: Graph) -> GraphProto:
    inputs = [helper.make_tensor_value_info(name, dtype, [None] * rank) for name, dtype, rank in graph.inputs]
    outputs = [helper.make_empty_tensor_value_info(name) for name in graph.outputs]
    return helper.make_graph([_node(node) for node in graph.nodes], "body", inputs, outputs)
