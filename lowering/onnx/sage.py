"""sage_attention: every number rounded as it would be stored; products of integers come out the same in FLOAT."""

from __future__ import annotations

from typing import Any

from ...attn_ops.numerics.quantize import GROUPS, LARGEST, SMOOTH_Q_BLOCK
from .attend import Rounding, spread
from .dense import attend_all
from .graph import Graph, Value
from .key_mean import mean_scores
from .rounding import round_integers, round_values, round_weights
from .selection import block_mean, per_query_head


def sage_attention(
    graph: Graph,
    given: dict[str, Value],
    *,
    bits: int,
    granularity: str,
    pv: str,
    smooth_q: bool,
    smooth_k: bool,
    smooth_v: bool,
    asymmetric: bool,
    causal: bool,
    scale: float,
    **_: Any,
) -> tuple[Value, Value]:
    """Body of `sage_attention`."""
    q, k, v = given["q"], given["k"], given["v"]
    k_mean = k.mean(2)
    keys = k - k_mean if smooth_k else k
    groups, largest = GROUPS[granularity], LARGEST[bits]
    q_mean = spread(block_mean(q, SMOOTH_Q_BLOCK), SMOOTH_Q_BLOCK, q.size(2))
    left = round_integers(q - q_mean if smooth_q else q, groups[0], largest, asymmetric=asymmetric)
    right = round_integers(keys, groups[1], largest, asymmetric=asymmetric)
    if smooth_q:  # one product of twice the channels: integers with integers, means with keys
        left, right = graph.concat(left, q_mean, axis=3), graph.concat(right, keys, axis=3)
    out, lse = _attend(left, right, v, pv=pv, smooth_v=smooth_v, causal=causal, scale=scale)
    return out, lse + mean_scores(q, k_mean, scale) if smooth_k else lse


def sage_attention_quantized(
    graph: Graph,  # noqa: ARG001  (the signature of a body)
    given: dict[str, Value],
    *,
    pv: str,
    smooth_v: bool,
    causal: bool,
    scale: float,
    **_: Any,
) -> tuple[Value, Value]:
    """Body of `sage_attention_quantized`; its integers come as FLOAT."""
    left, right = (given[name] * given[f"{name}_scale"].unsqueeze(3) for name in ("q", "k"))
    return _attend(left, right, given["v"], pv=pv, smooth_v=smooth_v, causal=causal, scale=scale)


def _attend(
    q: Value, k: Value, v: Value, *, pv: str, smooth_v: bool, causal: bool, scale: float
) -> tuple[Value, Value]:
    """Attention of what integers stand for, with weights and v rounded."""
    v_mean = v.mean(2)
    values = round_values(v - v_mean if smooth_v else v, pv)
    rounding = Rounding(weights=round_weights(pv))
    out, lse = attend_all(q, k, values, causal=causal, scale=scale, rounding=rounding)
    return out + per_query_head(v_mean, q.size(1)) if smooth_v else out, lse
