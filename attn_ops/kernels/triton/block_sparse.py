"""Block-sparse attention, forward, in Triton, for sm_80 and newer: pointer loads, or from sm_90 on the copy engine.

One program computes one tile of queries of one head and walks its list of key blocks. The list ascends, so blocks that
need no mask come first, and the few at the edge (causal diagonal, short last block) follow in a loop of their own. With
descriptors the first loop takes a tile of keys and values by one copy; what is computed is the same, bit by bit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import empty_result
from .descriptors import addressable, descriptor, without_padding
from .device import LN_2, LOG2_E, finish, load, start, weigh
from .tiles import block_sparse_tile, on_device, padded_head_dim, target_arch

_LEAST_SCALE = 2.0**-100
_COUNT_CHUNK = tl.constexpr(128)


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
    causal: bool,
    scale: float,
    descriptors: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of every block of queries to its listed blocks of keys.

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16, D up to 256, unit stride on D.
        k: (B, Hkv, Sk, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        block_index: (B or 1, Hq or 1, nq, max_blocks) int32, ascending within count.
        block_count: (B or 1, Hq or 1, nq) int32.
        key_sizes: (nk,) int32, the number of valid tokens at the start of each key block, or None for all.
        block_q: tokens of a block of queries.
        block_k: tokens of a block of keys.
        causal: token i sees keys 0 ... i (top-left).
        scale: factor on the scores.
        descriptors: copy keys and values by descriptor where their rows start at multiples of 16 bytes; sm_90 or newer,
            block_k a multiple of 16. With key_sizes, v is copied to clear its padding.

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
    descriptors = descriptors and addressable(k) and addressable(v)
    if descriptors and key_sizes is not None:
        v = without_padding(v, key_sizes, block_k)
    batch, heads, seq_q, head_dim = q.shape
    seq_k, dim = k.shape[2], padded_head_dim(head_dim)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    with on_device(q):
        tile = block_sparse_tile(target_arch(), q.element_size(), dim, block_q, block_k)
        tiles_q = triton.cdiv(seq_q, block_q) * triton.cdiv(block_q, tile.rows)
        copied = (descriptor(x, tile.keys, dim) if descriptors else None for x in (k, v))
        _forward[(tiles_q * heads * batch,)](
            *(q, q.stride()[:3], k, k.stride()[:3], v, v.stride()[:3], *copied, out, out.stride()[:3], lse),
            *(block_index, *broadcast_strides(block_index), block_count, *broadcast_strides(block_count), key_sizes),
            *(max(scale, _LEAST_SCALE) * LOG2_E, tiles_q, heads, heads // k.shape[1], seq_q, seq_k),
            CAUSAL=causal,
            SHORT_TAIL=seq_k % block_k != 0,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            ROWS=tile.rows,
            KEYS=tile.keys,
            HEAD_DIM=head_dim,
            DIM=dim,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, lse


attention_by_descriptors = functools.partial(attention, descriptors=True)


def broadcast_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of (batch, head, query block), 0 where one entry serves them all."""
    batch, head, row = tensor.stride()[:3]
    return (0 if tensor.shape[0] == 1 else batch), (0 if tensor.shape[1] == 1 else head), row


