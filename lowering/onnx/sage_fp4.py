"""sage_fp4_attention: NVFP4 emulated, as in its reference."""

from __future__ import annotations

from typing import Any

from .attend import Rounding, spread
from .dense import attend_all
from .graph import Graph, Value
from .key_mean import mean_scores
from .rounding import round_nvfp4, round_nvfp4_weights
from .selection import block_mean

_Q_BLOCK = 128


def sage_fp4_attention(
    graph: Graph,
    given: dict[str, Value],
    *,
    smooth_q: bool,
    smooth_k: bool,
    two_level: bool,
    causal: bool,
    scale: float,
    **_: Any,
) -> tuple[Value, Value]:
    """Body of `sage_fp4_attention`."""
    q, k, v = given["q"], given["k"], given["v"]
    k_mean = k.mean(2)
    keys = k - k_mean if smooth_k else k
    q_mean = spread(block_mean(q, _Q_BLOCK), _Q_BLOCK, q.size(2))
    left, right = round_nvfp4(q - q_mean if smooth_q else q), round_nvfp4(keys)
    if smooth_q:  # as in sage_attention
        left, right = graph.concat(left, q_mean, axis=3), graph.concat(right, keys, axis=3)
    values = round_nvfp4(v.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    rounding = Rounding(weights=round_nvfp4_weights if two_level else round_nvfp4)
    out, lse = attend_all(left, right, values, causal=causal, scale=scale, rounding=rounding)
    return out, lse + mean_scores(q, k_mean, scale) if smooth_k else lse
