"""sparge_attention, defined: choose blocks from their means, then attend to them with rounded operands.

s = scale * q' @ k'.T             where a kept block and causality allow, else -inf; q', k': INT8 as numbers
skip block j for a block of queries, if it is not among the last two kept, and in every row, in powers of two,
      max(s in j) + pv_threshold <= max(s in kept blocks before j): its s become -inf too
p = exp(s - max(s)),  l = sum(p)  l from p before rounding
out = round(p) @ v' / l           round and v': fp16, or e4m3 with a scale per channel
lse = max(s) + log(l) + scale * q @ k_mean.T
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..blocks.selection import Selection, Threshold
from ..heads import per_query_head
from ..layout import empty_result, like_query
from ..numerics.block_rounding import key_mean, round_qk, round_v_fp8
from .attention import token_mask

_E4M3_MAX = 448.0


def sparge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    how: Selection,
    pv_threshold: Threshold | None,
    pv: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, Sq, D) to the chosen blocks of k, v: (B, Hkv, Sk, D). Returns out, lse (B, Hq, Sq)."""
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    kept = chosen_blocks(q, k, how=how, scale=scale)
    rows = kept.repeat_interleave(how.block_q, dim=2)[:, :, : q.shape[2]]
    allowed = rows.repeat_interleave(how.block_k, dim=3)[..., : k.shape[2]]
    allowed = allowed & token_mask(q.shape[2], k.shape[2], causal=how.causal, device=q.device)

    operands = round_qk(q, k, block_q=how.block_q, block_k=how.block_k, smooth_k=how.smooth_k, causal=how.causal)
    q_, k_ = operands.numbers()
    scores = (scale * (q_ @ per_query_head(k_, q.shape[1]).mT)).masked_fill(~allowed, -torch.inf)
    if pv_threshold is not None:
        skipped = skipped_blocks(scores, kept, how, torch.as_tensor(pv_threshold, device=q.device))
        scores = scores.masked_fill(skipped, -torch.inf)

    largest = scores.amax(dim=-1, keepdim=True)
    finite = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = torch.exp(scores - finite)
    total = weights.sum(dim=-1, keepdim=True)
    lse = (finite + total.log()).squeeze(-1)
    if operands.k_mean is not None:
        lse = lse + scale * (q.float() @ per_query_head(operands.k_mean, q.shape[1]).mT).squeeze(-1)
    out = _weighted_values(weights, v, pv, how) / total.masked_fill(total == 0, 1.0)
    return like_query(out, q), lse


def chosen_blocks(q: Tensor, k: Tensor, *, how: Selection, scale: float) -> Tensor:
    """(B, Hq, nq, nk) bool, True where a block of queries keeps a block of keys; fp64, one row at a time."""
    heads = q.shape[1]
    smoothed = k.double() - key_mean(k, block_q=how.block_q, causal=how.causal).double() if how.smooth_k else k.double()
    queries = torch.split(q.double(), how.block_q, dim=2)
    keys = torch.split(per_query_head(smoothed, heads), how.block_k, dim=2)
    no_mass: Threshold = 0.0
    keep_ratio, mass, similarity = (
        _per_head(t, q) for t in (how.keep_ratio, no_mass if how.mass is None else how.mass, how.similarity)
    )
    chosen = torch.zeros(*q.shape[:2], len(queries), len(keys), dtype=torch.bool, device=q.device)
    for row, query in enumerate(queries):
        last_token = row * how.block_q + query.shape[2] - 1
        candidates = [j for j in range(len(keys)) if not how.causal or j * how.block_k <= last_token]
        if not candidates:
            continue
        means = torch.stack([keys[j].mean(dim=2) for j in candidates], dim=2)
        scores = scale * (means @ query.mean(dim=2).unsqueeze(-1)).squeeze(-1)
        forced = torch.stack([self_similarity(keys[j]) < similarity for j in candidates], dim=-1)
        forced |= ~(scores < torch.inf)
        for j in candidates:
            own = how.causal and (j + 1) * how.block_k > row * how.block_q
            forced[..., j] |= own or (how.sink and j == 0)
        number = (keep_ratio * len(candidates) + 0.5).floor().long().clamp(min=1)
        if how.mass is not None:
            number = forced.sum(dim=-1) + _holding(scores.masked_fill(forced, -torch.inf), mass)
        number = torch.maximum(number, forced.sum(dim=-1)).clamp(min=1)
        number = number.masked_fill(self_similarity(query) < similarity, len(candidates))
        order = scores.masked_fill(forced, torch.inf).sort(dim=-1, descending=True, stable=True).indices
        best = torch.arange(len(candidates), device=q.device) < number.unsqueeze(-1)
        chosen[:, :, row].scatter_(-1, order, best)
    return chosen


