"""Which key blocks a block of queries keeps, in standard operators: means, scores, and the best of them.

The same choice as `attn_ops.blocks` makes, ties to the lower number included: TopK promises that.
"""

from __future__ import annotations

from .attend import blocks_of
from .graph import BOOL, DOUBLE, FLOAT, INT64, Graph, Value

_INF = float("inf")
_DECIMALS = 1e6
_UNITS_OF_MASS = 2.0**40


def blocks(seq: Value, block: int) -> Value:
    """(1,) INT64: ceil(seq / block)."""
    return (seq + (block - 1)) // block


def block_mean(x: Value, block: int) -> Value:
    """Mean of every block of tokens, (B, H, S, D) FLOAT to (B, H, n, D); a short last one counts what it has."""
    graph, seq = x.graph, x.size(2)
    number = graph.numbers(blocks(seq, block))
    tokens = (seq - number * block).at_most(block).cast(FLOAT)
    return blocks_of(x, block).sum(3, keep=False) / tokens.unsqueeze(1)


def block_scores(mean_q: Value, mean_k: Value) -> Value:
    """(B, Hq, nq, D) times (B, Hkv, nk, D): (B, Hq, nq, nk)."""
    batch, kv_heads, nq, dim = mean_k.size(0), mean_k.size(1), mean_q.size(2), mean_q.size(3)
    grouped = mean_q.reshape(batch, kv_heads, -1, nq, dim)
    scores = grouped @ mean_k.unsqueeze(2).transpose(0, 1, 2, 4, 3)
    return scores.reshape(batch, -1, nq, mean_k.size(2))


def per_query_head(x: Value, heads: Value) -> Value:
    """(B, Hkv, M, N) as (B, Hq, M, N)."""
    batch, kv_heads, rows, columns = (x.size(axis) for axis in range(4))
    wide = x.unsqueeze(2).expand(1, 1, heads // kv_heads, 1, 1)
    return wide.reshape(batch, heads, rows, columns)


def causal_blocks(graph: Graph, seq_q: Value, nk: Value, block_q: int, block_k: int) -> tuple[Value, Value]:
    """`blocks.pooled.causal_blocks`: visible and own, (nq, nk) BOOL."""
    first = graph.numbers(blocks(seq_q, block_q)).unsqueeze(1) * block_q
    last = (first + block_q).at_most(seq_q) - 1
    block = graph.numbers(nk)
    visible = block <= last // block_k
    return visible, visible & (block >= first // block_k)


def counted(mask: Value, *axes: int) -> Value:
    """How many are true, INT64, the axes kept."""
    return mask.cast(INT64).sum(*axes)


def rounded(number: Value) -> Value:
    """A positive DOUBLE as INT64, half up."""
    return (number + number.graph.double(0.5)).cast(INT64)


def decimal(ratios: Value) -> Value:
    """FLOAT ratios as DOUBLE, rounded to six decimals: what was meant."""
    million = ratios.graph.double(_DECIMALS)
    return ratios.graph.op("Round", ratios.cast(DOUBLE) * million) / million


def top_blocks(scores: Value, keep: Value, allowed: Value | None = None) -> tuple[Value, Value]:
    """The best blocks of every row, best first; (..., longest list) INT64 and their number, broadcast to keep's shape.

    Args:
        scores: (B, H, nq, n) FLOAT.
        keep: blocks to keep, INT64, of rank 4 with 1 at the end; at least 1 are kept.
        allowed: BOOL: the candidates; a row keeps at most these.
    """
    graph = scores.graph
    keep = keep.at_least(1).at_most(scores.size(3))
    if allowed is not None:
        scores = graph.where(allowed, scores, -_INF)
        keep = keep.at_most(counted(allowed, -1))
    longest = keep.max(0, 1, 2, 3, keep=False).at_least(1).reshape(1)
    _, index = graph.ops("TopK", 2, scores, longest, axis=3)
    return index, keep.squeeze(3)


def mask_of(index: Value, count: Value, n: Value) -> Value:
    """Lists as (B, H, nq, n) BOOL; index: (B, H, nq, width), count: broadcastable to (B, H, nq)."""
    graph = index.graph
    used = graph.numbers(index.size(3)) < count.unsqueeze(3)
    target = graph.where(used, index, n)
    empty = index.slice(3, 0, 1).expand(1, 1, 1, n + 1) * 0
    ones = index * 0 + 1
    return graph.op("ScatterElements", empty, target, ones, axis=3).slice(3, 0, n).cast(BOOL)


def lists_of(mask: Value) -> tuple[Value, Value]:
    """Ascending lists of the true entries of (B, H, nq, n) BOOL: index, 0 after the count, and count, INT64."""
    graph, n = mask.graph, mask.size(3)
    order = graph.where(mask, n - graph.numbers(n), 0)
    _, index = graph.ops("TopK", 2, order, n, axis=3)
    count = counted(mask, 3)
    return graph.where(graph.numbers(n) < count, index, 0), count.squeeze(3)


def mass_count(scores: Value, mass: Value, allowed: Value) -> Value:
    """How many of the highest scores hold `mass` of the softmax over the allowed, (B, H, nq, 1) INT64."""
    graph, n = scores.graph, scores.size(3)
    weights = graph.op("Softmax", graph.where(allowed, scores, -3.0e38), axis=3)
    weights = graph.where(allowed, weights, 0.0)
    ordered, _ = graph.ops("TopK", 2, weights, n, axis=3)
    units = (ordered * _UNITS_OF_MASS).cast(INT64)
    before = graph.op("CumSum", units, 3) - units
    enough = (units > 0) & (before < (mass * _UNITS_OF_MASS).cast(INT64))
    return graph.where(mass >= 1.0, counted(allowed, 3), counted(enough, 3))


def self_similarity(x: Value, block: int) -> Value:
    """Mean cosine of all pairs of rows of a block, (B, H, S, D) to (B, H, n, 1)."""
    graph = x.graph
    length = graph.op("Sqrt", (x * x).sum(3))
    directions = x / graph.where(length > 0.0, length, 1.0)
    mean = block_mean(directions, block)
    return (mean * mean).sum(3)
