"""device_sdpa: the kernel that PyTorch chose for a device becomes SDPA again.

    before:  pair = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True);  out = pair[0]
    after:   out = scaled_dot_product_attention(q, k, v, is_causal=True)

Exact: these are what SDPA calls. A node of which more than the output is read stays: its logsumexp, its random state.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from .graph import is_plain, same_size, value_of
from .record import Normalized

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_PREFIX = "aten::_scaled_dot_product_"
_SAME = ("query", "key", "value", "dropout_p", "is_causal", "scale", "enable_gqa")
_RENAMED = {"attn_mask": "attn_mask", "attn_bias": "attn_mask"}
_OF_OTHER_RESULTS = ("compute_log_sumexp", "return_debug_mask")


def join_device_sdpa(module: fx.GraphModule) -> list[Normalized]:
    """Put an SDPA node beside the forward of every device's SDPA in one graph; see `fuse_unfused`."""
    found = [(node, given) for node in module.graph.nodes if (given := _read(node)) is not None]
    return [_join(node, given) for node, given in found]


def _read(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of SDPA that the node stands for; None if it stands for none, or for more."""
    target = node.target
    if not isinstance(target, OpOverload) or not target._schema.name.startswith(_PREFIX):
        return None
    if "backward" in target._schema.name or not node.users or any(not _is_output(user) for user in node.users):
        return None
    schema = {argument.name: argument.default_value for argument in target._schema.arguments}
    given = schema | dict(zip(schema, node.args, strict=False)) | node.kwargs
    if set(given) - {*_SAME, *_RENAMED, *_OF_OTHER_RESULTS, "dropout_mask"} or given.get("dropout_mask") is not None:
        return None
    operands = [value_of(given[name]) for name in ("query", "key", "value")]
    if not all(is_plain(operand) and operand.dim() == 4 for operand in operands):
        return None
    arguments = {name: given[name] for name in _SAME if name in given}
    arguments |= {_RENAMED[name]: given[name] for name in _RENAMED if name in given}
    grouped = not same_size(operands[0].shape[1], operands[1].shape[1])
    return arguments | ({"enable_gqa": True} if grouped else {})


def _is_output(user: fx.Node) -> bool:
    return user.target is operator.getitem and bool(user.args[1] == 0)


def _join(node: fx.Node, given: dict[str, Any]) -> Normalized:
    items = tuple(node.users)
    operands = tuple(given.pop(name) for name in ("query", "key", "value"))
    with node.graph.inserting_before(node):
        site = node.graph.call_function(_SDPA, operands, given)
    site.meta = {name: entry for name, entry in (node.meta | items[0].meta).items() if name != "tensor_meta"}
    for item in items:
        item.replace_all_uses_with(site)
    return Normalized(site, tuple((item, site) for item in items), (site,), (node, *items))
