"""block_topk_attention, defined: score every pair of blocks in fp64, keep the best, attend to their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import per_query_head
from .attention import masked_attention, masked_attention_backward, token_mask

Ratio = float | Tensor


def block_topk_attention(
    q: Tensor, k: Tensor, v: Tensor, *, keep_ratio: Ratio, block_q: int, block_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, Sq, D) to the chosen blocks of k, v: (B, Hkv, Sk, D). Returns out, lse (B, Hq, Sq)."""
    allowed = chosen_tokens(q, k, keep_ratio=keep_ratio, block_q=block_q, block_k=block_k, causal=causal)
    return masked_attention(q, k, v, allowed, scale)


def block_topk_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep_ratio: Ratio,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `block_topk_attention` with respect to q, k and v, the selection held fixed."""
    allowed = chosen_tokens(q, k, keep_ratio=keep_ratio, block_q=block_q, block_k=block_k, causal=causal)
    return masked_attention_backward(grad_out, grad_lse, out, lse, q, k, v, allowed, scale)


def chosen_tokens(q: Tensor, k: Tensor, *, keep_ratio: Ratio, block_q: int, block_k: int, causal: bool) -> Tensor:
    """(B, Hq, Sq, Sk) bool, True where a query may see a key of a chosen block."""
    blocks = chosen_blocks(q, k, keep_ratio=keep_ratio, block_q=block_q, block_k=block_k, causal=causal)
    rows = blocks.repeat_interleave(block_q, dim=2)[:, :, : q.shape[2]]
    tokens = rows.repeat_interleave(block_k, dim=3)[..., : k.shape[2]]
    return tokens & token_mask(q.shape[2], k.shape[2], causal=causal, device=q.device)


def chosen_blocks(q: Tensor, k: Tensor, *, keep_ratio: Ratio, block_q: int, block_k: int, causal: bool) -> Tensor:
    """(B, Hq, nq, nk) bool, True where a block of queries keeps a block of keys; one row at a time."""
    queries = [block.double().mean(dim=2) for block in torch.split(q, block_q, dim=2)]
    keys = [block.double().mean(dim=2) for block in torch.split(per_query_head(k, q.shape[1]), block_k, dim=2)]
    ratios = torch.as_tensor(keep_ratio, dtype=torch.float64).expand(q.shape[1]).tolist()
    chosen = torch.zeros(*q.shape[:2], len(queries), len(keys), dtype=torch.bool, device=q.device)
    for row, query in enumerate(queries):
        last_token = min((row + 1) * block_q, q.shape[2]) - 1
        candidates = [j for j in range(len(keys)) if not causal or j * block_k <= last_token]
        own = [j for j in candidates if causal and (j + 1) * block_k > row * block_q]
        scores = torch.stack([(query * keys[j]).sum(dim=-1) for j in candidates], dim=-1)
        scores[..., own] = torch.inf
        best = scores.sort(dim=-1, descending=True, stable=True).indices
        for head, ratio in enumerate(ratios):
            keep = max(1, int(round(ratio, 6) * len(candidates) + 0.5), len(own))
            chosen[:, head, row].scatter_(-1, best[:, head, :keep], True)
    return chosen
