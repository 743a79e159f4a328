"""The first kernel of `quantize`: sums and ranges of channels over parts of the tokens; and how they are read."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import tile_mask, tile_pointers

PARTS = tl.constexpr(16)
"""The most parts that the tokens are cut into: every program of the second kernel adds them up."""
LEAST_AMAX = 1e-30
LEAST_AMAX_BITS = tl.constexpr(0x0DA24260)
E4M3_MAX = tl.constexpr(448.0)
_HIGHEST = tl.constexpr(0x7F800000)  # of infinity, what `_ordered` makes
_LOWEST = tl.constexpr(-0x7F800001)  # of -infinity


@triton.jit(
    do_not_specialize=[
        *("KTotal", "k_tokens", "k_part", "k_parts", "VTotal", "VHigh", "VLow", "v_tokens", "v_part", "v_parts"),
        *("batch", "heads"),
    ]
)
def sum_parts_kernel(
    K,
    k_strides,
    KTotal,
    k_tokens,
    k_part,
    k_parts,
    V,
    v_strides,
    VTotal,
    VHigh,
    VLow,
    v_tokens,
    v_part,
    v_parts,
    batch,
    heads,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Of one part of k's tokens the sum, or of one of v's what is asked for."""
    program = tl.program_id(0)
    k_programs = k_parts * heads * batch
    if program < k_programs:
        part = (program, k_parts, k_part, k_tokens, heads)
        _sum_part(K, k_strides, KTotal, None, None, part, ROWS, HEAD_DIM, DIM)
    else:
        part = (program - k_programs, v_parts, v_part, v_tokens, heads)
        _sum_part(V, v_strides, VTotal, VHigh, VLow, part, ROWS, HEAD_DIM, DIM)


@triton.jit
def _sum_part(X, strides, Total, High, Low, part, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Sum, and largest and smallest number, of every channel over one part of the tokens of one head; as asked for."""
    number, parts, size, seq, heads = part
    plane = number // parts
    first = number % parts * size
    tokens = tl.minimum(size, seq - first)
    X = tile_pointers(X, strides, (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), first, ROWS, DIM)
    total = tl.zeros([ROWS, DIM], tl.float32)
    high = tl.full([ROWS, DIM], _LOWEST, tl.int32)
    low = tl.full([ROWS, DIM], _HIGHEST, tl.int32)
    for at in tl.range(0, tokens, ROWS):
        exists = tile_mask(at + tl.arange(0, ROWS) < tokens, HEAD_DIM, DIM)
        x = tl.load(X, mask=exists, other=0.0).to(tl.float32)
        X += ROWS * strides[2]
        if Total is not None:
            total += x
        if High is not None:
            key = _ordered(x.to(tl.int32, bitcast=True))
            high = tl.maximum(high, tl.where(exists, key, _LOWEST))
            low = tl.minimum(low, tl.where(exists, key, _HIGHEST))
    dim = tl.arange(0, DIM)
    out = number.to(tl.int64) * HEAD_DIM + dim
    if Total is not None:
        tl.store(Total + out, tl.sum(total, 0), mask=dim < HEAD_DIM)
    if High is not None:
        tl.store(High + out, _ordered(tl.max(high, 0)).to(tl.float32, bitcast=True), mask=dim < HEAD_DIM)
        tl.store(Low + out, _ordered(tl.min(low, 0)).to(tl.float32, bitcast=True), mask=dim < HEAD_DIM)


@triton.jit
def _ordered(bits):
    """Of the bits of floats, integers in their order, NaN beyond the infinities; of those integers, the bits again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def mean_of_parts(Total, parts, plane, count, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The mean of every channel, (DIM,), over so many tokens."""
    return divided(tl.sum(_load_parts(Total, parts, plane, 0.0, HEAD_DIM, DIM), 0), count)


@triton.jit
def scale_of_parts(High, Low, parts, mean, plane, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """The scale of every channel of v, less its mean if there is one: what is extreme stays so."""
    high = _load_parts(High, parts, plane, float("-inf"), HEAD_DIM, DIM).to(tl.int32, bitcast=True)
    low = _load_parts(Low, parts, plane, float("inf"), HEAD_DIM, DIM).to(tl.int32, bitcast=True)
    high = _ordered(tl.max(_ordered(high), 0)).to(tl.float32, bitcast=True)
    low = _ordered(tl.min(_ordered(low), 0)).to(tl.float32, bitcast=True)
    if mean is not None:
        high -= mean
        low -= mean
    peak = tl.maximum(high.to(tl.int32, bitcast=True) & 0x7FFFFFFF, low.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return divided(tl.maximum(peak, LEAST_AMAX_BITS).to(tl.float32, bitcast=True), E4M3_MAX)


@triton.jit
def _load_parts(Parts, parts, plane, other, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    part = tl.arange(0, PARTS)[:, None]
    dim = tl.arange(0, DIM)[None, :]
    row = plane.to(tl.int64) * parts + part
    return tl.load(Parts + row * HEAD_DIM + dim, mask=(part < parts) & (dim < HEAD_DIM), other=other)


@triton.jit
def divided(x, count):
    """x: (DIM,) / count, as IEEE 754 rounds it, which Triton's own division does not."""
    return tl.math.div_rn(x, tl.zeros(x.shape, tl.float32) + count)
