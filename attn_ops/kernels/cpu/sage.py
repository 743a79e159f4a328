"""SageAttention on CPU: the native kernels for what is usual, else integer scores and a softmax chunk by chunk.

In chunks: an fp32 softmax over all keys of some queries, then the product with V. The integers are those of the
reference. P and V are rounded as `pv` says, except that a bf16 V is multiplied in bf16 where the CPU does that
natively: V is exact then, and P keeps 8 bits, as in dense bf16 attention.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...layout import empty_result
from ...numerics.quantize import (
    SMOOTH_Q_BLOCK,
    QuantizedQK,
    mean_scores,
    offset_terms,
    quantize_qk,
    quantize_v_fp8,
    without_mean,
)
from . import quantized
from .native.library import library_for

_LOG2_E = math.log2(math.e)
_E4M3_MAX = 448.0
_CHUNK = (32, 256)
_CHUNK_SCORES = 1 << 19
_NATIVE = {"bits": 8, "smooth_q": False, "asymmetric": False}
"""Options of the integers that the native kernels have, beside every granularity and smooth_k."""

Scores = Callable[[slice, int], Tensor]
"""(rows, how many keys they see) -> the scores of one head, (rows, keys) fp32."""
Product = Callable[[Tensor, tuple[int, int]], Tensor]
"""(p: (rows, keys) fp32 in 0 ... 1, (batch, kv head)) -> p @ v, (rows, D) fp32."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float,
    pv: str,
    smooth_v: bool = False,
    granularity: str,
    smooth_k: bool,
    **rare: Any,
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, Sq, D), k, v: (B, Hkv, Sk, D); granularity, smooth_k and `rare` are options of `quantize_qk`.

    Returns out like q and lse (B, Hq, Sq) fp32.
    """
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    library = library_for(q)
    qk_options: dict[str, Any] = {"granularity": granularity, "smooth_k": smooth_k}
    if library is None or pv != "fp16" or smooth_v or {**_NATIVE, **rare} != _NATIVE:
        return in_chunks(q, k, v, causal=causal, scale=scale, pv=pv, smooth_v=smooth_v, **qk_options, **rare)
    return quantized.dense(library, q, k, v, causal=causal, scale=scale, **qk_options)


def in_chunks(
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
    """q: (B, Hq, Sq, D), k, v: (B, Hkv, Sk, D); `qk_options` are those of `quantize_qk`. None is empty.

    Returns out like q and lse (B, Hq, Sq) fp32.
    """
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    qk = quantize_qk(q, k, **qk_options)
    out, lse = _attend(qk, v, empty_result(q), causal=causal, scale=scale, pv=pv, smooth_v=smooth_v)
    if qk.k_mean is not None:
        lse += mean_scores(q, qk.k_mean, scale)
    return out, lse


def quantized_attention(
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
    """The same of integers q and k: (B, H, S, D) int8, with the scales of their tokens: (B, H, S) fp32.

    Returns out like q in v's dtype and lse (B, Hq, Sq) fp32.
    """
    result = empty_result(q, v.dtype)
    if q.numel() == 0 or k.numel() == 0:
        return result
    library = library_for(q)
    if library is not None and pv == "fp16" and not smooth_v:
        return quantized.dense_integers(library, q, k, v, q_scale, k_scale, causal=causal, scale=scale)
    qk = QuantizedQK(q, q_scale, k, k_scale, None)
    return _attend(qk, v, result, causal=causal, scale=scale, pv=pv, smooth_v=smooth_v)


def _attend(
    qk: QuantizedQK,
    v: Tensor,
    result: tuple[Tensor, Tensor],
    *,
    causal: bool,
    scale: float,
    pv: str,
    smooth_v: bool,
) -> tuple[Tensor, Tensor]:
    """Fill the result, out and lse, without the term of k's mean; returns it."""
    (out, lse), (batches, heads, seq_q, _), seq_k = result, qk.q.shape, qk.k.shape[2]
    v, v_mean = without_mean(v) if smooth_v else (v, None)
    times_v = _fp8_product(v) if pv == "fp8" else _fp16_product(v)
    offsets, group = offset_terms(qk), heads // v.shape[1]
    for batch, head in itertools.product(range(batches), range(heads)):
        at = batch, head // group
        scores_of = _scores(qk, offsets, scale * _LOG2_E, head, at)
        for rows, seen in _chunks(seq_q, seq_k, causal):
            scores = scores_of(rows, seen)
            if causal:
                _hide_future(scores, rows.start)
            largest = scores.amax(dim=-1, keepdim=True)
            # exp2 is 2.5 times faster than exp in torch's vectorised loops, and softmax keeps no lse.
            weights = scores.sub_(largest).exp2_()
            total = weights.sum(dim=-1, keepdim=True)
            values = times_v(weights, at).div_(total)
            out[batch, head, rows] = values if v_mean is None else values.add_(v_mean[at])
            lse[batch, head, rows] = (largest + total.log2()).squeeze(-1) / _LOG2_E
    return out, lse