def self_similarity(block: Tensor) -> Tensor:
    """Mean cosine of all pairs of rows of a block, (B, H, n, D) to (B, H); a row of zeros has cosine 0 with every row.

    Unlike published kernels, a short last block is judged by the rows it has.
    """
    length = block.norm(dim=-1, keepdim=True)
    directions = block / length.masked_fill(length == 0, 1.0)
    mean: Tensor = (directions @ directions.mT).mean(dim=(-2, -1))
    return mean


def skipped_blocks(scores: Tensor, kept: Tensor, how: Selection, pv_threshold: Tensor) -> Tensor:
    """(B, Hq, Sq, Sk) bool, True in a kept block that the second stage skips for a block of queries.

    scores: (B, Hq, Sq, Sk), -inf where not allowed; kept: (B, Hq, nq, nk) bool; pv_threshold: () or (Hq,), in powers of
    two. A skipped block cannot raise the maximum, so that of all kept blocks before it is that of the ones not skipped.
    """
    seq_q, seq_k = scores.shape[2:]
    pad = 0, -seq_k % how.block_k, 0, -seq_q % how.block_q
    blocks = torch.nn.functional.pad(scores, pad, value=-torch.inf)
    blocks = blocks.unflatten(3, (-1, how.block_k)).unflatten(2, (-1, how.block_q))
    highest = blocks.amax(dim=-1)  # (B, Hq, nq, block_q, nk)
    before = torch.nn.functional.pad(highest.cummax(dim=-1).values[..., :-1], (1, 0), value=-torch.inf)
    margin = torch.where(highest == -torch.inf, -torch.inf, highest - before).amax(dim=3) / math.log(2)
    not_among_last_two = kept.sum(dim=-1, keepdim=True) - kept.cumsum(dim=-1) >= 2
    skipped = kept & not_among_last_two & (margin + pv_threshold.reshape(-1, 1, 1) <= 0)
    rows = skipped.repeat_interleave(how.block_q, dim=2)[:, :, :seq_q]
    return rows.repeat_interleave(how.block_k, dim=3)[..., :seq_k]


def _holding(scores: Tensor, mass: Tensor) -> Tensor:
    """The fewest of the highest scores (B, H, n) whose softmax weights reach `mass` (Hq,) or (): (B, H)."""
    weights = scores.softmax(dim=-1).nan_to_num(0.0).sort(dim=-1, descending=True).values
    before = weights.cumsum(dim=-1) - weights
    number = ((before < mass.unsqueeze(-1)) & (weights > 0)).sum(dim=-1)
    return torch.where(mass >= 1, (scores > -torch.inf).sum(dim=-1), number)


def _per_head(threshold: Threshold, q: Tensor) -> Tensor:
    return torch.as_tensor(threshold, dtype=torch.float32, device=q.device)


def _weighted_values(weights: Tensor, v: Tensor, pv: str, how: Selection) -> Tensor:
    """weights: (B, Hq, Sq, Sk) fp32 in 0 ... 1. Returns (B, Hq, Sq, D) fp32."""
    heads = weights.shape[1]
    if pv == "fp16":
        return weights.half().float() @ per_query_head(v.half().float(), heads)
    v8, scale = round_v_fp8(v, block_k=how.block_k, causal=how.causal)
    values = v8.float() * scale.repeat_interleave(how.block_k, dim=2)[:, :, : v.shape[2]]
    p8 = (_E4M3_MAX * weights).to(torch.float8_e4m3fn)
    return p8.float() @ per_query_head(values, heads) / _E4M3_MAX
