"""SpargeAttention for Hopper (sm_90): operands rounded by `triton.quantize`, the kernel of `quantized` over lists."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...layout import empty_result
from ...numerics.quantize import Groups, mean_scores
from ..triton.quantize import Rounding, round_operands
from .quantized import Operands, attend


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    *,
    block_q: int,
    block_k: int,
    pv: str,
    smooth_k: bool,
    pv_threshold: Tensor | None,  # noqa: ARG001  (its why_not refuses it)
    causal: bool,  # noqa: ARG001  (likewise)
    scale: float,
    overlapped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantized attention of every block of queries to its listed blocks of keys.

    Args:
        q: (B, Hq, Sq, D) fp16 or bf16, D 64 or 128, unit stride on D.
        k: (B, Hkv, Sk, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        block_index: (B or 1, Hq or 1, nq, max_blocks) int32.
        block_count: (B or 1, Hq or 1, nq) int32.
        block_q: tokens of a block of queries, a multiple of 64.
        block_k: tokens of a block of keys, 64.
        pv: "fp16": weights and v in FP16; "fp8": in e4m3, v with a scale per channel.
        smooth_k: subtract k's mean before it is rounded, as `round_qk` does.
        pv_threshold: None.
        causal: False.
        scale: factor on the scores.
        overlapped: see `schedules`.

    Returns:
        out: like q; 0 in a row with no key.
        lse: (B, Hq, Sq) fp32, natural logarithm, of the scores with k's mean; -inf in a row with no key.
    """
    if q.numel() == 0 or k.numel() == 0 or block_index.shape[-1] == 0:
        return empty_result(q)
    if scale < 0:
        q, scale = -q, -scale
    if block_index.stride(-1) != 1:
        block_index = block_index.contiguous()
    x = round_operands(q, k, v, Rounding(Groups(block_q), Groups(block_k), pv, smooth_k=smooth_k))
    lists = block_index, block_count
    out, lse = attend(Operands.of(x), torch.empty_like(q), lists, block_q=block_q, scale=scale, overlapped=overlapped)
    return out, lse if x.k_mean is None else lse + mean_scores(q, x.k_mean, scale)


overlapped_attention = functools.partial(attention, overlapped=True)
