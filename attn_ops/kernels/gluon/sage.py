"""SageAttention for Hopper (sm_90): q, k and v rounded by `triton.quantize`, then the kernel of `quantized`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...layout import empty_result
from ...numerics.quantize import GROUPS, LARGEST, mean_scores
from ..triton.quantize import Rounding, round_operands
from .quantized import Operands, attend

_BLOCK_Q = 128


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,  # noqa: ARG001  (its why_not refuses it)
    scale: float,
    pv: str,
    granularity: str,
    smooth_k: bool,
    bits: int = 8,
    smooth_q: bool = False,  # noqa: ARG001  (likewise)
    smooth_v: bool = False,  # noqa: ARG001
    asymmetric: bool = False,  # noqa: ARG001
    overlapped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantized attention of every query to every key.

    Args:
        q: (B, Hq, Sq, D) fp16 or bf16, D 64 or 128, unit stride on D.
        k: (B, Hkv, Sk, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        causal: False.
        scale: factor on the scores.
        pv: "fp16": weights and v in FP16; "fp8": in e4m3, v with a scale per channel.
        granularity: rows that share a scale, as in `quantize_qk`.
        smooth_k: round k without its mean over tokens.
        bits: 8 or 4.
        smooth_q, smooth_v, asymmetric: False.
        overlapped: see `schedules`.

    Returns:
        out: like q.
        lse: (B, Hq, Sq) fp32, natural logarithm, of the scores with k's mean.
    """
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    if scale < 0:
        q, scale = -q, -scale
    x = round_operands(q, k, v, Rounding(*GROUPS[granularity], pv, LARGEST[bits], smooth_k=smooth_k))
    out, lse = attend(Operands.of(x), torch.empty_like(q), None, block_q=_BLOCK_Q, scale=scale, overlapped=overlapped)
    return out, lse if x.k_mean is None else lse + mean_scores(q, x.k_mean, scale)


overlapped_attention = functools.partial(attention, overlapped=True)
