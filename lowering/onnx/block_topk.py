"""block_topk_attention: the blocks with the highest mean score."""

from __future__ import annotations

from typing import Any

from .attend import Lists, attend
from .graph import DOUBLE, Graph, Value
from .selection import block_mean, block_scores, causal_blocks, counted, decimal, rounded, top_blocks


def block_topk_attention(
    graph: Graph,
    given: dict[str, Value],
    *,
    keep_ratio: float,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    **_: Any,
) -> tuple[Value, Value]:
    """Body of `block_topk_attention`."""
    q, k = given["q"], given["k"]
    scores = block_scores(block_mean(q, block_q), block_mean(k, block_k))
    ratio, nk, visible = _ratio(graph, given.get("keep_ratios"), keep_ratio), scores.size(3), None
    if causal:
        visible, own = causal_blocks(graph, q.size(2), nk, block_q, block_k)
        scores = graph.where(own, float("inf"), scores)
        keep = rounded(counted(visible, 1).cast(DOUBLE) * ratio).at_least(counted(own, 1))
    else:
        keep = rounded(nk.cast(DOUBLE) * ratio)
    index, count = top_blocks(scores, keep, visible)
    fixed = not causal and "keep_ratios" not in given
    lists = Lists(index, None if fixed else count, block_q, block_k, causal=causal)
    return attend(q, k, given["v"], lists, scale=scale)


def _ratio(graph: Graph, ratios: Value | None, ratio: float) -> Value:
    """DOUBLE, broadcastable to (B, Hq, nq, 1)."""
    return graph.double(ratio).reshape(1, 1, 1, 1) if ratios is None else decimal(ratios).reshape(1, -1, 1, 1)
