"""The second kernel of `quantize`: it rounds q, k and v, and stores scales and means."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import tile_mask, tile_pointers
from .quantize_parts import LEAST_AMAX_BITS, divided, mean_of_parts, scale_of_parts

ALIGNMENT = tl.constexpr(16)
"""Elements: every row of a result starts at a multiple, so that kernels copy it 16 bytes at a time."""
_VALUES_OF_A_STEP = tl.constexpr(8192)  # more would spill, where scales grow
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: what is added to it is rounded, half to even, into its low bits


@triton.jit(
    do_not_specialize=[
        *("QScale", "QMean", "KScale", "KMean", "KTotal", "VScale", "VMean", "VTotal", "VHigh", "VLow"),
        *("batch", "heads", "kv_heads", "q_tiles", "k_tiles", "k_parts", "v_parts"),
        *("seq_q", "seq_k", "mean_keys"),
    ]
)
def round_kernel(
    Q,
    q_strides,
    Q8,
    q8_stride,
    QScale,
    QMean,
    K,
    k_strides,
    K8,
    k8_stride,
    KScale,
    KMean,
    KTotal,
    k_parts,
    V,
    v_strides,
    Values,
    VScale,
    VMean,
    values_strides,
    VTotal,
    VHigh,
    VLow,
    v_parts,
    batch,
    heads,
    kv_heads,
    q_tiles,
    k_tiles,
    seq_q,
    seq_k,
    mean_keys,
    ROUNDS_VALUES: tl.constexpr,
    LARGEST: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    GROWING_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Round a tile of queries, or one of keys and of values."""
    program = tl.program_id(0)
    q_programs = q_tiles * heads * batch
    if program < q_programs:
        rounded = (Q8, q8_stride, QScale)
        _round_queries(Q, q_strides, QMean, rounded, program, q_tiles, heads, seq_q, LARGEST, Q_TILE, HEAD_DIM, DIM)
    else:
        of_keys = (program - q_programs, k_tiles, kv_heads, seq_k)
        rounded_k = (K8, k8_stride, KScale)
        parts_k = (KTotal, k_parts, mean_keys)
        _round_keys(K, k_strides, KMean, parts_k, rounded_k, of_keys, LARGEST, K_TILE, HEAD_DIM, DIM)
        if ROUNDS_VALUES:
            rounded_v = (Values, values_strides, VScale, VMean)
            parts_v = (VTotal, VHigh, VLow, v_parts)
            _round_values(V, v_strides, parts_v, rounded_v, of_keys, K_TILE, GROWING_BLOCK, HEAD_DIM, DIM)


