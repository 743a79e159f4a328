"""What smoothing takes from the keys, and what it takes from the lse with them."""

from __future__ import annotations

from .graph import Value


def key_mean(k: Value, *, block_q: int, causal: bool) -> Value:
    """(B, Hkv, 1, D): the mean over all tokens, or over those that the first block of queries may see."""
    return (k.slice(2, 0, block_q) if causal else k).mean(2)


def mean_scores(q: Value, k_mean: Value, scale: float) -> Value:
    """What smoothing took from every score of a row, scale * q . k_mean, (B, Hq, Sq, 1): add it to the lse."""
    grouped = q.reshape(q.size(0), k_mean.size(1), -1, q.size(3))
    taken = grouped @ k_mean.transpose(0, 1, 3, 2) * scale
    return taken.reshape(q.size(0), q.size(1), -1, 1)
