"""sage_attention, defined: INT8 scores, and a softmax whose numerators are rounded as the hardware rounds them.

s = scale * (q_int8 @ k_int8.T) * q_scale * k_scale    per token; integers are exact in fp32
p = exp(s - max(s)),  l = sum(p)                       fp32; l from p before rounding
out = fp16(p) @ fp16(v) / l                            pv="fp16"
out = e4m3(448 p) @ e4m3(v / v_scale) * v_scale / 448 / l    pv="fp8", v_scale per channel
lse = max(s) + log(l) + scale * q @ k_mean.T           true lse: what smoothing K took from a row is given back
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import per_query_head
from ..layout import empty_result, like_query
from ..quantize import quantize_qk, quantize_v_fp8
from .attention import token_mask

_E4M3_MAX = 448.0


def sage_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float, qk_quant: str, pv: str, smooth_k: bool
) -> tuple[Tensor, Tensor]:
    """Quantized attention of q: (B, Hq, Sq, D) to k, v: (B, Hkv, Sk, D). Returns out like q and lse (B, Hq, Sq)."""
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    heads = q.shape[1]
    int8 = quantize_qk(q, k, granularity=qk_quant, smooth_k=smooth_k)
    scores = int8.q.float() @ per_query_head(int8.k.float(), heads).mT
    scores = scale * scores * int8.q_scale.unsqueeze(-1) * per_query_head(int8.k_scale, heads).unsqueeze(-2)
    allowed = token_mask(q.shape[2], k.shape[2], causal=causal, device=q.device)
    scores = scores.masked_fill(~allowed, -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - largest)
    total = weights.sum(dim=-1, keepdim=True)
    lse = (largest + total.log()).squeeze(-1)
    if int8.k_mean is not None:
        lse = lse + scale * (q.float() @ per_query_head(int8.k_mean, heads).mT).squeeze(-1)
    return like_query(_weighted_values(weights, v, pv) / total, q), lse


def _weighted_values(weights: Tensor, v: Tensor, pv: str) -> Tensor:
    """weights: (B, Hq, Sq, Sk) fp32 in 0 ... 1. Returns (B, Hq, Sq, D) fp32."""
    heads = weights.shape[1]
    if pv == "fp16":
        return weights.half().float() @ per_query_head(v.half().float(), heads)
    v8, v_scale = quantize_v_fp8(v)
    p8 = (_E4M3_MAX * weights).to(torch.float8_e4m3fn)
    product = p8.float() @ per_query_head(v8.float(), heads)
    return product * per_query_head(v_scale, heads).unsqueeze(-2) / _E4M3_MAX
