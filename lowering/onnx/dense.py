"""Attention to every key, or those of a causal band, one block of queries at a time.

For what the operator Attention has not: an lse, a window, a rounding between its products.
"""

from __future__ import annotations

from .attend import Rounding, blocks_of, softmax_of, tokens_of
from .graph import FLOAT, INT64, Graph, Value

_BLOCK = 64


def attend_all(
    q: Value,
    k: Value,
    v: Value,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    rounding: Rounding | None = None,
) -> tuple[Value, Value]:
    """Attention of q: (B, Hq, Sq, D) to k: (B, Hkv, Sk, D) and v: (B, Hkv, Sk, Dv), all FLOAT.

    Returns out: (B, Hq, Sq, Dv) and lse: (B, Hq, Sq, 1), both FLOAT.
    """
    graph = q.graph
    rows = blocks_of(q, _BLOCK)
    body = graph.inner()
    row, number = body.declare(FLOAT, 4), body.declare(INT64, 0)
    keys, values, bias = body.constant(k), body.constant(v), None
    if causal:
        first = (number * _BLOCK).reshape(1)
        start = first * 0 if window is None else (first - (window - 1)).at_least(0)
        keys, values = (x.slice(2, start, first + _BLOCK) for x in (keys, values))
        bias = _band(body, first, start, keys.size(2), window)
    grouped = (row * scale).reshape(row.size(0), keys.size(1), -1, row.size(3))
    scores = grouped @ keys.transpose(0, 1, 3, 2)
    if bias is not None:
        scores = scores.reshape(row.size(0), row.size(1), _BLOCK, -1) + bias
        scores = scores.reshape(row.size(0), keys.size(1), -1, keys.size(2))
    results = softmax_of(scores, values, rounding or Rounding())
    body.outputs = [x.reshape(row.size(0), row.size(1), _BLOCK, x.size(3)).name for x in results]
    given = rows, graph.numbers(rows.size(2))
    out, lse = graph.ops("Scan", 2, *given, body=body, num_scan_inputs=2, scan_input_axes=[2, 0])
    return tokens_of((out, lse), q)


def _band(body: Graph, first: Value, start: Value, keys: Value, window: int | None) -> Value:
    """0 where a query of the block sees a key of the slice, else -inf: (block, keys)."""
    query = (body.numbers(_BLOCK) + first).unsqueeze(1)
    key = body.numbers(keys) + start
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    return body.where(seen, 0.0, float("-inf"))
