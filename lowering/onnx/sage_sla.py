"""sage_sparse_linear_attention: SLA whose exact part is rounded."""

from __future__ import annotations

from typing import Any

from .attend import Rounding, attend
from .graph import Graph, Value
from .key_mean import key_mean, mean_scores
from .rounding import round_integers, round_values, round_weights
from .sla import critical_blocks, with_linear_branch

_LARGEST = 127


def sage_sparse_linear_attention(
    _graph: Graph,
    given: dict[str, Value],
    *,
    block_q: int,
    block_k: int,
    pv: str,
    smooth_k: bool,
    scale: float,
    **how: Any,
) -> tuple[Value, Value]:
    """Body of `sage_sparse_linear_attention`."""
    q, k, v = given["q"], given["k"], given["v"]
    lists = critical_blocks(given, block_q=block_q, block_k=block_k, keep_ratio=how["keep_ratio"])
    mean = key_mean(k, block_q=block_q, causal=False)
    left = round_integers(q, (block_q, 1, 1), _LARGEST)
    right = round_integers(k - mean if smooth_k else k, (block_k, 1, 1), _LARGEST)
    rounding = Rounding(weights=round_weights(pv))
    out, lse = attend(left, right, round_values(v, pv), lists, scale=scale, rounding=rounding)
    lse = lse + mean_scores(q, mean, scale) if smooth_k else lse
    return with_linear_branch(out, given, lists, how), lse
