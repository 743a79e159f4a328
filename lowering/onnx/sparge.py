"""sparge_attention and sparge_block_map: blocks predicted by number or by mass, attention to them rounded."""

from __future__ import annotations

import math
from typing import Any

from .attend import Lists, Rounding, attend
from .graph import FLOAT, INT64, Graph, Value
from .key_mean import key_mean, mean_scores
from .rounding import round_integers, round_values, round_values_causally, round_weights, running_max
from .selection import (
    block_mean,
    block_scores,
    causal_blocks,
    counted,
    lists_of,
    mask_of,
    mass_count,
    per_query_head,
    self_similarity,
    top_blocks,
)

_INF = float("inf")
_LARGEST = 127


def sparge_attention(
    graph: Graph, given: dict[str, Value], *, pv: str, pv_threshold: float | None, **how: Any
) -> tuple[Value, Value]:
    """Body of `sparge_attention`."""
    q, k, v = given["q"], given["k"], given["v"]
    block_q, block_k, causal, scale = how["block_q"], how["block_k"], how["causal"], how["scale"]
    index, count = _ascending(*_kept(graph, given, how))
    mean = key_mean(k, block_q=block_q, causal=causal)
    left = round_integers(q, (block_q, 1, 1), _LARGEST)
    right = round_integers(k - mean if how["smooth_k"] else k, (1 if causal else block_k, 1, 1), _LARGEST)
    values = round_values_causally(v, block_k) if pv == "fp8" and causal else round_values(v, pv)
    threshold = _threshold(given, "pv_thresholds", pv_threshold)
    skip = None if threshold is None else lambda scores, count: _without_low(scores, count, threshold)
    lists = Lists(index, count, block_q, block_k, causal=causal)
    rounding = Rounding(weights=round_weights(pv), scores=skip)
    out, lse = attend(left, right, values, lists, scale=scale, rounding=rounding)
    return out, lse + mean_scores(q, mean, scale) if how["smooth_k"] else lse


def sparge_block_map(graph: Graph, given: dict[str, Value], **how: Any) -> tuple[Value, Value]:
    """Body of `sparge_block_map`: index (B, Hq, nq, nk) and count (B, Hq, nq), INT64."""
    return _ascending(*_kept(graph, given, how))


def _ascending(index: Value, count: Value, nk: Value) -> tuple[Value, Value]:
    return lists_of(mask_of(index, count, nk))


def _kept(graph: Graph, given: dict[str, Value], how: dict[str, Any]) -> tuple[Value, Value, Value]:
    """The blocks kept, best first, their number, and how many blocks there are: `selection.select_blocks`."""
    q, k, block_q, block_k, causal = given["q"], given["k"], how["block_q"], how["block_k"], how["causal"]
    if how["smooth_k"]:
        k = k - key_mean(k, block_q=block_q, causal=causal)
    scores = block_scores(block_mean(q, block_q), block_mean(k, block_k)) * how["scale"]
    nk = scores.size(3)
    forced = scores >= _INF
    visible = graph.numbers(nk) >= 0
    if causal:
        visible, own = causal_blocks(graph, q.size(2), nk, block_q, block_k)
        forced = forced | own
    if how["sink"]:
        forced = forced | (graph.numbers(nk) <= 0)
    similarity = _threshold(given, "similarities", how["similarity"] if how["similarity"] > 0 else None)
    if similarity is not None:
        alike = per_query_head(self_similarity(k, block_k), q.size(1)).transpose(0, 1, 3, 2)
        forced = forced | (alike < similarity)
    forced = forced & visible
    kept = counted(forced, 3)
    mass = _threshold(given, "masses", how["mass"])
    if mass is None:
        ratio = _threshold(given, "keep_ratios", how["keep_ratio"])
        wanted = counted(visible, -1).cast(FLOAT) * ratio + 0.5
        kept = kept.at_least(wanted.cast(INT64))
    else:
        kept = kept + mass_count(scores, mass, visible & ~forced)
    if similarity is not None:
        kept = graph.where(self_similarity(q, block_q) < similarity, nk, kept)
    index, count = top_blocks(graph.where(forced, _INF, scores), kept, visible)
    return index, count, nk


def _threshold(given: dict[str, Value], tensor: str, number: float | None) -> Value | None:
    """The tensor if it is given, else the number, as FLOAT that broadcasts to (B, Hq, nq, 1); None for none."""
    if tensor in given:
        return given[tensor].reshape(1, -1, 1, 1)
    return None if number is None else given["q"].graph.constant(float(number)).reshape(1, 1, 1, 1)


def _without_low(scores: Value, count: Value, threshold: Value) -> Value:
    """The second stage: -inf in blocks far below the highest score before them. Scores (B, Hq, block_q, width, bk)."""
    graph = scores.graph
    highest = scores.max(4, keep=False)
    past = running_max(highest, 3)
    before = graph.concat(past.slice(3, 0, 1).at_most(-_INF), past.slice(3, 0, -1), axis=3)
    margin = graph.where(highest <= -_INF, -_INF, highest - before).max(2) / math.log(2)  # (B, Hq, 1, width)
    left = count.unsqueeze(3) - graph.numbers(highest.size(3)) - 1
    skipped = (left >= 2) & ((margin + threshold) <= 0.0)
    return graph.where(skipped.unsqueeze(4), -_INF, scores)
