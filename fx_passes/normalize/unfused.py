"""unfused: attention written as two products becomes one SDPA node.

    before:  p = dropout(softmax(q @ k.transpose(-2, -1) * scale + mask));  out = p @ v
    after:   out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=..., scale=scale)

Exact: the same function of its inputs up to rounding, forward and backward. Not bit for bit: where the original rounds
scores or weights to a half dtype between steps, SDPA keeps fp32; dropout draws other numbers; a row whose keys are all
hidden with -inf is nan in the original and 0 in SDPA. A finite fill (-1e9, finfo.min) means -inf only if no row is
hidden completely, so it is fused only where `prove_mask` shows that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .contraction import Operand, Output, Scores, read_outputs
from .graph import insert, is_cast, is_plain, nodes_between, op_of, same_shape, same_size, value_of, written_meanwhile
from .layout import Copy, copy_to_keep_layout, inverse
from .masks import HIDES, prove_mask
from .record import Normalized
from .scores import Weights, read_weights

_SDPA = torch._C._nn.scaled_dot_product_attention
_EXPORTED_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fuse_unfused(module: fx.GraphModule) -> list[Normalized]:
    """Put an SDPA node beside every unfused attention of one graph and give it the users; sub-graphs are not entered.

    Returns:
        One record per site; the original nodes stay until its `commit`, and `restore` brings them back.
    """
    records = []
    for node in list(module.graph.nodes):
        if op_of(node) in ("matmul", "einsum") and node.users and is_plain(value_of(node)):
            match = _match(node)
            if match is not None:
                records.append(_fuse(match))
    return records


@dataclass(frozen=True)
class _Match:
    node: fx.Node
    q: Operand
    k: Operand
    v: Operand
    weights: Weights
    order: tuple[int, ...] | None
    matched: tuple[fx.Node, ...]
    causal: bool
    copy: Copy


def _match(node: fx.Node) -> _Match | None:
    """Read a product as the output of attention; None if it is not that, or not what SDPA computes."""
    for output in read_outputs(node):
        weights = read_weights(output.p)
        alone = all(len(between.users) == 1 for between in output.between)
        if alone and weights is not None and weights.scores is not None:
            return _exact(node, output, weights, weights.scores)
    return None


def _exact(node: fx.Node, output: Output, weights: Weights, scores: Scores) -> _Match | None:
    dtype = value_of(node).dtype
    (q, cast_q), (k, cast_k) = _before_upcast(scores.q, dtype), _before_upcast(scores.k, dtype)
    walked = (*weights.matched, *output.between)
    matched = _in_graph_order(node, (*walked, *cast_q, *cast_k))
    if not _shapes_fit(q, k, output.v) or not _dtypes_fit(node, q, k, output, weights) or not weights.scale > 0:
        return None
    if written_meanwhile(node, matched) or not _fills_fit(weights, q, k):
        return None
    causal, copy = _masks_fit(weights, q, k, dtype), copy_to_keep_layout(node, output.order)
    if causal is None or copy is None or not _factors_fit(weights, q):
        return None
    return _Match(node, q, k, output.v, weights, output.order, matched, causal, copy)


def _before_upcast(operand: Operand, dtype: torch.dtype) -> tuple[Operand, tuple[fx.Node, ...]]:
    """`x` for `x.float()`: SDPA accumulates in fp32 by itself."""
    node = operand.node
    if is_cast(node) and value_of(node).dtype == torch.float32 != dtype and value_of(node.args[0]).dtype == dtype:
        return Operand(node.args[0], operand.order), (node,)  # type: ignore[arg-type]
    return operand, ()


def _shapes_fit(q: Operand, k: Operand, v: Operand) -> bool:
    """Whether (..., Sq, D), (..., Sk, D), (..., Sk, Dv) have the same one or two leading sizes: nothing broadcasts."""
    if not all(is_plain(value_of(operand.node)) and len(operand.shape) == len(q.shape) for operand in (q, k, v)):
        return False
    leading = all(same_shape(operand.shape[:-2], q.shape[:-2]) for operand in (k, v))
    return len(q.shape) in (3, 4) and leading and same_size(k.shape[-1], q.shape[-1])


def _dtypes_fit(node: fx.Node, q: Operand, k: Operand, output: Output, weights: Weights) -> bool:
    """Whether SDPA at the place of `node` computes in the dtype of the products, on its own or through autocast."""
    dtype = value_of(node).dtype
    given = {value_of(operand.node).dtype for operand in (q, k, output.v)}
    first = value_of(weights.matched[-1]).dtype
    if given == {dtype}:
        return dtype in _FLOATS and torch.promote_types(first, dtype) == first
    promoted = torch.promote_types(value_of(output.p).dtype, value_of(output.v.node).dtype)
    return first == dtype and promoted != dtype and given <= set(_FLOATS)


def _masks_fit(weights: Weights, q: Operand, k: Operand, dtype: torch.dtype) -> bool | None:
    """Return False if SDPA takes the masks, True if they are one provably causal mask in another dtype, else None."""
    rank = len(q.shape)
    masks = (*weights.biases, *(hidden.mask for hidden in weights.hidden))
    if not all(is_plain(value_of(mask)) and value_of(mask).dim() <= rank for mask in masks):
        return None
    if all(value_of(bias).dtype == dtype for bias in weights.biases):
        return False
    fact = prove_mask(weights.biases[0], q.shape[-2], k.shape[-2]) if len(masks) == 1 else None
    return True if fact is not None and fact.causal and fact.window is None else None


def _factors_fit(weights: Weights, q: Operand) -> bool:
    """Whether q keeps dtype and shape when it is multiplied by the factors."""
    values = [value_of(factor.node) for factor in weights.factors]
    tensors = [value for value in values if isinstance(value, Tensor)]
    dtype = value_of(q.node).dtype
    return all(is_plain(value) and (value.dim() == 0 or value.dtype == dtype) for value in tensors)


def _fills_fit(weights: Weights, q: Operand, k: Operand) -> bool:
    """Whether the fills give weight 0: -inf does; a low number, alone, does if every row has a visible key."""
    if all(hidden.fill == -math.inf for hidden in weights.hidden):
        return True
    first, *others = weights.hidden
    if others or weights.biases or not first.fill <= HIDES:
        return False
    rows, columns = q.shape[-2], k.shape[-2]
    fact = prove_mask(first.mask, rows, columns, hidden=first.when)
    return fact is not None and (fact.window is None or same_size(rows, columns))


def _in_graph_order(node: fx.Node, nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Sort nodes as they stand in the graph; `node` is the last."""
    wanted, ordered, cursor = set(nodes), [node], node
    while wanted:
        cursor = cursor.prev
        if cursor in wanted:
            wanted.discard(cursor)
            ordered.append(cursor)
    return tuple(reversed(ordered))


