"""SLA's linear branch over all tokens in Triton, for sm_80 and newer: what `numerics/linear_attention.py` defines.

Three launches, added up in a fixed order. The first sums H = sum phi(k) v.T and z = sum phi(k) over parts of the tokens
of a kv head, the second adds the parts and multiplies H by the projection, once per kv head, and the third passes over
q. In fp32 products are IEEE; in half precision tensor cores multiply features and projected states rounded to q's
dtype, the features of numerator and denominator alike. Every sum is fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics.linear_attention import EPSILON
from .device import tile_mask, tile_pointers
from .tiles import TENSOR_MEMORY, on_device, padded_head_dim, target_arch

_PARTS = 16  # the most parts of the tokens: each costs a state in memory, written and read
_LEAST_PART = 256
_TILES_OF_A_PROGRAM = 4  # of queries, which read one projected state
_FOLDED = 32  # channels of k that a program folds
_FOLD_WARPS = 4
_CHUNK = tl.constexpr(32)  # channels of v in one of its steps


class _Tile(NamedTuple):
    """Tokens of a step, channels of v or of the output that a program computes, and warps."""

    tokens: int
    channels: int
    warps: int


def add_linear_branch(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, *, feature_map: str
) -> Tensor:
    """Add W (phi(q) H / (phi(q) . z + 1e-5)) + bias to out, in place.

    Args:
        out: (B, Hq, S, D), the sparse part, q's dtype and unit stride on D.
        q: (B, Hq, S, D) fp32, fp16 or bf16, D up to 256, unit stride on D.
        k: (B, Hkv, S, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, S, D).
        weight: (D, D), the projection.
        bias: (D,), or None for 0.
        feature_map: phi: "softmax" over channels, "elu" (plus 1) or "relu".

    Returns:
        out.
    """
    if q.numel() == 0:
        return out
    (batch, heads, seq, head_dim), kv_heads = q.shape, k.shape[1]
    dim = padded_head_dim(head_dim)
    part = max(_LEAST_PART, int(triton.cdiv(seq, _PARTS)))
    parts = triton.cdiv(seq, part)
    state_parts = q.new_empty((batch, kv_heads, parts, head_dim, head_dim), dtype=torch.float32)
    total_parts = q.new_empty((batch, kv_heads, parts, head_dim), dtype=torch.float32)
    state = q.new_empty((batch, kv_heads, head_dim, head_dim))
    total = q.new_empty((batch, kv_heads, head_dim), dtype=torch.float32)
    options = {"HEAD_DIM": head_dim, "DIM": dim}
    with on_device(q):
        tile = _state_tile(target_arch(), q.element_size(), dim)
        _sum_states[(parts * kv_heads * batch, triton.cdiv(head_dim, tile.channels))](
            *(k, k.stride()[:3], v, v.stride()[:3], state_parts, total_parts, part, parts, kv_heads, seq),
            FEATURE_MAP=feature_map,
            TOKENS=tile.tokens,
            CHANNELS=tile.channels,
            **options,
            num_warps=tile.warps,
        )
        folded = min(_FOLDED, dim)
        _fold[(batch * kv_heads, triton.cdiv(head_dim, folded))](
            *(state_parts, total_parts, weight, *weight.stride(), state, total, parts),
            FOLDED=folded,
            **options,
            num_warps=_FOLD_WARPS,
        )
        tile = _query_tile(q.element_size(), dim)
        rows = tile.tokens * _TILES_OF_A_PROGRAM
        runs = triton.cdiv(seq, rows)
        _add_branch[(runs * heads * batch, triton.cdiv(head_dim, tile.channels))](
            *(q, q.stride()[:3], state, total, None if bias is None else bias.contiguous(), out, out.stride()[:3]),
            *(EPSILON, rows, runs, heads, heads // kv_heads, seq),
            FEATURE_MAP=feature_map,
            TOKENS=tile.tokens,
            CHANNELS=tile.channels,
            **options,
            num_warps=tile.warps,
        )
    return out


def _state_tile(arch: int, itemsize: int, dim: int) -> _Tile:
    if itemsize == 4:
        return _Tile(16, min(dim, 64) if dim <= 128 else 16, 4 if dim <= 64 else 8)
    tokens = 64 if dim <= 64 or (dim == 128 and arch in TENSOR_MEMORY) else 32
    return _Tile(tokens, min(dim, 64), 4 if dim <= 128 else 8)


def _query_tile(itemsize: int, dim: int) -> _Tile:
    warps = 4 if dim <= 64 else 8
    if itemsize == 4:
        return _Tile(32, min(dim, 64), warps) if dim <= 128 else _Tile(16, 32, warps)
    return _Tile(64, dim, warps) if dim <= 128 else _Tile(32, 64, warps)


@triton.jit(do_not_specialize=["States", "Totals", "part_size", "parts", "heads", "seq"])
def _sum_states(
    K,
    k_strides,
    V,
    v_strides,
    States,
    Totals,
    part_size,
    parts,
    heads,
    seq,
    FEATURE_MAP: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Of one part of the tokens of a kv head, some rows of H.T, (D of v, D of k), and z."""
    number = tl.program_id(0)
    head = (number // parts % heads).to(tl.int64)
    batch = (number // parts // heads).to(tl.int64)
    first = number % parts * part_size
    tokens = tl.minimum(part_size, seq - first)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    dim = tl.arange(0, DIM)
    K = tile_pointers(K, k_strides, batch, head, first, TOKENS, DIM)
    V += batch * v_strides[0] + head * v_strides[1] + first.to(tl.int64) * v_strides[2]
    V += tl.arange(0, TOKENS)[:, None] * v_strides[2] + channel[None, :]
    state = tl.zeros([CHANNELS, DIM], tl.float32)
    total = tl.zeros([DIM], tl.float32)
    for at in tl.range(0, tokens, TOKENS):
        exists = at + tl.arange(0, TOKENS) < tokens
        v = tl.load(V, mask=exists[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
        phi = _features(K, exists, FEATURE_MAP, HEAD_DIM, DIM).to(v.dtype)
        state = tl.dot(v.T, phi, state, input_precision="ieee")
        total += tl.sum(phi.to(tl.float32), 0)
        K += TOKENS * k_strides[2]
        V += TOKENS * v_strides[2]
    row = number.to(tl.int64) * HEAD_DIM
    of_state = (row + channel)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(States + of_state, state, mask=tile_mask(channel < HEAD_DIM, HEAD_DIM, DIM))
    if tl.program_id(1) == 0:
        tl.store(Totals + row + dim, total, mask=dim < HEAD_DIM)


@triton.jit(do_not_specialize=["StateParts", "TotalParts", "State", "Total", "parts"])
def _fold(
    StateParts,
    TotalParts,
    Weight,
    weight_row,
    weight_column,
    State,
    Total,
    parts,
    FOLDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Of one kv head, some columns of W H.T / `_unit(z)`, (D of the output, D of k), and z."""
    plane = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIM)
    total = tl.zeros([DIM], tl.float32)
    for part in range(parts):
        total += tl.load(TotalParts + (plane * parts + part) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
    column = tl.program_id(1) * FOLDED + tl.arange(0, FOLDED)
    StateParts += plane * parts * HEAD_DIM * HEAD_DIM + column[None, :]
    folded = tl.zeros([DIM, FOLDED], tl.float32)
    for begin in range(0, HEAD_DIM, _CHUNK):
        channel = begin + tl.arange(0, _CHUNK)
        exists = (channel < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :]
        state = tl.zeros([_CHUNK, FOLDED], tl.float32)
        for part in range(parts):
            state += tl.load(StateParts + (part * HEAD_DIM + channel)[:, None] * HEAD_DIM, mask=exists, other=0.0)
        of_weight = dim[:, None] * weight_row + channel[None, :] * weight_column
        square = (dim < HEAD_DIM)[:, None] & (channel < HEAD_DIM)[None, :]
        weight = tl.load(Weight + of_weight, mask=square, other=0.0).to(tl.float32)
        folded = tl.dot(weight, state, folded, input_precision="ieee")
    folded = (folded / _unit(total)).to(State.dtype.element_ty)
    exists = (dim < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(State + (plane * HEAD_DIM + dim)[:, None] * HEAD_DIM + column[None, :], folded, mask=exists)
    if tl.program_id(1) == 0:
        tl.store(Total + plane * HEAD_DIM + dim, total, mask=dim < HEAD_DIM)


@triton.jit(do_not_specialize=["State", "Total", "Bias", "epsilon", "rows", "runs", "heads", "group", "seq"])
def _add_branch(
    Q,
    q_strides,
    State,
    Total,
    Bias,
    Out,
    out_strides,
    epsilon,
    rows,
    runs,
    heads,
    group,
    seq,
    FEATURE_MAP: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Add the branch to some channels of some rows of Out."""
    run = tl.program_id(0)
    head = (run // runs % heads).to(tl.int64)
    batch = (run // runs // heads).to(tl.int64)
    first = run % runs * rows
    tokens = tl.minimum(rows, seq - first)
    plane = (batch * heads + head) // group
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel_exists = channel < HEAD_DIM
    dim = tl.arange(0, DIM)

    total = tl.load(Total + plane * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
    of_state = (plane * HEAD_DIM + channel)[:, None] * HEAD_DIM + dim[None, :]
    state = tl.load(State + of_state, mask=tile_mask(channel_exists, HEAD_DIM, DIM), other=0.0)
    unit = _unit(total)
    Q = tile_pointers(Q, q_strides, batch, head, first, TOKENS, DIM)
    Out += batch * out_strides[0] + head * out_strides[1] + first.to(tl.int64) * out_strides[2]
    Out += tl.arange(0, TOKENS)[:, None] * out_strides[2] + channel[None, :]
    for at in tl.range(0, tokens, TOKENS):
        exists = at + tl.arange(0, TOKENS) < tokens
        element = exists[:, None] & channel_exists[None, :]
        phi = _features(Q, exists, FEATURE_MAP, HEAD_DIM, DIM).to(state.dtype)
        denominator = tl.sum(phi.to(tl.float32) * total[None, :], 1) + epsilon
        branch = tl.dot(phi, state.T, input_precision="ieee") * (unit / denominator)[:, None]
        if Bias is not None:
            branch += tl.load(Bias + channel, mask=channel_exists, other=0.0).to(tl.float32)[None, :]
        branch += tl.load(Out, mask=element, other=0.0).to(tl.float32)
        tl.store(Out, branch.to(Out.dtype.element_ty), mask=element)
        Q += TOKENS * q_strides[2]
        Out += TOKENS * out_strides[2]


@triton.jit
def _features(X, row_exists, FEATURE_MAP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The features phi of a tile, fp32, 0 in rows and channels that do not exist."""
    exists = tile_mask(row_exists, HEAD_DIM, DIM)
    x = tl.load(X, mask=exists, other=0.0).to(tl.float32)
    if FEATURE_MAP == "softmax":
        x = tl.where(exists, x, float("-inf")) if HEAD_DIM != DIM else x
        top = tl.where(row_exists, tl.max(x, 1), 0.0)
        phi = tl.exp(x - top[:, None])
        phi = phi * (1.0 / tl.where(row_exists, tl.sum(phi, 1), 1.0))[:, None]
    elif FEATURE_MAP == "elu":
        phi = tl.maximum(x, 0.0) + tl.exp(tl.minimum(x, 0.0))
    else:
        phi = tl.maximum(x, 0.0)
    return tl.where(exists, phi, 0.0)


@triton.jit
def _unit(total):
    """The largest entry of z, or 1: H in units of it is no larger than v, however many tokens there are."""
    largest = tl.max(total, 0)
    return tl.where(largest == 0.0, 1.0, largest)
