"""Quantization of q, k and v for SageAttention-style kernels, in plain aten operations that Inductor can fuse.

Whatever group of tokens shares a scale, every token carries its own copy of it, so that a kernel knows one layout only.
A scale is never zero: a group of zeros stays zeros, while NaN and infinity stay visible in the scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_choice

_INT8_MAX = 127.0
_E4M3_MAX = 448.0
_LEAST_AMAX = 1e-30


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
    """INT8 q and k with scales: q is about `q * q_scale[..., None]`, k is about `k * k_scale[..., None] + k_mean`.

    q: (B, Hq, Sq, D) int8; q_scale: (B, Hq, Sq) fp32, contiguous; k: (B, Hkv, Sk, D) int8; k_scale: (B, Hkv, Sk) fp32,
    contiguous; k_mean: (B, Hkv, 1, D) fp32, or None if k was not smoothed. q and k keep their stride order.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    k_mean: Tensor | None


def quantize_qk(q: Tensor, k: Tensor, *, granularity: str, smooth_k: bool) -> QuantizedQK:
    """Quantize q: (B, Hq, Sq, D) and k: (B, Hkv, Sk, D), fp32, fp16 or bf16, to INT8; Sk is at least 1.

    Args:
        q: queries.
        k: keys.
        granularity: "per_block" (128 rows of q, 64 of k), "per_warp" (32, 64) or "per_thread" (4 of q, 16 of k).
        smooth_k: quantize k minus its mean over tokens (fp32). It shifts a row of scores by a constant, which softmax
            ignores and the lse does not: see `mean_scores`.

    Raises:
        ArgumentError: on another granularity.

    Papers: https://arxiv.org/abs/2410.02367 (smoothing, per block), https://arxiv.org/abs/2411.10958 (per thread).
    """
    check_choice("quantize_qk", "granularity", granularity, GRANULARITIES)
    q_groups, k_groups = GROUPS[granularity]
    k = k.float()
    k_mean = k.mean(dim=-2, keepdim=True) if smooth_k else None
    return QuantizedQK(
        *quantize_int8(q, q_groups), *quantize_int8(k if k_mean is None else k - k_mean, k_groups), k_mean
    )


def quantize_int8(x: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Round x: (B, H, S, D), half to even, to int8; also returns the scale of every token, (B, H, S) fp32.

    A scale is the amax of its group / 127; a last group that is not full has the amax of the tokens it has.
    """
    x = x.float()
    scale = _group_amax(x.abs().amax(dim=-1), groups).clamp_min(_LEAST_AMAX) / _INT8_MAX
    return torch.round(x / scale.unsqueeze(-1)).to(torch.int8), scale


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


def _group_amax(token_amax: Tensor, groups: Groups) -> Tensor:
    """Give every token the largest value of its group: (B, H, S) to (B, H, S)."""
    tokens = token_amax.shape[-1]
    # Two periods or more, and some padding, whatever S: a size that is 1, or a padding that is 0, for some S only would
    # compile a graph again.
    periods = tokens // groups.period + 2
    padded = torch.nn.functional.pad(token_amax, (0, periods * groups.period - tokens))
    rows = groups.period // (groups.lanes * groups.run)
    members = padded.view(*token_amax.shape[:-1], periods, rows, groups.lanes, groups.run)
    amax = members.amax(dim=(-3, -1), keepdim=True)
    return amax.expand_as(members).reshape(padded.shape)[..., :tokens].contiguous()