def _scores(
    qk: QuantizedQK, offsets: tuple[Tensor, Tensor] | None, factor: float, head: int, at: tuple[int, int]
) -> Scores:
    """Return what computes factor * scores of a query head with its (batch, kv head)."""
    here = at[0], head
    queries, keys = _operands(qk.q[here], qk.k[at])
    row_scale, key_scale = (qk.q_scale[here] * factor).unsqueeze(-1), qk.k_scale[at]

    def scores_of(rows: slice, seen: int) -> Tensor:
        scores = _matmul(queries[rows], keys[:, :seen]).mul_(key_scale[:seen]).mul_(row_scale[rows])
        if offsets is not None:
            scores.addmm_(offsets[0][here][rows], offsets[1][at][:, :seen], alpha=factor)
        if qk.q_mean_scores is not None:
            block = torch.arange(rows.start, rows.stop) // SMOOTH_Q_BLOCK
            scores.add_(qk.q_mean_scores[here][block, :seen], alpha=factor)
        return scores

    return scores_of


def _chunks(seq_q: int, seq_k: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """(query rows, how many keys they see) of every chunk."""
    size = min(max(_CHUNK_SCORES // seq_k, _CHUNK[0]), _CHUNK[1])
    for start in range(0, seq_q, size):
        stop = min(start + size, seq_q)
        yield slice(start, stop), min(stop, seq_k) if causal else seq_k


def _hide_future(scores: Tensor, start: int) -> None:
    """scores: (rows, keys) of the rows from `start` on; only the last keys can be ahead of a row."""
    ahead = scores[:, start:]
    ahead.masked_fill_(torch.ones(ahead.shape, dtype=torch.bool).triu_(1), -torch.inf)


def _operands(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q: (Sq, D) and k: (Sk, D) int8, as (Sq, D) and (D, Sk) in the dtype whose product is exact on this CPU."""
    q, k = q.contiguous(), k.contiguous()
    # torch._int_mm returns noise for an inner dimension of 1.
    in_int8 = q.shape[1] > 1 and _int8_matmul_is_exact()
    return (q, k.t()) if in_int8 else (q.float(), k.float().t())


def _matmul(q: Tensor, k: Tensor) -> Tensor:
    return torch._int_mm(q, k).float() if q.dtype is torch.int8 else q @ k


@functools.cache
def _int8_matmul_is_exact() -> bool:
    """Without VNNI, oneDNN adds pairs of products in 16 bits, which saturate: wrong integers, no warning."""
    if not torch.backends.mkldnn.is_available():
        return False
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127**2).all())


@functools.cache
def _multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def _fp16_product(v: Tensor) -> Product:
    if v.dtype is torch.bfloat16 and _multiplies_bf16():
        return lambda p, at: (p.bfloat16() @ v[at][: p.shape[1]]).float()
    values = v.half().float()
    return lambda p, at: p.half().float() @ values[at][: p.shape[1]]


def _fp8_product(v: Tensor) -> Product:
    v8, v_scale = quantize_v_fp8(v)
    values, channel_scale = v8.float(), v_scale / _E4M3_MAX
    return lambda p, at: (_rounded_to_e4m3(p.mul_(_E4M3_MAX)) @ values[at][: p.shape[1]]).mul_(channel_scale[at])


def _rounded_to_e4m3(x: Tensor) -> Tensor:
    """x: fp32, 0 ... 448, rounded to what e4m3 can hold; a NaN becomes a number.

    The bits of an e4m3 number, shifted left by 7, are those of an fp16 number 256 times smaller. Torch's own conversion
    from e4m3 takes ten times as long.
    """
    bits = x.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16) << 7
    return bits.view(torch.float16).float().mul_(256)
