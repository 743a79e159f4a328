"""Attention of blocks of queries to lists of key blocks: what most bodies end in.

A Scan takes one block of queries after another. It gathers the key blocks of its list, as many as the longest list of
any head has there, so neither the matrix of scores nor all gathered keys are ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .graph import FLOAT, INT64, Graph, Value

_LOWEST = -3.0e38  # below every score, and finite: exp(-inf - lowest) is 0
_LEAST = 1e-30


@dataclass(frozen=True)
class Lists:
    """Key blocks of every block of queries.

    Args:
        index: (B or 1, Hq or 1, nq, width) INT64, any order; what follows the count is ignored.
        count: (B or 1, Hq or 1, nq) INT64; None if every list is as long as it can be.
        block_q: tokens of a block of queries.
        block_k: tokens of a block of keys.
        sizes: (nk,) INT64, valid keys of every block, the first ones; None for all.
        causal: query i sees keys 0 ... i of its blocks.
    """

    index: Value
    count: Value | None
    block_q: int
    block_k: int
    sizes: Value | None = None
    causal: bool = False


@dataclass(frozen=True)
class Rounding:
    """What a quantized method does between the products.

    Args:
        weights: rounds exp(scores - max), (B, Hq, block_q, keys), whose sum is taken before.
        scores: changes the scores of the gathered blocks, (B, Hq, block_q, width, block_k), given the count
            (B, Hq, 1) of the lists, which must ascend then.
    """

    weights: Callable[[Value], Value] | None = None
    scores: Callable[[Value, Value], Value] | None = None


def attend(
    q: Value, k: Value, v: Value, lists: Lists, *, scale: float, rounding: Rounding | None = None
) -> tuple[Value, Value]:
    """Attention of q: (B, Hq, Sq, D) to listed blocks of k: (B, Hkv, Sk, D) and v: (B, Hkv, Sk, Dv), all FLOAT.

    Returns out: (B, Hq, Sq, Dv) and lse: (B, Hq, Sq, 1), both FLOAT; 0 and -inf for a query that sees no key.
    """
    keys, values = (blocks_of(x, lists.block_k) for x in (k, v))
    step = _Step(lists, keys, values, (q.size(2), k.size(2)), scale, rounding or Rounding())
    return tokens_of(step.scan(blocks_of(q, lists.block_q)), q)


def blocks_of(x: Value, block: int) -> Value:
    """(B, H, S, D) as (B, H, n, block, D), the last block padded with zeros."""
    graph = x.graph
    tail = (graph.constant([block]) - x.size(2) % block) % block
    padded = graph.op("Pad", x, graph.concat([0, 0, 0, 0, 0, 0], tail, [0], axis=0))
    return padded.reshape(x.size(0), x.size(1), -1, block, x.size(3))


def tokens_of(results: tuple[Value, Value], q: Value) -> tuple[Value, Value]:
    """Blocks of results, (nq, B, H, block_q, D) each, as (B, Hq, Sq, D)."""
    out, lse = (
        x.transpose(1, 2, 0, 3, 4).reshape(q.size(0), q.size(1), -1, x.size(4)).slice(2, 0, q.size(2)) for x in results
    )
    return out, lse


def spread(x: Value, block: int, seq: Value) -> Value:
    """(B, H, n, D), one row per block of tokens, as (B, H, S, D): every token gets the row of its block."""
    wide = x.unsqueeze(3).expand(1, 1, 1, block, 1)
    return wide.reshape(x.size(0), x.size(1), -1, x.size(3)).slice(2, 0, seq)


def softmax_of(scores: Value, values: Value, rounding: Rounding) -> tuple[Value, Value]:
    """Weighted values and logarithm of the denominator, of scores (B, H, rows, keys) that may be -inf."""
    graph = scores.graph
    largest = scores.max(3).at_least(_LOWEST)
    weights = graph.op("Exp", scores - largest)
    total = weights.sum(3)
    if rounding.weights is not None:
        weights = rounding.weights(weights)
    return (weights @ values) / total.at_least(_LEAST), graph.op("Log", total) + largest


class _Step:
    """One block of queries at a time."""

    def __init__(
        self, lists: Lists, keys: Value, values: Value, tokens: tuple[Value, Value], scale: float, rounding: Rounding
    ) -> None:
        self.lists, self.scale, self.rounding = lists, scale, rounding
        self.seq_q, self.seq_k = tokens
        self.kv_heads, self.nk = keys.size(1), keys.size(2)
        self.keys, self.values = (x.reshape(-1, lists.block_k, x.size(4)) for x in (keys, values))

    def scan(self, rows: Value) -> tuple[Value, Value]:
        """rows: (B, Hq, nq, block_q, D). Returns out (nq, B, Hq, block_q, D) and lse (nq, B, Hq, block_q, 1)."""
        graph, lists = rows.graph, self.lists
        batch, heads = rows.size(0), rows.size(1)
        kv_head = graph.numbers(heads) // (heads // self.kv_heads)
        first = (graph.numbers(batch).unsqueeze(1) * self.kv_heads + kv_head) * self.nk  # (B, Hq)
        given = [rows, lists.index.expand(batch, heads, 1, 1), graph.numbers(rows.size(2))]
        axes = [2, 2, 0]
        body = graph.inner()
        row, index, number = body.declare(FLOAT, 4), body.declare(INT64, 3), body.declare(INT64, 0)
        count = None
        if lists.count is not None:
            given, axes = [*given, lists.count.expand(batch, heads, rows.size(2))], [*axes, 2]
            count = body.declare(INT64, 2).unsqueeze(2)
            index = index.slice(2, 0, count.max(0, 1, 2, keep=False).at_least(1).reshape(1))
            index = body.where(body.numbers(index.size(2)) < count, index, 0)  # what follows the count may be anything
        out, lse = self._attend(body, row, index, number, count, body.constant(first.unsqueeze(2)))
        body.outputs = [out.name, lse.name]
        out, lse = graph.ops("Scan", 2, *given, body=body, num_scan_inputs=len(given), scan_input_axes=axes)
        return out, lse

    def _attend(
        self, body: Graph, row: Value, index: Value, number: Value, count: Value | None, first: Value
    ) -> tuple[Value, Value]:
        """row: (B, Hq, block_q, D), index: (B, Hq, width), count: (B, Hq, 1), first: (B, Hq, 1)."""
        batch, heads = row.size(0), row.size(1)
        keys, values = (
            gathered.reshape(batch, heads, -1, gathered.size(4))
            for gathered in (body.constant(x).take(first + index, axis=0) for x in (self.keys, self.values))
        )
        scores = (row * self.scale) @ keys.transpose(0, 1, 3, 2) + self._bias(body, index, number, count)
        if self.rounding.scores is not None and count is not None:
            apart = scores.reshape(batch, heads, self.lists.block_q, -1, self.lists.block_k)
            scores = self.rounding.scores(apart, count).reshape(batch, heads, self.lists.block_q, -1)
        return softmax_of(scores, values, self.rounding)

    def _bias(self, body: Graph, index: Value, number: Value, count: Value | None) -> Value:
        """0 where a key of the gathered blocks may be seen, else -inf: (B, Hq, 1 or block_q, width * block_k)."""
        lists, inside = self.lists, body.numbers(self.lists.block_k)
        token = index.unsqueeze(3) * lists.block_k + inside  # (B, Hq, width, block_k)
        seen = token < self.seq_k
        if lists.sizes is not None:
            seen = seen & (inside < body.constant(lists.sizes).take(index, axis=0).unsqueeze(3))
        if count is not None:
            seen = seen & (body.numbers(index.size(2)) < count).unsqueeze(3)
        seen, token = (x.reshape(index.size(0), index.size(1), 1, -1) for x in (seen, token))
        query = (body.numbers(lists.block_q) + number * lists.block_q).unsqueeze(1)
        if lists.causal:
            seen = seen & (token <= query)
        if self.rounding.scores is not None:
            seen = seen & (query < self.seq_q)  # padding may not decide about a block
        return body.where(seen, 0.0, float("-inf"))
