"""Quantization of q, k and v for SageAttention-style kernels, in plain aten operations that Inductor can fuse.

Whatever group of tokens shares a scale, every token carries its own copy of it, so that a kernel knows one layout only.
A scale is never zero: a group of zeros stays zeros, while NaN and infinity stay visible in the scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks.topk import block_mean
from ..checks import check_choice
from ..errors import ArgumentError

_E4M3_MAX = 448.0
_LEAST_AMAX = 1e-30

LARGEST = {8: 127, 4: 7}
"""Bits of an integer -> the largest one that is used; -128 and -8 are not."""

SMOOTH_Q_BLOCK = 128
"""Queries that share a mean."""


class Groups(NamedTuple):
    """Which tokens share a scale: token n is in group `(n // period) * lanes + n % (lanes * run) // run`.

    Args:
        period: tokens after which the pattern repeats; a multiple of lanes * run.
        lanes: groups in one period.
        run: consecutive tokens of one group.
    """

    period: int
    lanes: int = 1
    run: int = 1


GROUPS = {
    "per_block": (Groups(128), Groups(64)),
    "per_warp": (Groups(32), Groups(64)),
    "per_thread": (Groups(32, lanes=8), Groups(64, lanes=4, run=2)),
}
"""Granularity -> groups of q and of k. Per thread, they are the rows that one thread of an m16n8k32 MMA holds."""

GRANULARITIES = tuple(GROUPS)


class QuantizedQK(NamedTuple):
    """Integer q and k with what gives their scores back.

    With q' = q * q_scale + q_offset and k' = k * k_scale + k_offset, a score before the softmax scale is about
    q' . k' + q_mean_scores + q_as_given . k_mean, where an absent term is 0.

    Args:
        q: (B, Hq, Sq, D) int8, in the stride order of what was quantized.
        q_scale: (B, Hq, Sq) fp32, contiguous.
        k: (B, Hkv, Sk, D) int8, likewise.
        k_scale: (B, Hkv, Sk) fp32, contiguous.
        k_mean: (B, Hkv, 1, D) fp32, or None if k was not smoothed. Its term is the same for all keys, and is that
            of `mean_scores`.
        q_offset: (B, Hq, Sq) fp32, the middle of the range of a token's group, or None if it is taken to be 0.
        k_offset: (B, Hkv, Sk) fp32, likewise.
        q_mean_scores: (B, Hq, ceil(Sq / 128), Sk) fp32, mean of every 128 queries times k without its mean; row i of q
            takes row i // 128. None if q was not smoothed.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    k_mean: Tensor | None
    q_offset: Tensor | None = None
    k_offset: Tensor | None = None
    q_mean_scores: Tensor | None = None


def quantize_qk(
    q: Tensor,
    k: Tensor,
    *,
    granularity: str,
    smooth_k: bool,
    bits: int = 8,
    smooth_q: bool = False,
    asymmetric: bool = False,
) -> QuantizedQK:
    """Quantize q: (B, Hq, Sq, D) and k: (B, Hkv, Sk, D), fp32, fp16 or bf16, to integers; Sk is at least 1.

    Args:
        q: queries.
        k: keys.
        granularity: "per_block" (128 rows of q, 64 of k), "per_warp" (32, 64) or "per_thread" (4 of q, 16 of k).
        smooth_k: quantize k minus its mean over tokens (fp32). It shifts a row of scores by a constant, which softmax
            ignores and the lse does not: see `mean_scores`.
        bits: 8 (-127 ... 127) or 4 (-7 ... 7, stored as int8).
        smooth_q: quantize q minus the mean of its block of 128 tokens; the mean's scores are kept in fp32.
        asymmetric: quantize what is left minus the middle of its group's range, so that the integers span lowest ...
            highest instead of -amax ... amax: see `offset_terms`.

    Raises:
        ArgumentError: on another granularity or number of bits.

    Papers: https://arxiv.org/abs/2410.02367 (smooth_k, per block), https://arxiv.org/abs/2411.10958 (the rest).
    """
    check_choice("quantize_qk", "granularity", granularity, GRANULARITIES)
    if bits not in LARGEST:
        raise ArgumentError("quantize_qk", "bits", "be 8 or 4", bits)
    k, k_mean = without_mean(k) if smooth_k else (k.float(), None)
    q, q_mean_scores = _without_block_means(q, k) if smooth_q else (q.float(), None)
    q_groups, k_groups = GROUPS[granularity]
    q, q_offset = _centred(q, q_groups) if asymmetric else (q, None)
    k, k_offset = _centred(k, k_groups) if asymmetric else (k, None)
    integers = *quantize_int8(q, q_groups, LARGEST[bits]), *quantize_int8(k, k_groups, LARGEST[bits])
    return QuantizedQK(*integers, k_mean, q_offset, k_offset, q_mean_scores)


