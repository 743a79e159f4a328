"""vmoba_attention: for every chunk of keys, the queries that chose it; a query's chunks are merged as they come.

Two Scans, over heads and over chunks: the products are those of the chosen pairs, and only one chunk's scores exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...attn_ops.blocks.chunk_choice import ChunkRule, chunk_tiling, own_chunks
from ...attn_ops.blocks.tiles import Tiling
from .chunk_choice import choose_chunks
from .graph import BOOL, FLOAT, INT64, Graph, Value
from .selection import block_scores
from .tiles import tile_mean, to_tiles

_OP, _CPU = "vmoba_attention", torch.device("cpu")
_LOWEST, _LEAST = -3.0e38, 1e-30


def vmoba_attention(
    graph: Graph, given: dict[str, Value], *, grid: Sequence[int], scale: float, **how: Any
) -> tuple[Value, Value]:
    """Body of `vmoba_attention`."""
    chunk = {name: how[name] for name in ("chunk", "chunk_tokens")}
    tiling = chunk_tiling(_OP, grid[0] * grid[1] * grid[2], grid=grid, **chunk)
    rule = ChunkRule(*(how[name] for name in ("select", "topk", "threshold", "threshold_type", "compat")))
    q, k, v = given["q"], to_tiles(given["k"], tiling), to_tiles(given["v"], tiling)
    gates = block_scores(q, tile_mean(k, tiling))
    chosen = choose_chunks(gates, graph.constant(own_chunks(tiling, _CPU)), rule, tiling.tiles)
    out, lse = _attend(q * scale, k, v, chosen.transpose(0, 1, 3, 2), tiling)
    shape = q.size(0), q.size(1), q.size(2), -1
    return out.reshape(*shape), lse.reshape(*shape)


def _attend(q: Value, k: Value, v: Value, chosen: Value, tiling: Tiling) -> tuple[Value, Value]:
    """q: (B, Hq, S, D); k, v: (B, Hkv, places, D); chosen: (B, Hq, C, S). Returns (B * Hq, S, D) and (B * Hq, S, 1)."""
    graph, (batch, heads) = q.graph, (q.size(0), q.size(1))
    kv_heads = k.size(1)
    kv_head = graph.numbers(heads) // (heads // kv_heads)
    kv = (graph.numbers(batch).unsqueeze(1) * kv_heads + kv_head).reshape(-1)
    keys, values = (x.reshape(-1, tiling.tiles, tiling.volume, x.size(3)) for x in (k, v))
    body = graph.inner()
    rows, mask, number = body.declare(FLOAT, 2), body.declare(BOOL, 2), body.declare(INT64, 0)
    chunks = [body.constant(x).take(number, axis=0) for x in (keys, values)]
    out, lse = _one_head(body, rows, mask, chunks, tiling)
    body.outputs = [out.name, lse.name]
    flat_q, flat_chosen = q.reshape(-1, q.size(2), q.size(3)), chosen.reshape(-1, tiling.tiles, q.size(2))
    out, lse = graph.ops("Scan", 2, flat_q, flat_chosen, kv, body=body, num_scan_inputs=3)
    return out, lse


def _one_head(graph: Graph, q: Value, chosen: Value, chunks: list[Value], tiling: Tiling) -> tuple[Value, Value]:
    """q: (S, D), chosen: (C, S), chunks of keys and values: (C, volume, D)."""
    column = q.slice(1, 0, 1) * 0.0
    start = column + _LOWEST, column, q * 0.0
    body = graph.inner()
    state = [body.declare(FLOAT, 2) for _ in start]
    keys, values, mask, size = (
        *(body.declare(FLOAT, 2) for _ in chunks), body.declare(BOOL, 1), body.declare(INT64, 0),
    )  # fmt: skip
    merged = _merge(body, state, body.constant(q), (keys, values), mask, size if not tiling.is_full else None)
    body.outputs = [value.name for value in merged]
    sizes = graph.constant(tiling.sizes(_CPU).long())
    largest, total, sums = graph.ops("Scan", 3, *start, *chunks, chosen, sizes, body=body, num_scan_inputs=4)
    return sums / total.at_least(_LEAST), graph.op("Log", total) + largest


def _merge(
    body: Graph, state: list[Value], q: Value, chunk: tuple[Value, Value], mask: Value, size: Value | None
) -> list[Value]:
    """The running maximum, denominator and sums, (S, 1), (S, 1), (S, D), after one more chunk."""
    rows = body.op("NonZero", mask).transpose(1, 0)  # (n, 1)
    place = rows.squeeze(1)
    scores = q.take(place, axis=0) @ chunk[0].transpose(1, 0)  # (n, volume)
    if size is not None:
        scores = scores + body.where(body.numbers(chunk[0].size(0)) < size, 0.0, float("-inf"))
    largest, total, sums = (x.take(place, axis=0) for x in state)
    peak = largest.at_least(scores.max(1))
    weights, fade = body.op("Exp", scores - peak), body.op("Exp", largest - peak)
    fresh = peak, total * fade + weights.sum(1), sums * fade + weights @ chunk[1]
    return [body.op("ScatterND", before, rows, now) for before, now in zip(state, fresh, strict=True)]
