"""Attention of INT8 queries and keys for Hopper (sm_90), to all keys or to listed blocks, with FP16 or FP8 values.

The schedules are those of `block_sparse`. FP8 products are summed by the tensor cores alone, in the precision that they
have: about 22 bits, as published.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..triton.block_sparse import broadcast_strides
from ..triton.device import LOG2_E
from ..triton.quantize import Rounded
from ..triton.tiles import on_device
from .block_sparse import KEYS, ROWS_OF_A_WARP, tile_rows
from .descriptors import descriptor, readable
from .device import barriers, fetch, matrix, product_layout, store_rows, tiles
from .schedules import REGISTERS, walk
from .softmax import LEAST_FACTOR, finish, per_row_layout, start

_FP8_PEAK_LOG2 = gl.constexpr(8.807354922057604)  # log2(448), the largest e4m3 number: weights fill its range


class Operands(NamedTuple):
    """What the kernel multiplies.

    Args:
        q: (B, Hq, Sq, D) int8.
        q_scale: (B, Hq, Sq) fp32, contiguous.
        k: (B, Hkv, Sk, D) int8.
        k_scale: (B, Hkv, Sk) fp32, contiguous; of tokens 2n and 2n + 1, and from one block of 64 to the next the same
            for every eighth token: what every granularity of `quantize_qk` and a scale per block of keys are.
        v: (B, Hkv, Sk, D) fp16, or (B, Hkv, D, Sk) e4m3: wgmma takes 8-bit values in no other order.
        v_scale: (B, Hkv, 1, D) fp32, contiguous, or None in FP16.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor | None

    @staticmethod
    def of(x: Rounded) -> Operands:
        """Operands rounded with neither smooth_q nor smooth_v nor a scale that grows."""
        return Operands(x.q, x.q_scale, x.k, x.k_scale, x.v if x.v_scale is None else x.v.mT, x.v_scale)


def attend(
    given: Operands,
    out: Tensor,
    lists: tuple[Tensor, Tensor] | None,
    *,
    block_q: int,
    scale: float,
    overlapped: bool,
) -> tuple[Tensor, Tensor]:
    """Fill out, (B, Hq, Sq, D); returns it and lse, (B, Hq, Sq) fp32, natural logarithm.

    Args:
        given: q, k and v.
        out: fp16 or bf16, `readable`.
        lists: index and count of the 64-token blocks that each block of queries sees, or None for all.
        block_q: tokens of a block of queries, a multiple of 64.
        scale: factor on the scores, not negative.
        overlapped: see `schedules`.
    """
    q, k, v = map(readable, (given.q, given.k, given.v))
    (batch, heads, seq_q, dim), (kv_heads, seq_k) = q.shape, k.shape[1:3]
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    rows = tile_rows(block_q)
    tiles_q = triton.cdiv(seq_q, block_q) * (block_q // rows)
    index, count = lists or (None, None)
    values = descriptor(v, KEYS, dim) if given.v_scale is None else descriptor(v, dim, KEYS)
    with on_device(q):
        _forward[(tiles_q * heads * batch,)](
            *(descriptor(q, rows, dim), given.q_scale, descriptor(k, KEYS, dim), given.k_scale, values, given.v_scale),
            *(descriptor(out, rows, dim), lse, index, *_strides(index), count, *_strides(count)),
            *(scale * LOG2_E, tiles_q, heads, heads // kv_heads, seq_q, seq_k),
            SHORT_TAIL=seq_k % KEYS != 0,
            TILES_PER_BLOCK=block_q // rows,
            OVERLAPPED=overlapped,
            num_warps=rows // ROWS_OF_A_WARP,
            maxnreg=REGISTERS[overlapped],
        )
    return out, lse


def _strides(lists: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if lists is None else broadcast_strides(lists)


@gluon.jit(
    do_not_specialize=[
        *("Lse", "Index", "index_batch", "index_head", "index_row", "Count", "count_batch", "count_head", "count_row"),
        *("tiles_q", "heads", "group", "seq_q", "seq_k"),
    ]
)
def _forward(
    Q8,
    QScale,
    K8,
    KScale,
    V,
    VScale,
    Out,
    Lse,
    Index,
    index_batch,
    index_head,
    index_row,
    Count,
    count_batch,
    count_head,
    count_row,
    scale_log2,
    tiles_q,
    heads,
    group,
    seq_q,
    seq_k,
    SHORT_TAIL: gl.constexpr,
    TILES_PER_BLOCK: gl.constexpr,
    OVERLAPPED: gl.constexpr,
):
    ROWS: gl.constexpr = Q8.block_type.shape[2]
    DIM: gl.constexpr = Q8.block_type.shape[3]
    KEYS: gl.constexpr = K8.block_type.shape[2]
    PEAK_LOG2: gl.constexpr = _FP8_PEAK_LOG2 if V.dtype == gl.float8e4nv else 0.0
    SCORES: gl.constexpr = product_layout(KEYS, Q8.dtype, gl.num_warps())
    OUT: gl.constexpr = product_layout(DIM, V.dtype, gl.num_warps())
    ROW: gl.constexpr = per_row_layout(KEYS, gl.num_warps())
    tile = gl.program_id(0) % tiles_q
    head = gl.program_id(0) // tiles_q % heads
    batch = gl.program_id(0) // tiles_q // heads
    block = tile // TILES_PER_BLOCK
    kv_plane = (batch * (heads // group) + head // group).to(gl.int64)
    first_row = (batch * heads + head).to(gl.int64) * seq_q

    q_tile, q_ready = tiles(Q8, 1).index(0), barriers(1).index(0)
    fetch(Q8, (batch, head), tile * ROWS, q_tile, q_ready, True)
    count = gl.cdiv(seq_k, KEYS)
    if Index is not None:
        Index += batch.to(gl.int64) * index_batch + head.to(gl.int64) * index_head + block.to(gl.int64) * index_row
        count = gl.load(Count + batch.to(gl.int64) * count_batch + head * count_head + block * count_row)

    row = tile * ROWS + gl.arange(0, ROWS, ROW)
    factor = gl.load(QScale + first_row + row, mask=row < seq_q, other=0.0) * scale_log2
    factor = gl.maximum(factor, LEAST_FACTOR)
    sources, lists = (K8, V, (batch, head // group)), (Index, count)
    about = (None, KScale + kv_plane * seq_k, seq_k, seq_k if SHORT_TAIL else None)
    state = start(ROWS, DIM, ROW, OUT)
    state = walk(state, matrix(q_tile), factor, sources, lists, about, q_ready, OVERLAPPED, PEAK_LOG2, SCORES, OUT)

    out, lse = finish(state, PEAK_LOG2, OUT)
    if VScale is not None:
        channel = gl.arange(0, DIM, gl.SliceLayout(0, OUT))
        out = out * gl.load(VScale + kv_plane * DIM + channel)[None, :]
    store_rows(Out, out, (batch, head), tile * ROWS, tiles(Out, 1).index(0))
    gl.store(Lse + first_row + row, lse, mask=row < seq_q)
