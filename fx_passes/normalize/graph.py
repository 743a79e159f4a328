"""Words for reading and writing fx graphs of both kinds: Dynamo's torch IR and exported aten.

A word is here only if two passes use it. Reading never adds a guard: symbolic sizes are compared with
`statically_known_true`, and a value is computed under the fake mode it belongs to.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = int | torch.SymInt

_OWNERS = (operator, torch, torch.nn.functional, torch._C._nn, torch.Tensor)
_SYNONYMS = {
    "bmm": "matmul",
    "concat": "cat",
    "iadd": "add",
    "imatmul": "matmul",
    "imul": "mul",
    "isub": "sub",
    "itruediv": "div",
    "multiply": "mul",
    "rmul": "mul",
    "radd": "add",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "to_copy": "to",
    "true_divide": "div",
    "truediv": "div",
    "unsafe_view": "reshape",
    "view": "reshape",
}
_IN_PLACE = "iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem delitem"
_WRITING_OPERATORS = frozenset(getattr(operator, name) for name in _IN_PLACE.split())
_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"})


def value_of(node: object) -> Any:
    """Read what a node was traced with: meta["example_value"] (Dynamo) or meta["val"] (export); no node is itself."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta["example_value"] if "example_value" in node.meta else node.meta.get("val")


def op_of(node: object) -> str:
    """One name for the operator, function, method and aten forms of an operation, in place or not; "" if it is none.

    `q @ k`, torch.bmm, Tensor.matmul and aten.matmul.default are "matmul"; `x /= 2` is "div".
    """
    if not isinstance(node, fx.Node):
        return ""
    name = _target_name(node).strip("_")
    return _SYNONYMS.get(name, name)


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target if node.op == "call_method" else ""
    if isinstance(target, OpOverload | OpOverloadPacket):
        namespace, name = str(target).split(".")[:2]
        return name if namespace == "aten" else ""
    name = getattr(target, "__name__", "")
    known = target is getattr or any(getattr(owner, name, None) is target for owner in _OWNERS)
    return name if known else ""


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Read an argument of a call, by place or by name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def number_of(value: object) -> float | int | None:
    """Read an argument as a number: a literal, a symbol that a guard has fixed, or a 0-d constant of the graph."""
    if isinstance(value, fx.Node) and isinstance(value_of(value), Tensor):
        return _constant(value)
    value = value_of(value)
    if isinstance(value, torch.SymInt | torch.SymFloat) and value.node.expr.is_number:
        return float(value.node.expr)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _constant(node: fx.Node) -> float | int | None:
    value, op = value_of(node), op_of(node)
    if op in ("to", "clone", "lift_fresh_copy", "detach"):
        return number_of(node.args[0]) if node.args else None
    if value.dim() != 0 or op not in ("tensor", "scalar_tensor", "full"):
        return None
    literal = argument(node, 1, "fill_value") if op == "full" else argument(node, 0, "data")
    return literal if isinstance(literal, int | float) else None


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor whose shape and dtype say everything: no functorch wrapper, no DTensor."""
    if not isinstance(value, Tensor) or type(value) not in (FakeTensor, Tensor, torch.nn.Parameter):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(value)


def is_cast(node: object) -> bool:
    """Whether a node only changes the floating dtype or the memory of its first argument, not values or device."""
    if op_of(node) not in _CASTS or not isinstance(node, fx.Node) or not node.args:
        return False
    before, after = value_of(node.args[0]), value_of(node)
    if not is_plain(before) or not is_plain(after):
        return False
    floating = before.dtype == after.dtype or (before.is_floating_point() and after.is_floating_point())
    return floating and before.device == after.device and same_shape(before.shape, after.shape)


def same_size(left: Size, right: Size) -> bool:
    """Whether two sizes are equal for certain."""
    return bool(statically_known_true(left == right))


def same_shape(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Whether two shapes are equal for certain."""
    return len(left) == len(right) and all(map(same_size, left, right))


def writes(node: fx.Node) -> bool:
    """Whether the node may change a tensor it is given."""
    target = node.target
    if node.op == "call_method":
        name = str(target)
        return name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, HigherOrderOperator) or target in _WRITING_OPERATORS or node.kwargs.get("out") is not None:
        return True
    return getattr(target, "__name__", "").endswith("_") or _asks_inplace(node)


def written_by(node: fx.Node) -> list[fx.Node]:
    """List what a node that `writes` may change."""
    if isinstance(node.target, HigherOrderOperator):  # only kernels take what they change as an argument
        return node.all_input_nodes if "mutation" in node.name else []
    if isinstance(node.target, OpOverload):
        schema = enumerate(node.target._schema.arguments)
        changed = [argument(node, i, a.name) for i, a in schema if a.alias_info is not None and a.alias_info.is_write]
    else:
        changed = [node.args[0] if node.args else None, node.kwargs.get("input"), node.kwargs.get("out")]
    return [target for target in changed if isinstance(target, fx.Node)]


def written_meanwhile(node: fx.Node, matched: Sequence[fx.Node]) -> bool:
    """Whether some other node writes in place between the first of `matched`, in graph order, and `node`."""
    ours, cursor = set(matched), node
    while cursor is not matched[0]:
        cursor = cursor.prev
        if cursor not in ours and writes(cursor):
            return True
    return False


def nodes_between(before: fx.Node, node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes after `before` and in front of `node`."""
    found = []
    while before.next is not node:
        before = before.next
        found.append(before)
    return tuple(found)


def _asks_inplace(node: fx.Node) -> bool:
    code = getattr(node.target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    return "inplace" in names and argument(node, names.index("inplace"), "inplace", False) is not False


def insert(anchor: fx.Node, op: str, *args: Any) -> fx.Node:
    """Make a node before `anchor`, written as the anchor's graph is, with its meta and an own value."""
    exported = "example_value" not in anchor.meta
    target = _target(op, exported)
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(target, args)
    node.meta = {name: entry for name, entry in anchor.meta.items() if name != "tensor_meta"}
    node.meta["val" if exported else "example_value"] = compute(value_of(anchor), target, args)
    return node


def _target(op: str, exported: bool) -> Callable[..., Any]:
    aten = torch.ops.aten
    overloads: dict[str, OpOverload] = {
        "add": aten.add.Tensor,
        "contiguous": aten.contiguous.default,
        "div": aten.div.Tensor,
        "logical_not": aten.logical_not.default,
        "logical_or": aten.logical_or.default,
        "masked_fill": aten.masked_fill.Scalar,
        "mul": aten.mul.Tensor,
        "permute": aten.permute.default,
        "squeeze": aten.squeeze.dim,
        "to": aten.to.dtype,
        "transpose": aten.transpose.int,
        "unflatten": aten.unflatten.int,
        "unsqueeze": aten.unsqueeze.default,
    }
    if exported or op in ("contiguous", "to"):  # a function for it exists only as an aten op
        return overloads[op]
    function: Callable[..., Any] = getattr(torch, op)
    return function


def compute(like: Tensor, target: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call on the values of the arguments, under the fake mode and with the gradient of `like`."""
    mode = getattr(like, "fake_mode", None) or contextlib.nullcontext()
    with mode, torch.set_grad_enabled(like.requires_grad):
        return target(*fx.map_arg(args, value_of))
