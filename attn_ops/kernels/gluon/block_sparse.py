"""Block-sparse attention, forward, for Hopper (sm_90): one program computes one tile of queries of one head.

Two schedules of one kernel, which keep the tensor cores busy during the softmax in different ways: see `schedules`.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...layout import empty_result
from ..triton.block_sparse import broadcast_strides
from ..triton.descriptors import without_padding
from ..triton.device import LOG2_E
from ..triton.tiles import on_device
from .descriptors import descriptor, readable
from .device import barriers, fetch, matrix, product_layout, store_rows, tiles
from .schedules import REGISTERS, walk
from .softmax import finish, start

KEYS = 64
ROWS_OF_A_WARP = 16
_LEAST_SCALE = 2.0**-100


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None = None,
    *,
    block_q: int,
    block_k: int,
    causal: bool,  # noqa: ARG001  (its why_not refuses it)
    scale: float,
    overlapped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of every block of queries to its listed blocks of keys.

    Args:
        q: (B, Hq, Sq, D) fp16 or bf16, D 64 or 128, unit stride on D.
        k: (B, Hkv, Sk, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        block_index: (B or 1, Hq or 1, nq, max_blocks) int32.
        block_count: (B or 1, Hq or 1, nq) int32.
        key_sizes: (nk,) int32, the number of valid tokens at the start of each key block, or None for all.
        block_q: tokens of a block of queries, a multiple of 64.
        block_k: tokens of a block of keys, 64.
        causal: False.
        scale: factor on the scores.
        overlapped: multiply q by the next keys during a softmax; else four programs of an SM overlap one another.

    Returns:
        out: like q; 0 in a row with no key.
        lse: (B, Hq, Sq) fp32, natural logarithm; -inf in a row with no key.
    """
    if q.numel() == 0 or k.numel() == 0 or block_index.shape[-1] == 0:
        return empty_result(q)
    if scale < 0:
        q, scale = -q, -scale
    if block_index.stride(-1) != 1:
        block_index = block_index.contiguous()
    if key_sizes is not None:
        v = without_padding(v, key_sizes, block_k)
    q, k, v = map(readable, (q, k, v))
    (batch, heads, seq_q, dim), (kv_heads, seq_k) = q.shape, k.shape[1:3]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    rows = tile_rows(block_q)
    tiles_q = triton.cdiv(seq_q, block_q) * (block_q // rows)
    with on_device(q):
        _forward[(tiles_q * heads * batch,)](
            *(descriptor(x, tile, dim) for x, tile in ((q, rows), (k, KEYS), (v, KEYS), (out, rows))),
            *(lse, block_index, *broadcast_strides(block_index), block_count, *broadcast_strides(block_count)),
            *(key_sizes, max(scale, _LEAST_SCALE) * LOG2_E, tiles_q, heads, heads // kv_heads, seq_q, seq_k),
            SHORT_TAIL=seq_k % block_k != 0,
            TILES_PER_BLOCK=block_q // rows,
            OVERLAPPED=overlapped,
            num_warps=rows // ROWS_OF_A_WARP,
            maxnreg=REGISTERS[overlapped],
        )
    return out, lse


overlapped_attention = functools.partial(attention, overlapped=True)


def tile_rows(block_q: int) -> int:
    """Return the queries of a program: two warpgroups share keys and values where the block of queries has room."""
    return 128 if block_q % 128 == 0 else 64


@gluon.jit(
    do_not_specialize=[
        *("Lse", "Index", "index_batch", "index_head", "index_row", "Count", "count_batch", "count_head", "count_row"),
        *("Sizes", "tiles_q", "heads", "group", "seq_q", "seq_k"),
    ]
)
def _forward(
    Q,
    K,
    V,
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
    Sizes,
    factor,
    tiles_q,
    heads,
    group,
    seq_q,
    seq_k,
    SHORT_TAIL: gl.constexpr,
    TILES_PER_BLOCK: gl.constexpr,
    OVERLAPPED: gl.constexpr,
):
    ROWS: gl.constexpr = Q.block_type.shape[2]
    DIM: gl.constexpr = Q.block_type.shape[3]
    SCORES: gl.constexpr = product_layout(K.block_type.shape[2], Q.dtype, gl.num_warps())
    OUT: gl.constexpr = product_layout(DIM, V.dtype, gl.num_warps())
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    tile = gl.program_id(0) % tiles_q
    head = gl.program_id(0) // tiles_q % heads
    batch = gl.program_id(0) // tiles_q // heads
    block = tile // TILES_PER_BLOCK

    q_tile, q_ready = tiles(Q, 1).index(0), barriers(1).index(0)
    fetch(Q, (batch, head), tile * ROWS, q_tile, q_ready, True)
    Index += batch.to(gl.int64) * index_batch + head.to(gl.int64) * index_head + block.to(gl.int64) * index_row
    count = gl.load(Count + batch.to(gl.int64) * count_batch + head * count_head + block * count_row)

    sources, lists = (K, V, (batch, head // group)), (Index, count)
    about = (Sizes, None, seq_k, seq_k if SHORT_TAIL else None)
    factors = gl.full([ROWS], 0.0, gl.float32, ROW) + factor
    state = start(ROWS, DIM, ROW, OUT)
    state = walk(state, matrix(q_tile), factors, sources, lists, about, q_ready, OVERLAPPED, 0.0, SCORES, OUT)

    out, lse = finish(state, 0.0, OUT)
    store_rows(Out, out, (batch, head), tile * ROWS, q_tile)
    row = tile * ROWS + gl.arange(0, ROWS, ROW)
    gl.store(Lse + (batch * heads + head).to(gl.int64) * seq_q + row, lse, mask=row < seq_q)
