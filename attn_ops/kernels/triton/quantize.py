"""Rounding of q, k and v in Triton, in two launches: what `numerics/quantize.py` and `block_rounding.py` define.

The first adds up tokens of k and v and finds the range of v's channels, in parts; the second rounds what it reads once.
Every number goes through the operations of the definition, each rounded as IEEE 754 says; only the order in which a
mean adds tokens is another. So the integers are those of the definition, or of a mean that differs in its last bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...errors import ArgumentError
from ...numerics.quantize import LARGEST, SMOOTH_Q_BLOCK, Groups
from .quantize_parts import E4M3_MAX, LEAST_AMAX, PARTS, sum_parts_kernel
from .quantize_round import ALIGNMENT, round_kernel, round_values_kernel
from .tiles import on_device, padded_head_dim

_ROWS = 128
_ELEMENTS_OF_A_WARP = 2048  # 64 registers of fp32
_ELEMENTS_OF_A_SUM = 2048
_WARPS_OF_A_SUM = 4
_LEAST_PART = 256  # tokens that a program adds up; fewer are not worth one


class Rounding(NamedTuple):
    """How q, k and v are rounded.

    Args:
        q_groups: queries that share a scale.
        k_groups: keys that share a scale.
        pv: "fp16" rounds v to FP16, "fp8" to e4m3 with a scale per channel.
        largest: the largest integer of q and k.
        smooth_q: round q without the mean of its block of 128 tokens.
        smooth_k: round k without the mean of its first `mean_keys` tokens.
        mean_keys: None is all of them.
        smooth_v: round v without its mean over tokens.
        growing_block: keys of a block of v, if a channel's scale is that of the blocks so far; None: that of all. Not
            with smooth_v.
    """

    q_groups: Groups
    k_groups: Groups
    pv: str
    largest: int = LARGEST[8]
    smooth_q: bool = False
    smooth_k: bool = True
    mean_keys: int | None = None
    smooth_v: bool = False
    growing_block: int | None = None


class Values(NamedTuple):
    """Rounded values.

    Args:
        v: (B, Hkv, Sk, D) fp16, or e4m3 with contiguous tokens: 8-bit tensor cores take no other order.
        v_scale: (B, Hkv, 1 or nk, D) fp32, contiguous, nk blocks if it grows; None in FP16.
        v_mean: (B, Hkv, 1, D) fp32, contiguous, or None if v was not smoothed.
    """

    v: Tensor
    v_scale: Tensor | None
    v_mean: Tensor | None


class Rounded(NamedTuple):
    """Rounded q and k, as in `QuantizedQK`, and v, as in `Values`. All but q, k and v are contiguous.

    Args:
        q: (B, Hq, Sq, D) int8.
        q_scale: (B, Hq, Sq) fp32.
        k: (B, Hkv, Sk, D) int8.
        k_scale: (B, Hkv, Sk) fp32.
        k_mean: (B, Hkv, 1, D) fp32, or None if k was not smoothed.
        q_mean_scores: (B, Hq, ceil(Sq / 128), Sk) fp32, or None if q was not smoothed.
        v, v_scale, v_mean: see `Values`.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    k_mean: Tensor | None
    q_mean_scores: Tensor | None
    v: Tensor
    v_scale: Tensor | None
    v_mean: Tensor | None


def round_operands(q: Tensor, k: Tensor, v: Tensor, how: Rounding) -> Rounded:
    """Round q: (B, Hq, Sq, D) and k, v: (B, Hkv, Sk, D), fp32, fp16 or bf16 with unit stride on D; Sk is at least 1.

    Raises:
        ArgumentError: if v is to lose the mean of all its tokens and have scales of the blocks so far.
    """
    if how.smooth_v and how.growing_block is not None:
        must = "be None with smooth_v, whose mean is that of all tokens"
        raise ArgumentError("round_operands", "growing_block", must, how.growing_block, "Choose one of them.")
    (batch, heads, seq_q, head_dim), (kv_heads, seq_k) = q.shape, k.shape[1:3]
    mean_keys = seq_k if how.mean_keys is None else min(how.mean_keys, seq_k)
    q_tile, k_tile, dim = _GroupTile.of(how.q_groups), _GroupTile.of(how.k_groups), padded_head_dim(head_dim)
    q_tiles, k_tiles = triton.cdiv(seq_q, q_tile.tokens), triton.cdiv(seq_k, k_tile.tokens)
    q8, k8 = _aligned(q, torch.int8), _aligned(k, torch.int8)
    q_scale, k_scale = (x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q, k))
    q_mean = _of_blocks(q, triton.cdiv(seq_q, SMOOTH_Q_BLOCK)) if how.smooth_q else None
    k_mean = _of_blocks(k, 1) if how.smooth_k else None
    with on_device(q):
        parts = _summarize(k, v, mean_keys, how)
        values = _room_for_values(v, parts, how)
        round_kernel[((q_tiles * heads + k_tiles * kv_heads) * batch,)](
            *(q, q.stride()[:3], q8, q8.stride(2), q_scale, q_mean),
            *(k, k.stride()[:3], k8, k8.stride(2), k_scale, k_mean, parts.k_total, parts.k_parts),
            *(v, v.stride()[:3], *values, values.v.stride(), parts.v_total, parts.v_high, parts.v_low, parts.v_parts),
            *(batch, heads, kv_heads, q_tiles, k_tiles, seq_q, seq_k, mean_keys),
            ROUNDS_VALUES=values.v is not v,
            LARGEST=how.largest,
            Q_TILE=q_tile,
            K_TILE=k_tile,
            GROWING_BLOCK=how.growing_block,
            HEAD_DIM=head_dim,
            DIM=dim,
            num_warps=_warps(max(q_tile.rows, k_tile.rows) * dim),
        )
    scores = None if q_mean is None else _mean_scores(q_mean, k, k_mean)
    return Rounded(q8, q_scale, k8, k_scale, k_mean, scores, *values)


