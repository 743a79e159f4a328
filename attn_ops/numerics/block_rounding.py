"""Rounding of q, k and v for block-sparse kernels: an INT8 scale per block of q and of k, FP8 scales per channel of v.

With `causal`, no rounding lets a row see what comes after its own block of queries: k has a scale per token, its mean
is that of the first block of queries, and the scale of a channel of v only grows, from one block of keys to the next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .quantize import Groups, quantize_int8

_E4M3_MAX = 448.0
_LEAST_AMAX = 1e-30


class RoundedQK(NamedTuple):
    """INT8 q and k with scales: q is about `q * q_scale[..., None]`, k is about `k * k_scale[..., None] + k_mean`.

    q: (B, Hq, Sq, D) int8; q_scale: (B, Hq, Sq) fp32, contiguous; k: (B, Hkv, Sk, D) int8; k_scale: (B, Hkv, Sk) fp32,
    contiguous; k_mean: (B, Hkv, 1, D) fp32, or None if k was not smoothed.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    k_mean: Tensor | None

    def numbers(self) -> tuple[Tensor, Tensor]:
        """What the integers stand for, fp32: q, and k without its mean."""
        return self.q * self.q_scale.unsqueeze(-1), self.k * self.k_scale.unsqueeze(-1)


def key_mean(k: Tensor, *, block_q: int, causal: bool) -> Tensor:
    """The vector that smoothing takes from every key: (B, Hkv, Sk, D) to (B, Hkv, 1, D) fp32; Sk is at least 1.

    The mean over all tokens, or with `causal` over those that the first block of queries may see.
    """
    return (k[:, :, :block_q] if causal else k).mean(dim=-2, keepdim=True, dtype=torch.float32)


def round_qk(q: Tensor, k: Tensor, *, block_q: int, block_k: int, smooth_k: bool, causal: bool) -> RoundedQK:
    """Round q: (B, Hq, Sq, D) and k: (B, Hkv, Sk, D), fp32, fp16 or bf16, to INT8; Sk is at least 1.

    A scale is the amax of its block / 127; with `causal`, of its token in k.
    """
    mean = key_mean(k, block_q=block_q, causal=causal) if smooth_k else None
    k = k.float() if mean is None else k.float() - mean
    return RoundedQK(*quantize_int8(q, Groups(block_q)), *quantize_int8(k, Groups(1 if causal else block_k)), mean)


def round_v_fp8(v: Tensor, *, block_k: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Round v: (B, Hkv, Sk, D) to float8_e4m3fn; also returns the scales, (B, Hkv, nk, D) fp32; Sk is at least 1.

    Keys of block j stand for `v8 * scale[:, :, j]`. A scale is the amax of its channel / 448: over all tokens, or with
    `causal` over those of blocks 0 ... j. It is never zero.
    """
    v = v.float()
    padded = torch.nn.functional.pad(v, (0, 0, 0, -v.shape[2] % block_k))
    amax = padded.unflatten(2, (-1, block_k)).abs().amax(dim=3).clamp_min(_LEAST_AMAX)
    amax = amax.cummax(dim=2).values if causal else amax.amax(dim=2, keepdim=True).expand_as(amax)
    scale = amax / _E4M3_MAX
    per_token = scale.repeat_interleave(block_k, dim=2)[:, :, : v.shape[2]]
    return (v / per_token).to(torch.float8_e4m3fn), scale
