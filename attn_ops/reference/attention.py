"""Attention over the keys that a mask allows: the definition that every exact and sparse method reduces to.

s = scale * q @ k.T        where allowed, else -inf
lse = logsumexp(s)         natural logarithm; -inf for a row with no key
out = exp(s - lse) @ v     0 for a row with no key
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import per_kv_head, per_query_head


def token_mask(
    seq_q: int, seq_k: int, *, causal: bool = False, window: int | None = None, device: torch.device | None = None
) -> Tensor:
    """(Sq, Sk) bool: query i sees key j if j <= i (causal, top-left) and j > i - window (with a window)."""
    i = torch.arange(seq_q, device=device)[:, None]
    j = torch.arange(seq_k, device=device)[None, :]
    allowed = torch.ones(seq_q, seq_k, dtype=torch.bool, device=device)
    if causal:
        allowed &= j <= i
    if window is not None:
        allowed &= j > i - window
    return allowed


def masked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, Sq, D) to k, v: (B, Hkv, Sk, D) where `allowed`, broadcastable to (B, Hq, Sq, Sk).

    Computes in fp64 for fp64 inputs, else in fp32. Returns out in q's dtype and lse in the computing dtype.
    """
    compute = _compute_dtype(q)
    scores = _scores(q.to(compute), per_query_head(k.to(compute), q.shape[1]), allowed, scale)
    lse = scores.logsumexp(dim=-1)
    weights = _weights(scores, lse)
    return (weights @ per_query_head(v.to(compute), q.shape[1])).to(q.dtype), lse


def masked_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    _out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_attention`, written out (Dao 2023, "FlashAttention-2", algorithm 2, and the term of lse).

    delta = sum(grad_out * out) is computed as sum(weights * grad_weights): out may have been rounded to a half.
    """
    compute = _compute_dtype(q)
    q_, grad_out, lse = q.to(compute), grad_out.to(compute), lse.to(compute)
    k_, v_ = per_query_head(k.to(compute), q.shape[1]), per_query_head(v.to(compute), q.shape[1])
    weights, grad_weights = _weights(_scores(q_, k_, allowed, scale), lse), grad_out @ v_.mT
    delta = (weights * grad_weights).sum(dim=-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(compute)
    grad_scores = weights * (grad_weights - delta.unsqueeze(-1))
    grad_q = scale * grad_scores @ k_
    grad_k = per_kv_head(scale * grad_scores.mT @ q_, k.shape[1])
    grad_v = per_kv_head(weights.mT @ grad_out, v.shape[1])
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _scores(q: Tensor, k: Tensor, allowed: Tensor, scale: float) -> Tensor:
    return (scale * (q @ k.mT)).masked_fill(~allowed, -torch.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in a row with no key."""
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    return torch.exp(scores - finite.unsqueeze(-1))