def round_values(v: Tensor, *, pv: str, smooth_v: bool) -> Values:
    """Round v: (B, Hkv, Sk, D) alone, fp32, fp16 or bf16 with unit stride on D; Sk is at least 1."""
    (_, heads, seq, head_dim), dim, tile = v.shape, padded_head_dim(v.shape[3]), _GroupTile.of(Groups(1))
    how = Rounding(Groups(1), Groups(1), pv, smooth_k=False, smooth_v=smooth_v)
    with on_device(v):
        parts = _summarize(v, v, seq, how)
        values = _room_for_values(v, parts, how)
        if values.v is not v:
            tiles = triton.cdiv(seq, tile.tokens)
            round_values_kernel[(tiles * heads * v.shape[0],)](
                *(v, v.stride()[:3], *values, values.v.stride()),
                *(parts.v_total, parts.v_high, parts.v_low, parts.v_parts, tiles, heads, seq),
                TILE=tile,
                HEAD_DIM=head_dim,
                DIM=dim,
                num_warps=_warps(tile.rows * dim),
            )
    return values


class _GroupTile(NamedTuple):
    """Tokens that a program rounds, in steps of `rows`, and how groups lie in one of these: see `Groups`."""

    tokens: int
    rows: int
    period: int
    lanes: int
    run: int

    @staticmethod
    def of(groups: Groups) -> _GroupTile:
        """As many whole groups as fit into `_ROWS` tokens, or one group of any size."""
        if _ROWS % groups.period == 0:
            return _GroupTile(_ROWS, _ROWS, *groups)
        rows = min(int(triton.next_power_of_2(groups.period)), _ROWS)
        return _GroupTile(groups.period, rows, rows, 1, 1)


class _Parts(NamedTuple):
    """Sums and ranges of channels over parts of the tokens, (B, Hkv, parts, D) fp32; None where nobody asks."""

    k_total: Tensor | None
    k_parts: int
    v_total: Tensor | None
    v_high: Tensor | None
    v_low: Tensor | None
    v_parts: int


def _summarize(k: Tensor, v: Tensor, mean_keys: int, how: Rounding) -> _Parts:
    (batch, heads, seq, head_dim), dim, fp8 = k.shape, padded_head_dim(k.shape[3]), how.pv == "fp8"
    k_part, v_part = _part(mean_keys), how.growing_block or _part(seq)
    k_parts = triton.cdiv(mean_keys, k_part) if how.smooth_k else 0
    v_parts = triton.cdiv(seq, v_part) if how.smooth_v or fp8 else 0
    k_total = _of_blocks(k, k_parts) if how.smooth_k else None
    v_total = _of_blocks(v, v_parts) if how.smooth_v else None
    v_high, v_low = (_of_blocks(v, v_parts), _of_blocks(v, v_parts)) if fp8 else (None, None)
    if k_parts + v_parts:
        sum_parts_kernel[((k_parts + v_parts) * heads * batch,)](
            *(k, k.stride()[:3], k_total, mean_keys, k_part, k_parts),
            *(v, v.stride()[:3], v_total, v_high, v_low, seq, v_part, v_parts, batch, heads),
            ROWS=_ELEMENTS_OF_A_SUM // dim,
            HEAD_DIM=head_dim,
            DIM=dim,
            num_warps=_WARPS_OF_A_SUM,
        )
    return _Parts(k_total, k_parts, v_total, v_high, v_low, v_parts)


def _part(tokens: int) -> int:
    return max(_LEAST_PART, int(triton.cdiv(tokens, PARTS.value)))


def _mean_scores(q_mean: Tensor, k: Tensor, k_mean: Tensor | None) -> Tensor:
    """Means of queries, (B, Hq, nq, D), times k without its mean: (B, Hq, nq, Sk) fp32."""
    k = k.float() if k_mean is None else k.float() - k_mean
    scores: Tensor = q_mean.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT
    return scores.flatten(1, 2)


def _of_blocks(x: Tensor, blocks: int) -> Tensor:
    """Room for numbers of so many blocks of x: (B, H, blocks, D) fp32."""
    return x.new_empty((*x.shape[:2], blocks, x.shape[3]), dtype=torch.float32)


def _aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for x: (B, H, S, D) in that dtype, its rows at multiples of `ALIGNMENT`."""
    batch, heads, seq, head_dim = x.shape
    return x.new_empty((batch, heads, seq, head_dim + -head_dim % ALIGNMENT.value), dtype=dtype)[..., :head_dim]


def _room_for_values(v: Tensor, parts: _Parts, how: Rounding) -> Values:
    """Room for the rounded v, which is v itself if nothing is to be done; and the scales, if they grow."""
    mean = _of_blocks(v, 1) if how.smooth_v else None
    if parts.v_high is None or parts.v_low is None:
        return Values(_aligned(v, torch.float16) if how.smooth_v or v.dtype != torch.float16 else v, None, mean)
    scale = _of_blocks(v, 1)
    if how.growing_block is not None:
        amax = torch.maximum(parts.v_high.abs(), parts.v_low.abs()).clamp_min_(LEAST_AMAX)
        scale = amax.cummax(dim=2).values.div_(E4M3_MAX.value)
    return Values(_aligned(v.mT, torch.float8_e4m3fn).mT, scale, mean)


def _warps(elements: int) -> int:
    return min(max(1, elements // _ELEMENTS_OF_A_WARP), 16)
