"""Every op of ours in ONNX: its tensors, its parameters, its body, and what cannot be said.

`call_of` splits a call into inputs and attributes of a node, `function_body` makes the function of such a node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attn_ops.blocks.sparge_arguments import BLOCK_MAP
from ...attn_ops.errors import UnsupportedError
from .block_sparse import block_sparse_attention
from .block_topk import block_topk_attention
from .flash import flash_attention
from .graph import FLOAT, INT32, INT64, Graph, Value
from .sage import sage_attention, sage_attention_quantized
from .sage_fp4 import sage_fp4_attention
from .sage_sla import sage_sparse_linear_attention
from .sla import sparse_linear_attention
from .sparge import sparge_attention, sparge_block_map
from .sta import sliding_tile_attention
from .vmoba import vmoba_attention
from .vsa import video_sparse_attention

Body = Callable[..., tuple[Value, "Value | None"]]

_BODIES: dict[str, Body] = {
    body.__name__: body
    for body in (
        block_sparse_attention,
        block_topk_attention,
        flash_attention,
        sage_attention,
        sage_attention_quantized,
        sage_fp4_attention,
        sage_sparse_linear_attention,
        sliding_tile_attention,
        sparge_attention,
        sparge_block_map,
        sparse_linear_attention,
        video_sparse_attention,
        vmoba_attention,
    )
}
OPS = tuple(_BODIES)
_LISTS = ("block_index", "block_count", "key_sizes")
_NOT_CARRIED = ("provider",)


@dataclass(frozen=True)
class Call:
    """A node of our domain: inputs in the op's order, None where one is not given, and attributes."""

    op: str
    inputs: dict[str, Any]
    attributes: dict[str, Any]


def call_of(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The node that stands for a call of `torch.ops.sparseattn.<op>`, defaults filled in.

    Raises:
        UnsupportedError: if ONNX cannot say what it asks; the message has the reason and the alternative.
    """
    arguments, tensors = _arguments(op), tensors_of(op)
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | dict(kwargs)
    inputs: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for argument in arguments:
        value = given.get(argument.name, argument.default_value)
        if argument.name in tensors:
            inputs[argument.name] = value
        elif argument.name not in _NOT_CARRIED:
            attributes[argument.name] = value
    head_dim = inputs["q"].shape[-1]
    for name, value in (("head_dim", head_dim), *attributes.items()):
        _check_number(op, name, value)
    if attributes.get("scale") is None:
        attributes["scale"] = head_dim**-0.5
    _check(op, inputs["q"], attributes)
    return Call(op, inputs, {name: _plain(value) for name, value in attributes.items() if value is not None})


def tensors_of(op: str) -> list[str]:
    """Names of the tensors among the arguments of an op, in order."""
    return [argument.name for argument in _arguments(op) if "Tensor" in str(argument.type)]


def _arguments(op: str) -> list[torch.Argument]:
    arguments: list[torch.Argument] = getattr(torch.ops.sparseattn, op).default._schema.arguments
    return arguments


def _check_number(op: str, name: str, value: Any) -> None:
    for part in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(part, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise UnsupportedError(
                f"ONNX: {op}: {name} must be a number known at export, got the dynamic {part}. Export with this size "
                "static: a function's body is made for it."
            )


def _check(op: str, q: Tensor, attributes: dict[str, Any]) -> None:
    if attributes.get("compat") and "variant" in attributes and q.dtype != torch.float32:
        raise UnsupportedError(
            f"ONNX: {op}: compat must be False for {q.dtype}, got True: it chooses blocks by scores rounded to that "
            "dtype, which runtimes round differently. Pass compat=False, or export in float32."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def function_body(
    op: str, inputs: list[str], attributes: Mapping[str, Any], *, lse: bool, opset: int
) -> tuple[Graph, list[str]]:
    """The body of a node, and the names of what it returns.

    Args:
        op: name of the op.
        inputs: names of all its tensors, "" for one that is not given.
        attributes: its parameters.
        lse: whether the second output is used.
        opset: version of the standard operators.
    """
    graph = Graph(opset=opset)
    tensors = tensors_of(op)
    given = {name: graph.value(name).cast(INT64 if name in _LISTS else FLOAT) for name in inputs if name}
    defaults = {argument.name: argument.default_value for argument in _arguments(op) if argument.name not in tensors}
    params = {**defaults, **attributes}
    first, second = _BODIES[op](graph, given, **params, lse=lse)
    outputs = [graph.op("CastLike", first, graph.value("v" if "v" in tensors else "q"))]
    if op == BLOCK_MAP:
        outputs = [first.cast(INT32), *([second.cast(INT32)] if lse and second is not None else [])]
    elif lse and second is not None:
        outputs.append(second.squeeze(3))
    names = [value.name for value in outputs]
    graph.drop_unused(names)
    return graph, names
