"""sage_sparse_linear_attention, defined: SLA whose sparse part has rounded operands.

s = scale * q' @ k'.T on the chosen blocks        q', k': INT8 with a scale per block, as numbers; k without its mean
p = exp(s - max(s)),  l = sum(p)                  fp32; l from p before rounding
o_s = fp16(p) @ fp16(v) / l                       pv="fp16"
o_s = e4m3(448 p) @ e4m3(v / v_scale) * v_scale / 448 / l    pv="fp8", v_scale per channel
lse = max(s) + log(l) + scale * q @ k_mean.T
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..blocks.sla_method import SlaMethod
from ..heads import per_query_head
from ..layout import empty_result, like_query
from ..numerics.block_rounding import round_qk
from ..numerics.quantize import quantize_v_fp8
from .sla import chosen_tokens, linear_attention

_E4M3_MAX = 448.0


def sage_sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    how: SlaMethod,
    *,
    pv: str,
    smooth_k: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, S, D), k, v: (B, Hkv, S, D), weight: (D, D), bias: (D,). Returns out like q, lse (B, Hq, S)."""
    if q.numel() == 0:
        return empty_result(q)
    chosen = chosen_tokens(q, k, how)
    rounded = round_qk(q, k, block_q=how.block_q, block_k=how.block_k, smooth_k=smooth_k, causal=False)
    q_, k_ = rounded.numbers()
    scores = (scale * (q_ @ per_query_head(k_, q.shape[1]).mT)).masked_fill(~chosen, -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - largest)
    total = weights.sum(dim=-1, keepdim=True)
    lse = (largest + total.log()).squeeze(-1)
    if rounded.k_mean is not None:
        lse = lse + scale * (q.float() @ per_query_head(rounded.k_mean, q.shape[1]).mT).squeeze(-1)
    out = _weighted_values(weights, v, pv) / total
    if weight is not None:
        features = linear_attention(q, k, v, chosen, how)
        out = out + linear(features, weight.float(), None if bias is None else bias.float())
    return like_query(out, q), lse


def _weighted_values(weights: Tensor, v: Tensor, pv: str) -> Tensor:
    """weights: (B, Hq, S, S) fp32 in 0 ... 1. Returns (B, Hq, S, D) fp32."""
    heads = weights.shape[1]
    if pv == "fp16":
        return weights.half().float() @ per_query_head(v.half().float(), heads)
    v8, scale = quantize_v_fp8(v)
    p8 = (_E4M3_MAX * weights).to(torch.float8_e4m3fn)
    return p8.float() @ per_query_head(v8.float() * scale.unsqueeze(-2), heads) / _E4M3_MAX
