"""Grouped heads: query head h reads key and value head h // (Hq / Hkv)."""

from __future__ import annotations

from torch import Tensor


def per_query_head(kv: Tensor, heads: int) -> Tensor:
    """Repeat the heads of k or v, (B, Hkv, S, D), to (B, heads, S, D)."""
    groups = heads // kv.shape[1]
    return kv if groups == 1 else kv.repeat_interleave(groups, dim=1)


def per_kv_head(grad: Tensor, kv_heads: int) -> Tensor:
    """Sum the gradients of repeated heads, (B, Hq, S, D) to (B, kv_heads, S, D)."""
    return grad if grad.shape[1] == kv_heads else grad.unflatten(1, (kv_heads, -1)).sum(dim=2)
