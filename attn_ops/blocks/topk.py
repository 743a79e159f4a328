"""Block means, exact top-k, and the choice of key blocks they make: for every method that scores blocks.

All are deterministic and wait for no device. Ties go to the lower index, so that every implementation agrees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from .block_index import lists_of


def block_mean(x: Tensor, block: int) -> Tensor:
    """Mean of every block of tokens, (B, H, S, D) to (B, H, ceil(S / block), D) fp32.

    A short last block is divided by the tokens it has.

    Raises:
        ArgumentError: if block is not at least 1.
    """
    if block < 1:
        raise ArgumentError("block_mean", "block", "be at least 1", block)
    whole = x.shape[2] // block * block
    blocks = x[:, :, :whole].reshape(*x.shape[:2], whole // block, block, x.shape[3])
    means = blocks.mean(dim=3, dtype=torch.float32)
    if whole == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole:].mean(dim=2, keepdim=True, dtype=torch.float32)], dim=2)


def top_k_blocks(scores: Tensor, keep: int | Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `keep` blocks of the highest score in every row, exactly: score descending, then index ascending.

    Args:
        scores: (..., n) floating point. NaN ranks highest, so that it reaches the output instead of vanishing.
        keep: blocks to keep per row, at least 1: a number, or a tensor broadcastable to (...).
        allowed: bool, broadcastable to scores: the candidates. A row with fewer of them than `keep` keeps them all.

    Returns:
        index: (..., n) int32, kept blocks in ascending order, 0 after the count.
        count: (...) int32.

    Raises:
        ArgumentError: if `keep` is a number below 1.
    """
    if isinstance(keep, int) and keep < 1:
        raise ArgumentError("top_k_blocks", "keep", "be at least 1", keep)
    n = scores.shape[-1]
    scores = scores.masked_fill(scores.isnan(), torch.inf)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if isinstance(keep, int):
        wanted = torch.full((), min(keep, n), device=scores.device)
        last = scores.topk(min(keep, n), dim=-1).values[..., -1:]
    else:
        wanted = keep.clamp(1, n).expand(scores.shape[:-1]).unsqueeze(-1).long()
        last = scores.sort(dim=-1, descending=True).values.gather(-1, wanted - 1)
    above = scores > last
    ties = scores == last
    if allowed is not None:
        ties &= allowed
    kept = above | (ties & (ties.cumsum(dim=-1) <= wanted - above.sum(dim=-1, keepdim=True)))
    return lists_of(kept)


def choose_blocks(
    q: Tensor, k: Tensor, *, keep_ratio: float, block_q: int, block_k: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """The key blocks of the highest mean(q block) . mean(k block), as lists.

    Args:
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Sk, D); query head h reads head h // (Hq / Hkv).
        keep_ratio: fraction of the candidates to keep, 0 ... 1, rounded half up, at least one block.
        block_q: tokens per block of queries.
        block_k: tokens per block of keys.
        causal: candidates are the blocks not wholly in the future; those that hold a row's own tokens are always kept.

    Returns:
        index: (B, Hq, nq, nk) int32, ascending, 0 after the count.
        count: (B, Hq, nq) int32.
    """
    scores = pooled_scores(q, k, block_q=block_q, block_k=block_k)
    nk = scores.shape[-1]
    if not causal:
        return top_k_blocks(scores, max(1, int(keep_ratio * nk + 0.5)))
    visible, own = causal_blocks(q.shape[2], nk, block_q=block_q, block_k=block_k, device=q.device)
    keep = (keep_ratio * visible.sum(dim=-1).double() + 0.5).floor().long().clamp(min=1)
    return top_k_blocks(scores.masked_fill(own, torch.inf), torch.maximum(keep, own.sum(dim=-1)), visible)


def pooled_scores(q: Tensor, k: Tensor, *, block_q: int, block_k: int) -> Tensor:
    """mean(q block) . mean(k block) in fp32, (B, Hq, nq, nk), of q: (B, Hq, Sq, D) and k: (B, Hkv, Sk, D)."""
    mean_q, mean_k = block_mean(q, block_q), block_mean(k, block_k)
    (batch, kv_heads, _, dim), nq = mean_k.shape, mean_q.shape[2]
    grouped = mean_q.reshape(batch, kv_heads, -1, nq, dim)
    return (grouped @ mean_k.unsqueeze(2).mT).flatten(1, 2)


def causal_blocks(seq_q: int, nk: int, *, block_q: int, block_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of nk key blocks are not wholly in the future of a block of queries, and which hold its own tokens.

    Returns visible and own, (nq, nk) bool; own blocks are visible. Token i of the queries is token i of the keys.
    """
    first = torch.arange(-(-seq_q // block_q), device=device).unsqueeze(-1) * block_q
    last = (first + block_q).clamp(max=seq_q) - 1
    block = torch.arange(nk, device=device)
    visible = block <= last // block_k
    return visible, visible & (block >= first // block_k)
