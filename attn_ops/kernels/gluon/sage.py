"""SageAttention for Hopper (sm_90): quantization as defined in `numerics`, then the kernel of `quantized`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...layout import empty_result
from ...numerics.quantize import mean_scores, quantize_qk, quantize_v_fp8
from .quantized import Operands, attend, channels_of_tokens

_BLOCK_Q = 128


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,  # noqa: ARG001  (its why_not refuses it)
    scale: float,
    pv: str,
    smooth_v: bool,  # noqa: ARG001  (likewise)
    overlapped: bool = False,
    **qk_options: Any,
) -> tuple[Tensor, Tensor]:
    """Quantized attention of every query to every key.

    Args:
        q: (B, Hq, Sq, D) fp16 or bf16, D 64 or 128, unit stride on D.
        k: (B, Hkv, Sk, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        causal: False.
        scale: factor on the scores.
        pv: "fp16": weights and v in FP16; "fp8": in e4m3, v with a scale per channel.
        smooth_v: False.
        overlapped: see `schedules`.
        qk_options: those of `quantize_qk`, without smooth_q and asymmetric.

    Returns:
        out: like q.
        lse: (B, Hq, Sq) fp32, natural logarithm, of the scores with k's mean.
    """
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    if scale < 0:
        q, scale = -q, -scale
    qk = quantize_qk(q, k, **qk_options)
    values = (v.to(torch.float16), None) if pv == "fp16" else _fp8(v)
    given = Operands(qk.q, qk.q_scale, qk.k, qk.k_scale, *values)
    out, lse = attend(given, torch.empty_like(q), None, block_q=_BLOCK_Q, scale=scale, overlapped=overlapped)
    return out, lse if qk.k_mean is None else lse + mean_scores(q, qk.k_mean, scale)


overlapped_attention = functools.partial(attention, overlapped=True)


def _fp8(v: Tensor) -> tuple[Tensor, Tensor]:
    v, scale = quantize_v_fp8(v)
    return channels_of_tokens(v), scale