@triton.jit(
    do_not_specialize=[
        *("Lse", "Index", "index_batch", "index_head", "index_row", "Count", "count_batch", "count_head", "count_row"),
        *("Sizes", "tiles_q", "heads", "group", "seq_q", "seq_k"),
    ]
)
def _forward(
    Q,
    q_strides,
    K,
    k_strides,
    V,
    v_strides,
    KTiles,
    VTiles,
    Out,
    out_strides,
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
    CAUSAL: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    TILES_PER_BLOCK: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS
    EDGE_KEYS: tl.constexpr = KEYS if KEYS <= 32 else KEYS // 2  # masks take registers, and half a tile gives them back
    tile = tl.program_id(0) % tiles_q
    if CAUSAL:
        tile = tiles_q - 1 - tile  # the longest lists start first
    batch = (tl.program_id(0) // tiles_q // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles_q % heads).to(tl.int64)
    kv_head = head // group

    block = tile // TILES_PER_BLOCK
    row_in_block = tile % TILES_PER_BLOCK * ROWS + tl.arange(0, ROWS)
    row = block * BLOCK_Q + row_in_block
    row_exists = (row < seq_q) & (row_in_block < BLOCK_Q)
    dim = tl.arange(0, DIM)
    element = row_exists[:, None] & (dim < HEAD_DIM)[None, :]
    first_row = block * BLOCK_Q + tile % TILES_PER_BLOCK * ROWS

    Q += batch * q_strides[0] + head * q_strides[1] + first_row.to(tl.int64) * q_strides[2]
    K += batch * k_strides[0] + kv_head * k_strides[1]
    V += batch * v_strides[0] + kv_head * v_strides[1]
    q = tl.load(Q + tl.arange(0, ROWS)[:, None] * q_strides[2] + dim[None, :], mask=element, other=0.0)

    Index += batch * index_batch + head * index_head + block.to(tl.int64) * index_row
    count = tl.load(Count + batch * count_batch + head * count_head + block * count_row)
    whole, seen = count, count
    if CAUSAL:
        whole, seen = split_list(Index, count, tl.minimum(first_row + 1, seq_k), first_row + ROWS, BLOCK_K)
    elif SHORT_TAIL:
        whole, seen = split_list(Index, count, seq_k, seq_k, BLOCK_K)

    state = start(ROWS, DIM)
    factors = tl.zeros([ROWS], tl.float32) + factor
    keys = (K, k_strides[2], V, v_strides[2], Sizes, seq_k)
    copies, uncopied = (KTiles, VTiles, batch.to(tl.int32), kv_head.to(tl.int32)), (None, None, 0, 0)
    state = _attend(state, q, factors, row, keys, copies, Index, 0, whole, False, False, BLOCK_K, KEYS, HEAD_DIM)
    if CAUSAL or SHORT_TAIL:
        state = _attend(
            state, q, factors, row, keys, uncopied, Index, whole, seen, CAUSAL, SHORT_TAIL, BLOCK_K, EDGE_KEYS, HEAD_DIM
        )

    out, lse = finish(state[0], state[1], state[2], 0.0)
    Out += batch * out_strides[0] + head * out_strides[1] + first_row.to(tl.int64) * out_strides[2]
    out_offset = tl.arange(0, ROWS)[:, None] * out_strides[2] + dim[None, :]
    tl.store(Out + out_offset, out.to(Out.dtype.element_ty), mask=element)
    tl.store(Lse + (batch * heads + head) * seq_q + row, lse * LN_2, mask=row_exists)


@triton.jit
def split_list(Index, count, whole_end, seen_end, BLOCK_K: tl.constexpr):
    """How many listed blocks end by token whole_end, and how many begin before token seen_end."""
    whole = 0
    seen = 0
    for at in range(0, count, _COUNT_CHUNK):
        entry = at + tl.arange(0, _COUNT_CHUNK)
        block = tl.load(Index + entry, mask=entry < count, other=2147483647)
        whole += tl.sum((block < whole_end // BLOCK_K).to(tl.int32))
        seen += tl.sum((block < (seen_end + BLOCK_K - 1) // BLOCK_K).to(tl.int32))
    return whole, seen


@triton.jit
def _attend(
    state,
    q,
    factors,
    row,
    keys,
    copies,
    Index,
    first,
    stop,
    CAUSAL: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Bring the listed blocks first ... stop - 1 into the state."""
    TILES_PER_BLOCK: tl.constexpr = (BLOCK_K + KEYS - 1) // KEYS
    acc, total, top = state
    K, k_stride, V, v_stride, Sizes, seq_k = keys
    KTiles, VTiles, batch, kv_head = copies
    MASKED: tl.constexpr = SHORT_TAIL or BLOCK_K % KEYS != 0 or Sizes is not None
    DIM: tl.constexpr = q.shape[1]
    token = tl.arange(0, KEYS)
    dim = tl.arange(0, DIM)
    block = tl.load(Index + first, mask=first < stop, other=0)
    size = tl.load(Sizes + block) if Sizes is not None else BLOCK_K
    for step in tl.range(first * TILES_PER_BLOCK, stop * TILES_PER_BLOCK):
        # Loaded one step ahead: an address that waits for a load of its own step would halve the pipeline's depth.
        next_block = tl.load(Index + tl.minimum((step + 1) // TILES_PER_BLOCK, stop - 1))
        offset_in_block = step % TILES_PER_BLOCK * KEYS
        begin = block * BLOCK_K + offset_in_block
        mask = None
        if MASKED:
            exists = token < tl.minimum(size - offset_in_block, seq_k - begin)
            mask = exists[:, None]
        if HEAD_DIM != DIM:
            channel = (dim < HEAD_DIM)[None, :]
            mask = channel if mask is None else mask & channel
        row_of_key = (begin + token)[:, None].to(tl.int64)
        if KTiles is None:
            k = load(K + row_of_key * k_stride + dim[None, :], mask)
        else:
            k = KTiles.load([batch, kv_head, begin, 0]).reshape(KEYS, DIM)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            scores = tl.where(exists[None, :], scores, float("-inf"))
        if CAUSAL:
            scores = tl.where((begin + token)[None, :] <= row[:, None], scores, float("-inf"))
        weights, total, top, decay = weigh(scores, factors, total, top, 0.0)
        if VTiles is None:
            v = load(V + row_of_key * v_stride + dim[None, :], mask)
        else:
            v = VTiles.load([batch, kv_head, begin, 0]).reshape(KEYS, DIM)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        block = next_block
        if Sizes is not None:
            size = tl.load(Sizes + next_block)
    return acc, total, top
