"""Which chunks every query chooses in VMoBA: `attn_ops.blocks.chunk_choice` in standard operators."""

from __future__ import annotations

from typing import NamedTuple

from ...attn_ops.blocks.chunk_choice import ChunkRule
from .graph import BOOL, DOUBLE, FLOAT, INT64, Value

_INF = float("inf")
_LEAST_RANGE = 1e-6


class _Group(NamedTuple):
    """Gates that compete, (groups, n) FLOAT, and which of them are a query's own chunk, (groups, n) BOOL."""

    gates: Value
    own: Value


def choose_chunks(gates: Value, own: Value, rule: ChunkRule, chunks: int) -> Value:
    """(B, Hq, S, C) BOOL: the chunks of every query, its own among them; gates (B, Hq, S, C), own (S, C) BOOL."""
    shape = [gates.size(axis) for axis in range(4)]
    wide = own.expand(*shape)
    if rule.takes_all:
        return wide | ~wide
    outside = [axis for axis in range(4) if axis not in rule.inside]
    order = [*outside, *rule.inside]
    apart = [x.transpose(*order) for x in (gates, wide)]
    size = gates.graph.constant([1])
    for axis in rule.inside:
        size = size * shape[axis]
    group = _Group(*(x.reshape(-1, size) for x in apart))
    chosen = _most(group, rule, size // chunks) if rule.select == "topk" else _enough(group, rule)
    back = [order.index(axis) for axis in range(4)]
    return chosen.reshape(*(shape[axis] for axis in order)).transpose(*back) | wide


def _most(group: _Group, rule: ChunkRule, queries: Value) -> Value:
    """The topk best entries for every query of a group, own chunks first."""
    graph = group.gates.graph
    keep = (queries * rule.topk).at_most(group.gates.size(1))
    _, best = graph.ops("TopK", 2, graph.where(group.own, _INF, group.gates), keep, axis=1)
    return _marked(best, best * 0 + 1, group.own)


def _enough(group: _Group, rule: ChunkRule) -> Value:
    """The best entries of a group that, with the own ones, hold `threshold` of its weight."""
    gates, own = group
    graph, n = gates.graph, gates.size(1)
    low, span = gates.min(1), gates.max(1) - gates.min(1)
    weight = (gates - low) / graph.where(span > _LEAST_RANGE, span, 1.0)
    total = weight.sum(1) + _LEAST_RANGE
    need = ((weight * own.cast(FLOAT)).sum(1) / total * -1.0 + rule.threshold).at_least(0.0)
    ordered, best = graph.ops("TopK", 2, graph.where(own, 0.0 if rule.compat else -1.0, weight), n, axis=1)
    sums = graph.op("CumSum", ordered.at_least(0.0).cast(DOUBLE), 1).cast(FLOAT) / total
    short = (sums < need).cast(INT64).sum(1)  # entries before the one that reaches the threshold
    if rule.compat and rule.threshold_type in ("query_head", "block"):
        until = graph.where(short < n, short, (n - 1).at_most(1))
    else:
        until = short
    picked = (graph.numbers(n) <= until).cast(INT64)
    return _marked(best, picked, own)


def _marked(places: Value, marks: Value, like: Value) -> Value:
    """BOOL like `like`: the marks at their places."""
    return like.graph.op("ScatterElements", like.cast(INT64) * 0, places, marks, axis=1).cast(BOOL)