@triton.jit(do_not_specialize=["VScale", "VMean", "VTotal", "VHigh", "VLow", "v_parts", "tiles", "heads", "seq"])
def round_values_kernel(
    V,
    v_strides,
    Values,
    VScale,
    VMean,
    values_strides,
    VTotal,
    VHigh,
    VLow,
    v_parts,
    tiles,
    heads,
    seq,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Round a tile of values alone."""
    rounded = (Values, values_strides, VScale, VMean)
    parts = (VTotal, VHigh, VLow, v_parts)
    _round_values(V, v_strides, parts, rounded, (tl.program_id(0), tiles, heads, seq), TILE, None, HEAD_DIM, DIM)


@triton.jit
def _round_queries(
    Q,
    strides,
    Mean,
    rounded,
    program,
    tiles,
    heads,
    seq,
    LARGEST: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    plane, first, tokens = _place(program, tiles, seq, TILE)
    Q = tile_pointers(Q, strides, (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), first, TILE[1], DIM)
    mean = None
    if Mean is not None:
        q = _centred(Q, None, tokens, HEAD_DIM)
        mean = divided(tl.sum(q, 0), tokens)
        _store_channels(Mean, program, mean, HEAD_DIM)
    _round_to_int8(Q, strides[2], mean, rounded, plane.to(tl.int64) * seq + first, tokens, LARGEST, TILE, HEAD_DIM)


@triton.jit
def _round_keys(
    K,
    strides,
    Mean,
    parts,
    rounded,
    of_keys,
    LARGEST: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    program, tiles, heads, seq = of_keys
    plane, first, tokens = _place(program, tiles, seq, TILE)
    K = tile_pointers(K, strides, (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), first, TILE[1], DIM)
    Total, count, mean_keys = parts
    mean = None
    if Total is not None:
        mean = mean_of_parts(Total, count, plane, mean_keys, HEAD_DIM, DIM)
        if first == 0:
            _store_channels(Mean, plane, mean, HEAD_DIM)
    _round_to_int8(K, strides[2], mean, rounded, plane.to(tl.int64) * seq + first, tokens, LARGEST, TILE, HEAD_DIM)


@triton.jit
def _round_values(
    V,
    strides,
    parts,
    rounded,
    of_keys,
    TILE: tl.constexpr,
    GROWING_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    program, tiles, heads, seq = of_keys
    Total, High, Low, count = parts
    Values, values_strides, Scale, Mean = rounded
    ROWS: tl.constexpr = TILE[1] if TILE[1] * DIM <= _VALUES_OF_A_STEP else _VALUES_OF_A_STEP // DIM
    # Tokens of FP8 are stored 16 at a time, where a tile holds whole groups of them: the last get padding of 0.
    GROUPS_OF_TOKENS: tl.constexpr = High is not None and tl.constexpr(TILE[0]) % ALIGNMENT == 0
    plane, first, tokens = _place(program, tiles, seq, TILE)
    batch = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    V = tile_pointers(V, strides, batch, head, first, ROWS, DIM)
    mean = None
    if Total is not None:
        mean = mean_of_parts(Total, count, plane, seq, HEAD_DIM, DIM)
        if first == 0:
            _store_channels(Mean, plane, mean, HEAD_DIM)
    scale = None
    if High is not None and GROWING_BLOCK is None:
        scale = scale_of_parts(High, Low, count, mean, plane, HEAD_DIM, DIM)
        if first == 0:
            _store_channels(Scale, plane, scale, HEAD_DIM)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)[None, :].to(tl.int64)
    Values += batch * values_strides[0] + head * values_strides[1] + first.to(tl.int64) * values_strides[2]
    for at in tl.range(0, TILE[0], ROWS):
        v = _centred(V + at * strides[2], mean, tokens - at, HEAD_DIM)
        if scale is not None:
            v = tl.math.div_rn(v, tl.broadcast_to(scale[None, :], v.shape))
        elif GROWING_BLOCK is not None:
            block = plane.to(tl.int64) * tl.cdiv(seq, GROWING_BLOCK) + (first + at + row) // GROWING_BLOCK
            exists = tile_mask(at + row < tokens, HEAD_DIM, DIM)
            v = tl.math.div_rn(v, tl.load(Scale + block[:, None] * HEAD_DIM + dim, mask=exists, other=1.0))
        last = row
        if GROUPS_OF_TOKENS:
            last = row // ALIGNMENT * ALIGNMENT
        stored = tile_mask((at + last < tokens) & (at + row < TILE[0]), HEAD_DIM, DIM)
        out = Values + (at + row)[:, None] * values_strides[2] + dim * values_strides[3]
        tl.store(out, v.to(Values.dtype.element_ty), mask=stored)


@triton.jit
def _round_to_int8(
    X,
    stride,
    mean,
    rounded,
    token,
    tokens,
    LARGEST: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Round a tile to integers; X points to its first rows, `token` is its first token in the results."""
    X8, stride8, Scale = rounded
    ROWS: tl.constexpr = TILE[1]
    x = _centred(X, mean, tokens, HEAD_DIM)
    peak = _peak(x, TILE)
    for at in tl.range(ROWS, TILE[0], ROWS):
        peak = tl.maximum(peak, _peak(_centred(X + at * stride, mean, tokens - at, HEAD_DIM), TILE))
    peak = tl.maximum(peak, LEAST_AMAX_BITS).to(tl.float32, bitcast=True)
    scale = tl.math.div_rn(peak, tl.full([ROWS], LARGEST, tl.float32))
    X8 += token * stride8
    Scale += token
    _store_integers(x, scale, X8, stride8, Scale, tokens, HEAD_DIM)
    for at in tl.range(ROWS, TILE[0], ROWS):
        x = _centred(X + at * stride, mean, tokens - at, HEAD_DIM)
        _store_integers(x, scale, X8 + at * stride8, stride8, Scale + at, tokens - at, HEAD_DIM)


@triton.jit
def _peak(x, TILE: tl.constexpr):
    """Of the group of every row, the bits of the largest absolute number: as integers they have its order, NaN last."""
    ROWS: tl.constexpr = TILE[1]
    PERIOD: tl.constexpr = TILE[2]
    LANES: tl.constexpr = TILE[3]
    RUN: tl.constexpr = TILE[4]
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    if PERIOD > 1:
        members = tl.reshape(peak, [ROWS // PERIOD, PERIOD // (LANES * RUN), LANES, RUN])
        largest = tl.max(tl.max(members, 3, keep_dims=True), 1, keep_dims=True)
        peak = tl.reshape(tl.broadcast_to(largest, members.shape), [ROWS])
    return peak


@triton.jit
def _store_integers(x, scale, X8, stride, Scale, tokens, HEAD_DIM: tl.constexpr):
    row = tl.arange(0, x.shape[0])
    dim = tl.arange(0, x.shape[1])
    exists = row < tokens
    units = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    integers = (units + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(X8 + row[:, None] * stride + dim[None, :], integers, mask=tile_mask(exists, HEAD_DIM, x.shape[1]))
    tl.store(Scale + row, scale, mask=exists)


@triton.jit
def _place(program, tiles, seq, TILE: tl.constexpr):
    """The plane of a program's tile (of one head of one batch element), its first token, and how many there are."""
    first = program % tiles * TILE[0]
    return program // tiles, first, tl.minimum(TILE[0], seq - first)


@triton.jit
def _centred(X, mean, tokens, HEAD_DIM: tl.constexpr):
    """The rows X points to less their mean, fp32; 0 beyond the first `tokens`, and in the padding of channels."""
    exists = tile_mask(tl.arange(0, X.shape[0]) < tokens, HEAD_DIM, X.shape[1])
    x = tl.load(X, mask=exists, other=0.0).to(tl.float32)
    if mean is not None:
        x = tl.where(exists, x - mean[None, :], 0.0)
    return x


@triton.jit
def _store_channels(Out, row, x, HEAD_DIM: tl.constexpr):
    dim = tl.arange(0, x.shape[0])
    tl.store(Out + row.to(tl.int64) * HEAD_DIM + dim, x, mask=dim < HEAD_DIM)
