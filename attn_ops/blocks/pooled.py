"""Scores of blocks by the means of their tokens, and the choice of key blocks that they make.

Deterministic, without host synchronization: scores are fp32 whatever the inputs are, and ties go to the lower number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .by_device import block_mean, top_k_blocks
from .topk import decimal


def choose_blocks(
    q: Tensor, k: Tensor, *, keep_ratio: float | Tensor, block_q: int, block_k: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """The key blocks of the highest mean(q block) . mean(k block), as lists.

    Args:
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Sk, D); query head h reads head h // (Hq / Hkv).
        keep_ratio: fraction of the candidates to keep, 0 ... 1, rounded half up, at least one block; or a tensor of
            it, () or (Hq,).
        block_q: tokens per block of queries.
        block_k: tokens per block of keys.
        causal: candidates are the blocks not wholly in the future; those that hold a row's own tokens are always kept.

    Returns:
        index: (B, Hq, nq, nk) int32, ascending, 0 after the count.
        count: (B, Hq, nq) int32.
    """
    mean_q, mean_k = block_mean(q, block_q), block_mean(k, block_k)
    return choose_by_means(
        mean_q, mean_k, keep_ratio=keep_ratio, seq_q=q.shape[2], block_q=block_q, block_k=block_k, causal=causal
    )


def choose_by_means(
    mean_q: Tensor,
    mean_k: Tensor,
    *,
    keep_ratio: float | Tensor,
    seq_q: int,
    first_row: int = 0,
    block_q: int,
    block_k: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """`choose_blocks` by the means of the blocks, for the rows of mean_q: (B, Hq, rows, D), which start at first_row.

    mean_k: (B, Hkv, nk, D) has all key blocks, seq_q is that of the whole sequence.
    """
    scores = scores_of_means(mean_q, mean_k)
    nk = scores.shape[-1]
    if isinstance(keep_ratio, Tensor):
        keep_ratio = decimal(keep_ratio).reshape(-1, 1)
    if not causal:
        whole = keep_ratio * nk + 0.5
        return top_k_blocks(scores, whole.long() if isinstance(whole, Tensor) else max(1, int(whole)))
    visible, own = (
        blocks.narrow(0, first_row, mean_q.shape[2])
        for blocks in causal_blocks(seq_q, nk, block_q=block_q, block_k=block_k, device=mean_q.device)
    )
    keep = (keep_ratio * visible.sum(dim=-1).double() + 0.5).floor().long().clamp(min=1)
    return top_k_blocks(scores.masked_fill(own, torch.inf), torch.maximum(keep, own.sum(dim=-1)), visible)


def pooled_scores(q: Tensor, k: Tensor, *, block_q: int, block_k: int) -> Tensor:
    """mean(q block) . mean(k block) in fp32, (B, Hq, nq, nk), of q: (B, Hq, Sq, D) and k: (B, Hkv, Sk, D)."""
    return scores_of_means(block_mean(q, block_q), block_mean(k, block_k))


def scores_of_means(mean_q: Tensor, mean_k: Tensor) -> Tensor:
    """mean_q . mean_k, (B, Hq, nq, nk), of mean_q: (B, Hq, nq, D) and mean_k: (B, Hkv, nk, D)."""
    (batch, kv_heads, _, dim), nq = mean_k.shape, mean_q.shape[2]
    grouped = mean_q.reshape(batch, kv_heads, mean_q.shape[1] // kv_heads, nq, dim)
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
