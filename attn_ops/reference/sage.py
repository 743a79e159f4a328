"""Sage attention, quantizing and quantized, defined: integer scores, and numerators rounded as the hardware does.

s = scale * (q' @ k'.T + mean(q block) @ (k - k_mean).T)    q', k': the integers as numbers, `QuantizedQK`
p = exp(s - max(s)),  l = sum(p)                            fp32; l from p before rounding
out = fp16(p) @ fp16(v - v_mean) / l + v_mean               pv="fp16"
out = e4m3(448 p) @ e4m3((v - v_mean) / v_scale) * v_scale / 448 / l + v_mean    pv="fp8", v_scale per channel
lse = max(s) + log(l) + scale * q @ k_mean.T                true lse: what smoothing K took from a row is given back
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..heads import per_query_head
from ..layout import empty_result, like_query
from ..numerics.quantize import SMOOTH_Q_BLOCK, QuantizedQK, quantize_qk, quantize_v_fp8, without_mean
from .attention import token_mask

_E4M3_MAX = 448.0


def sage_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float,
    pv: str,
    smooth_v: bool = False,
    **qk_options: Any,
) -> tuple[Tensor, Tensor]:
    """Quantized attention of q: (B, Hq, Sq, D) to k, v: (B, Hkv, Sk, D); `qk_options` are those of `quantize_qk`.

    Returns out like q and lse (B, Hq, Sq).
    """
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    qk = quantize_qk(q, k, **qk_options)
    out, lse = _attend(qk, v, causal=causal, scale=scale, pv=pv, smooth_v=smooth_v)
    if qk.k_mean is not None:
        lse = lse + scale * (q.float() @ per_query_head(qk.k_mean, q.shape[1]).mT).squeeze(-1)
    return like_query(out, q), lse


def sage_attention_quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    *,
    causal: bool = False,
    scale: float,
    pv: str,
    smooth_v: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same from integers q: (B, Hq, Sq, D) and k: (B, Hkv, Sk, D) and a scale per token; lse is of their scores.

    Returns out like q in v's dtype and lse (B, Hq, Sq).
    """
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q, v.dtype)
    qk = QuantizedQK(q, q_scale, k, k_scale, None)
    out, lse = _attend(qk, v, causal=causal, scale=scale, pv=pv, smooth_v=smooth_v)
    return like_query(out, q, v.dtype), lse


def _attend(
    qk: QuantizedQK, v: Tensor, *, causal: bool, scale: float, pv: str, smooth_v: bool
) -> tuple[Tensor, Tensor]:
    """Out: (B, Hq, Sq, D) and lse: (B, Hq, Sq), fp32, without the term of k's mean."""
    scores = scale * _scores(qk)
    allowed = token_mask(qk.q.shape[2], qk.k.shape[2], causal=causal, device=v.device)
    scores = scores.masked_fill(~allowed, -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - largest)
    total = weights.sum(dim=-1, keepdim=True)
    v, v_mean = without_mean(v) if smooth_v else (v, None)
    out = _weighted_values(weights, v, pv) / total
    if v_mean is not None:
        out = out + per_query_head(v_mean, qk.q.shape[1])
    return out, (largest + total.log()).squeeze(-1)


def _scores(qk: QuantizedQK) -> Tensor:
    """(B, Hq, Sq, Sk) fp32, before the softmax scale and without the term of k's mean."""
    q, k = _numbers(qk.q, qk.q_scale, qk.q_offset), _numbers(qk.k, qk.k_scale, qk.k_offset)
    scores = (q @ per_query_head(k, q.shape[1]).mT).float()
    if qk.q_mean_scores is not None:
        scores = scores + qk.q_mean_scores.repeat_interleave(SMOOTH_Q_BLOCK, dim=2)[:, :, : q.shape[2]]
    return scores


def _numbers(integers: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """In fp64, where sums of integers times scales are as good as exact."""
    numbers = integers.double() * scale.unsqueeze(-1)
    return numbers if offset is None else numbers + offset.unsqueeze(-1)


def _weighted_values(weights: Tensor, v: Tensor, pv: str) -> Tensor:
    """weights: (B, Hq, Sq, Sk) fp32 in 0 ... 1. Returns (B, Hq, Sq, D) fp32."""
    heads = weights.shape[1]
    if pv == "fp16":
        return weights.half().float() @ per_query_head(v.half().float(), heads)
    v8, v_scale = quantize_v_fp8(v)
    p8 = (_E4M3_MAX * weights).to(torch.float8_e4m3fn)
    product = p8.float() @ per_query_head(v8.float(), heads)
    return product * per_query_head(v_scale, heads).unsqueeze(-2) / _E4M3_MAX