def quantize_int8(x: Tensor, groups: Groups, largest: int = LARGEST[8]) -> tuple[Tensor, Tensor]:
    """Round x: (B, H, S, D), half to even, to int8; also returns the scale of every token, (B, H, S) fp32.

    A scale is the amax of its group / `largest`; a last group that is not full has the amax of the tokens it has.
    """
    x = x.float()
    scale = _group_amax(x.abs().amax(dim=-1), groups).clamp_min(_LEAST_AMAX) / largest
    return torch.round(x / scale.unsqueeze(-1)).to(torch.int8), scale


def without_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x: (B, H, S, D) minus its mean over tokens, and the mean, (B, H, 1, D); both fp32. S is at least 1."""
    x = x.float()
    mean = x.mean(dim=-2, keepdim=True)
    return x - mean, mean


def quantize_v_fp8(v: Tensor) -> tuple[Tensor, Tensor]:
    """Round v: (B, Hkv, Sk, D) to float8_e4m3fn; also returns the scale of every channel, (B, Hkv, D) fp32.

    A scale is the amax of its channel over the tokens / 448. Sk is at least 1.
    """
    v = v.float()
    scale = v.abs().amax(dim=-2, keepdim=True).clamp_min(_LEAST_AMAX) / _E4M3_MAX
    return (v / scale).to(torch.float8_e4m3fn), scale.squeeze(-2)


def mean_scores(q: Tensor, k_mean: Tensor, scale: float) -> Tensor:
    """Return what smoothing took from every score of a row, scale * q . k_mean, (B, Hq, Sq) fp32: add it to the lse.

    q: (B, Hq, Sq, D) as given, not quantized; k_mean: (B, Hkv, 1, D).
    """
    grouped = q.float().unflatten(1, (k_mean.shape[1], -1))
    taken: Tensor = scale * (grouped * k_mean.unsqueeze(2)).sum(dim=-1)
    return taken.flatten(1, 2)


def offset_terms(qk: QuantizedQK) -> tuple[Tensor, Tensor] | None:
    """Return what offsets add to the integers' scores, as left: (B, Hq, Sq, 2) and right: (B, Hkv, 2, Sk), both fp32.

    With the sums over channels Q = sum(q_int) and K = sum(k_int),
    q' . k' = q_scale k_scale (q_int . k_int)  +  (q_scale Q) k_offset  +  q_offset (k_scale K + D k_offset),
    so the last two terms are left @ right. None if there are no offsets.
    """
    if qk.q_offset is None or qk.k_offset is None:
        return None
    q_sum = qk.q_scale * qk.q.sum(dim=-1)
    k_sum = qk.k_scale * qk.k.sum(dim=-1) + qk.k.shape[-1] * qk.k_offset
    return torch.stack([q_sum, qk.q_offset], dim=-1), torch.stack([qk.k_offset, k_sum], dim=-2)


def _without_block_means(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return q minus the mean of its block of tokens, like q in fp32, and that mean times k: (B, Hq, nq, Sk) fp32."""
    means = block_mean(q, SMOOTH_Q_BLOCK)
    grouped = means.unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k.unsqueeze(2).mT).flatten(1, 2)
    return q.float() - means.repeat_interleave(SMOOTH_Q_BLOCK, dim=2)[:, :, : q.shape[2]], scores


def _centred(x: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return fp32 x: (B, H, S, D) minus the middle of the range of its group, and that middle, (B, H, S)."""
    highest, lowest = _group_amax(x.amax(dim=-1), groups), -_group_amax(-x.amin(dim=-1), groups)
    middle = lowest + (highest - lowest) / 2
    return x - middle.unsqueeze(-1), middle


def _group_amax(token_amax: Tensor, groups: Groups) -> Tensor:
    """Give every token the largest value of its group: (B, H, S) to (B, H, S)."""
    if groups.period == 1:
        return token_amax
    tokens = token_amax.shape[-1]
    # Two periods or more, and some padding, whatever S: a size that is 1, or a padding that is 0, for some S only would
    # compile a graph again. Nothing is split by a number of periods or cut to S: a trace for any S could not prove that
    # it fits.
    periods = tokens // groups.period + 2
    padded = torch.nn.functional.pad(token_amax, (0, periods * groups.period - tokens), value=-torch.inf)
    rows = groups.period // (groups.lanes * groups.run)
    members = padded.unfold(-1, groups.period, groups.period).unflatten(-1, (rows, groups.lanes, groups.run))
    token = torch.arange(tokens, device=token_amax.device)
    group = token // groups.period * groups.lanes + token % (groups.lanes * groups.run) // groups.run
    amax: Tensor = members.amax(dim=(-3, -1)).flatten(-2)
    return amax.index_select(-1, group)
