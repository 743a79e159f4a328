"""SpargeAttention on CPU: the native kernels for pv="fp16" without a second stage, else by operators of torch.

Those work on the numbers that the INT8 integers of q and k stand for. With pv="fp16" and no second stage it is
block-sparse attention: v is rounded to FP16, the weights stay fp32. Else one block of queries at a time: what the
second stage skips is neither exponentiated nor multiplied with v.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout import empty_result, like_query
from ...numerics.block_rounding import round_qk, round_v_fp8
from ...numerics.quantize import mean_scores
from . import quantized
from .native.library import library_for

_LOG2_E = math.log2(math.e)
_E4M3_MAX = 448.0
_NEVER_SKIPPED = 2
"""Blocks at the end of a list that the second stage leaves alone, as the published kernels do."""


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
    pv_threshold: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, Sq, D), k, v: (B, Hkv, Sk, D), lists (B, Hq, nq, ...). Returns out like q and lse (B, Hq, Sq) fp32.

    pv_threshold: () or (Hq,) fp32, in powers of two, or None for no second stage.
    """
    if q.numel() == 0 or k.numel() == 0 or block_index.shape[-1] == 0:
        return empty_result(q)
    modes: dict[str, Any] = {
        "block_q": block_q,
        "block_k": block_k,
        "smooth_k": smooth_k,
        "causal": causal,
        "scale": scale,
    }
    library = library_for(q)
    if library is None or pv != "fp16" or pv_threshold is not None:
        return by_operators(q, k, v, block_index, block_count, pv=pv, pv_threshold=pv_threshold, **modes)
    return quantized.on_lists(library, q, k, v, block_index, block_count, **modes)


def by_operators(
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
    pv_threshold: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attention` where nothing is empty, every mode of it."""
    rounded = round_qk(q, k, block_q=block_q, block_k=block_k, smooth_k=smooth_k, causal=causal)
    queries, keys = rounded.numbers()
    if pv == "fp16" and pv_threshold is None:
        # As an op, so that a trace of this function has no call out of the graph in it.
        out, lse = torch.ops.sparseattn.block_sparse_attention(
            *(queries, keys, v.half().float(), block_index, block_count),
            block_q=block_q,
            block_k=block_k,
            causal=causal,
            scale=scale,
            provider="cpu",
        )
    else:
        operands = _Operands(queries * (scale * _LOG2_E), keys, _values(v, pv, block_k, causal), block_k, causal, pv)
        out, lse = _row_by_row(operands, block_index, block_count, block_q, pv_threshold)
    if rounded.k_mean is not None:
        lse = lse + mean_scores(q, rounded.k_mean, scale)
    return like_query(out, q), lse


class _Operands(NamedTuple):
    """q: (B, Hq, Sq, D) times the scale in powers of two, k, v: (B, Hkv, Sk, D), all fp32; and how to go about them."""

    q: Tensor
    k: Tensor
    v: Tensor
    block_k: int
    causal: bool
    pv: str


def _values(v: Tensor, pv: str, block_k: int, causal: bool) -> Tensor:
    """v: (B, Hkv, Sk, D) rounded, as the fp32 numbers it stands for."""
    if pv == "fp16":
        return v.half().float()
    v8, scale = round_v_fp8(v, block_k=block_k, causal=causal)
    return v8.float() * scale.repeat_interleave(block_k, dim=2)[:, :, : v.shape[2]]


def _row_by_row(
    operands: _Operands, block_index: Tensor, block_count: Tensor, block_q: int, pv_threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, group = operands.q, operands.q.shape[1] // operands.k.shape[1]
    out, lse = empty_result(q)
    counts = block_count.tolist()
    thresholds = None if pv_threshold is None else pv_threshold.expand(q.shape[1]).tolist()
    for batch, head, row in itertools.product(*map(range, block_count.shape)):
        rows = slice(row * block_q, min((row + 1) * block_q, q.shape[2]))
        blocks = block_index[batch, head, row, : counts[batch][head][row]]
        skip_below = None if thresholds is None else -thresholds[head]
        part, part_lse = _attend(operands, (batch, head, head // group), rows, blocks, skip_below)
        out[batch, head, rows], lse[batch, head, rows] = part, part_lse
    return out, lse


def _attend(
    operands: _Operands, at: tuple[int, int, int], rows: slice, blocks: Tensor, skip_below: float | None
) -> tuple[Tensor, Tensor]:
    """One block of queries at (batch, head, kv head): out (rows, D) and lse (rows,) without what smoothing took."""
    batch, head, kv_head = at
    seq_k, block_k = operands.k.shape[2], operands.block_k
    tokens = (blocks.unsqueeze(-1) * block_k + torch.arange(block_k, device="cpu")).flatten()
    keys = operands.k[batch, kv_head].index_select(0, tokens.clamp(max=seq_k - 1))
    scores = operands.q[batch, head, rows] @ keys.T
    hidden = tokens >= seq_k
    if operands.causal:
        hidden = hidden | (tokens > torch.arange(rows.start, rows.stop, device="cpu").unsqueeze(-1))
    scores = scores.masked_fill_(hidden, -torch.inf)
    if skip_below is not None:
        kept = _worth_it(scores.unflatten(1, (-1, block_k)).amax(dim=-1), skip_below)
        scores, tokens = scores[:, kept.repeat_interleave(block_k)], tokens[kept.repeat_interleave(block_k)]
    top = scores.amax(dim=-1, keepdim=True)
    top = top.masked_fill_(top == -torch.inf, 0.0)
    weights = scores.sub_(top).exp2_()
    total = weights.sum(dim=-1, keepdim=True)
    lse = (top + total.log2()).squeeze(-1) / _LOG2_E
    if operands.pv == "fp8":
        weights = (weights * _E4M3_MAX).to(torch.float8_e4m3fn).float().div_(_E4M3_MAX)
    else:
        weights = weights.half().float()
    values = operands.v[batch, kv_head].index_select(0, tokens.clamp(max=seq_k - 1))
    return (weights @ values).div_(total.masked_fill(total == 0, 1.0)), lse


def _worth_it(highest: Tensor, skip_below: float) -> Tensor:
    """Which blocks are not skipped, (n,) bool, by their highest scores in every row, (rows, n) in powers of two.

    A skipped block raises no maximum, so that the running maximum over all blocks is that over those that were kept.
    """
    before = torch.nn.functional.pad(highest.cummax(dim=1).values[:, :-1], (1, 0), value=-torch.inf)
    margin = torch.where(highest == -torch.inf, -torch.inf, highest - before).amax(dim=0)
    worth = ~(margin <= skip_below)
    worth[-_NEVER_SKIPPED:] = True
    return worth
