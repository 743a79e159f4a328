"""sparse_linear_attention: exact attention to the best blocks, and a projected linear attention for the rest."""

from __future__ import annotations

from typing import Any

from .attend import Lists, attend, blocks_of
from .graph import DOUBLE, FLOAT, INT64, Graph, Value
from .selection import block_mean, block_scores, decimal, mask_of, top_blocks

_EPSILON, _LEAST = 1e-5, 1e-20


def sparse_linear_attention(
    _graph: Graph, given: dict[str, Value], *, block_q: int, block_k: int, scale: float, **how: Any
) -> tuple[Value, Value]:
    """Body of `sparse_linear_attention`."""
    lists = critical_blocks(given, block_q=block_q, block_k=block_k, keep_ratio=how["keep_ratio"])
    out, lse = attend(given["q"], given["k"], given["v"], lists, scale=scale)
    return with_linear_branch(out, given, lists, how), lse


def critical_blocks(given: dict[str, Value], *, block_q: int, block_k: int, keep_ratio: float) -> Lists:
    """`SlaMethod.critical_blocks`, in fp32."""
    q, k, ratios = given["q"], given["k"], given.get("keep_ratios")
    scores = block_scores(block_mean(q, block_q), block_mean(k, block_k) - k.mean(2))
    ratio = q.graph.double(keep_ratio) if ratios is None else decimal(ratios)
    keep = (scores.size(3).cast(DOUBLE) * ratio.reshape(1, -1, 1, 1)).cast(INT64)
    index, count = top_blocks(scores, keep)
    return Lists(index, None if ratios is None else count, block_q, block_k)


def with_linear_branch(out: Value, given: dict[str, Value], lists: Lists, how: dict[str, Any]) -> Value:
    """`out` plus the projected linear attention, if there is a projection."""
    weight, bias = given.get("weight"), given.get("bias")
    if weight is None:
        return out
    q, k, v = (given[name] for name in ("q", "k", "v"))
    phi_q, phi_k = (_phi(x, how["feature_map"]) for x in (q, k))
    one = v.graph.concat(v, v.slice(3, 0, 1) * 0.0 + 1.0, axis=3)  # (v, 1): numerator and denominator in one product
    branch = _of_all(phi_q, phi_k, one) if how["variant"] == "all" else _of_others(phi_q, phi_k, one, lists)
    dim = v.size(3)
    total = branch.slice(3, dim, dim + 1) + (_EPSILON if how["variant"] == "all" else 0.0)
    projected = branch.slice(3, 0, dim) / total.at_least(_LEAST) @ weight.transpose(1, 0)
    return out + projected if bias is None else out + projected + bias


def _phi(x: Value, feature_map: str) -> Value:
    graph = x.graph
    if feature_map == "softmax":
        return graph.op("Softmax", x, axis=3)
    relu = graph.op("Relu", x)
    return relu + graph.op("Exp", x.at_most(0.0)) if feature_map == "elu" else relu


def _of_all(phi_q: Value, phi_k: Value, values: Value) -> Value:
    """phi(q) @ sum(phi(k) values.T) over all tokens, (B, Hq, S, D + 1)."""
    states = phi_k.transpose(0, 1, 3, 2) @ values
    grouped = phi_q.reshape(phi_q.size(0), phi_k.size(1), -1, phi_q.size(3))
    return (grouped @ states).reshape(phi_q.size(0), phi_q.size(1), -1, values.size(3))


def _of_others(phi_q: Value, phi_k: Value, values: Value, lists: Lists) -> Value:
    """The same over the tokens of the blocks that are not listed for a block of queries."""
    batch, heads, kv_heads, seq = phi_q.size(0), phi_q.size(1), phi_k.size(1), phi_q.size(2)
    keys = blocks_of(phi_k, lists.block_k)
    states = keys.transpose(0, 1, 2, 4, 3) @ blocks_of(values, lists.block_k)  # (B, Hkv, nk, D, D + 1)
    nk, rows, columns = states.size(2), states.size(3), states.size(4)
    count = lists.index.size(3).reshape(1, 1, 1) if lists.count is None else lists.count
    others = (~mask_of(lists.index, count, nk)).cast(FLOAT).reshape(batch, kv_heads, -1, nk)
    read = (others @ states.reshape(batch, kv_heads, nk, -1)).reshape(batch, heads, -1, rows, columns)
    return (blocks_of(phi_q, lists.block_q) @ read).reshape(batch, heads, -1, columns).slice(2, 0, seq)
