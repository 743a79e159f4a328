"""sage_fp4_attention, defined: what NVFP4 tensor cores would compute, with each number rounded as they store it.

s = scale * (fp4(q - q_mean) @ fp4(k - k_mean).T + q_mean @ (k - k_mean).T)    q_mean of every 128 queries
p = exp(s - max(s)),  l = sum(p)                     fp32; l from p before rounding
out = fp4(p) @ fp4(v) / l                            groups of 16 channels in q and k, of 16 tokens in p and v
lse = max(s) + log(l) + scale * q @ k_mean.T
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks.topk import block_mean
from ..heads import per_query_head
from ..layout import empty_result, like_query
from .attention import token_mask

GROUP = 16
"""Numbers that share a scale in NVFP4."""
Q_BLOCK = 128
"""Queries that share a mean."""
E2M1_MAX = 6.0
_E4M3_MAX = 448.0


def sage_fp4_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float,
    smooth_q: bool = True,
    smooth_k: bool = True,
    two_level: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, Sq, D) to k, v: (B, Hkv, Sk, D) in FP4. Returns out like q and lse (B, Hq, Sq)."""
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    heads, seq_q = q.shape[1], q.shape[2]
    queries, keys, values = q.float(), per_query_head(k.float(), heads), per_query_head(v.float(), heads)
    k_mean = keys.mean(dim=-2, keepdim=True) if smooth_k else torch.zeros_like(keys[:, :, :1])
    keys = keys - k_mean
    q_mean = torch.zeros_like(queries)
    if smooth_q:
        q_mean = block_mean(queries, Q_BLOCK).repeat_interleave(Q_BLOCK, dim=2)[:, :, :seq_q]
    scores = round_nvfp4(queries - q_mean) @ round_nvfp4(keys).mT + q_mean @ keys.mT
    allowed = token_mask(seq_q, k.shape[2], causal=causal, device=q.device)
    scores = (scale * scores).masked_fill(~allowed, -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - largest)
    total = weights.sum(dim=-1, keepdim=True)
    lse = largest + total.log() + scale * (queries @ k_mean.mT)
    rounded = round_weights(weights) if two_level else round_nvfp4(weights)
    out = rounded @ round_nvfp4(values.mT).mT / total
    return like_query(out, q), lse.squeeze(-1)


def round_nvfp4(x: Tensor) -> Tensor:
    """Round fp32 x: (..., N) to NVFP4: e2m1 numbers times an e4m3 scale, amax / 6, for every 16 along N.

    A scale saturates at 448, so numbers beyond 2688 do; where it rounds to 0, below amax 6 * 2 ** -10, so does x.
    """
    groups = _in_groups(x)
    scale = _round_e4m3(groups.abs().amax(dim=-1, keepdim=True) / E2M1_MAX)
    codes = round_e2m1(torch.where(scale == 0, 0.0, groups / scale))
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]


def round_weights(p: Tensor) -> Tensor:
    """Round weights p: (..., N) fp32, 0 ... 1, in two levels: times 448 * 6 first, so that scales fill what e4m3 holds.

    The e2m1 numbers are relative to a group's scale before that is rounded: its largest weight is always 6.
    """
    peak = _E4M3_MAX * E2M1_MAX
    groups = peak * _in_groups(p)
    scale = groups.amax(dim=-1, keepdim=True) / E2M1_MAX
    codes = round_e2m1(torch.where(scale == 0, 0.0, groups / scale))
    return (codes * _round_e4m3(scale) / peak).flatten(-2)[..., : p.shape[-1]]


def round_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to even, saturating."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (torch.round(x / step) * step).clamp(-E2M1_MAX, E2M1_MAX)


def _round_e4m3(x: Tensor) -> Tensor:
    return x.clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()


def _in_groups(x: Tensor) -> Tensor:
    """(..., N) to (..., ceil(N / 16), 16), with zeros after the end."""
    groups: Tensor = torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    return groups