def _fuse(match: _Match) -> Normalized:
    node, before = match.node, match.node.prev
    rank = len(match.q.shape)
    q, k, v = (operand.place(node) for operand in (match.q, match.k, match.v))
    for factor in match.weights.factors:
        q = insert(node, factor.op, q, factor.node)
    mask = None if match.causal else _mask(node, match.weights)
    if mask is not None and value_of(mask).dim() % 2:
        mask = insert(node, "unsqueeze", mask, 0)
    if rank == 3:
        q, k, v = (insert(node, "unsqueeze", operand, 0) for operand in (q, k, v))
    site = _sdpa(match, (q, k, v), mask)
    out = insert(node, "contiguous", site) if match.copy == "before" else site
    out = insert(node, "squeeze", out, 0) if rank == 3 else out
    out = out if match.order is None else insert(node, "permute", out, match.order)
    out = insert(node, "contiguous", out) if match.copy == "after" else out
    node.replace_all_uses_with(out)
    return Normalized(site, ((node, out),), nodes_between(before, node), match.matched)


def _mask(node: fx.Node, weights: Weights) -> fx.Node | None:
    """Make one mask for SDPA: bool if all are, else their sum with -inf where something is hidden."""
    biases, hidden = weights.biases, weights.hidden
    if not biases and len(hidden) == 1 and not hidden[0].when:
        return hidden[0].mask
    bias = _fold(node, "add", biases)
    hides = _fold(node, "logical_or", [h.mask if h.when else insert(node, "logical_not", h.mask) for h in hidden])
    if hides is None:
        return bias
    return insert(node, "logical_not", hides) if bias is None else insert(node, "masked_fill", bias, hides, -math.inf)


def _fold(node: fx.Node, op: str, operands: Sequence[fx.Node]) -> fx.Node | None:
    return functools.reduce(lambda left, right: insert(node, op, left, right), operands) if operands else None


def _sdpa(match: _Match, operands: tuple[fx.Node, ...], mask: fx.Node | None) -> fx.Node:
    node, weights = match.node, match.weights
    exported = "example_value" not in node.meta
    target = (
        torch.ops.aten.scaled_dot_product_attention.default if exported else torch._C._nn.scaled_dot_product_attention
    )
    options: dict[str, Any] = {
        "attn_mask": mask,
        "dropout_p": weights.dropout,
        "is_causal": match.causal,
        "scale": weights.scale,
    }
    with node.graph.inserting_before(node):
        site = node.graph.call_function(target, operands, options)
    value = value_of(node)
    if match.order is not None:
        value = value.permute(inverse(match.order))
    site.meta = {name: entry for name, entry in node.meta.items() if name != "tensor_meta"}
    site.meta["val" if exported else "example_value"] = value.unsqueeze(0) if len(match.q.shape) == 3 else value
    return site
