"""Block-sparse attention, backward: the kernel for the gradients of keys and values, see `block_sparse_backward`."""

from __future__ import annotations

import triton
import triton.language as tl

from .block_sparse import split_list
from .device import base_of, load, tile_mask, tile_pointers, weights_of


@triton.jit(
    do_not_specialize=[
        *("Lse", "Delta", "Norm", "Index", "index_batch", "index_head", "index_row"),
        *("Count", "count_batch", "count_head", "count_row", "Sizes", "tiles_k", "kv_heads", "group", "seq_q", "seq_k"),
    ]
)
def grad_kv_kernel(
    Q,
    q_strides,
    K,
    k_strides,
    V,
    v_strides,
    GradOut,
    grad_out_strides,
    GradK,
    grad_k_strides,
    GradV,
    grad_v_strides,
    Lse,
    Delta,
    Norm,
    Index,
    index_batch,
    index_head,
    index_row,
    Count,
    count_batch,
    count_head,
    count_row,
    Sizes,
    scale,
    factor,
    tiles_k,
    kv_heads,
    group,
    seq_q,
    seq_k,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of a tile of keys and values. Index lists, in ascending order, the query blocks of each key block."""
    TILES_PER_BLOCK: tl.constexpr = (BLOCK_K + KEYS - 1) // KEYS
    EDGE_ROWS: tl.constexpr = ROWS if ROWS <= 16 else ROWS // 2  # masks take registers, as in the forward
    tile = tl.program_id(0) % tiles_k
    batch = (tl.program_id(0) // tiles_k // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles_k % kv_heads).to(tl.int64)
    block = tile // TILES_PER_BLOCK
    offset_in_block = tile % TILES_PER_BLOCK * KEYS
    first_key = block * BLOCK_K + offset_in_block
    key = first_key + tl.arange(0, KEYS)
    key_in_block = offset_in_block + tl.arange(0, KEYS)
    key_exists = (key < seq_k) & (key_in_block < BLOCK_K)
    valid = tl.load(Sizes + block) if Sizes is not None else BLOCK_K

    element = tile_mask(key_exists & (key_in_block < valid), HEAD_DIM, DIM)
    k = tl.load(tile_pointers(K, k_strides, batch, kv_head, first_key, KEYS, DIM), mask=element, other=0.0)
    v = tl.load(tile_pointers(V, v_strides, batch, kv_head, first_key, KEYS, DIM), mask=element, other=0.0)
    Index += batch * index_batch + kv_head * index_head + block.to(tl.int64) * index_row
    count = tl.load(Count + batch * count_batch + kv_head * count_head + block * count_row)
    count = tl.where(offset_in_block < valid, count, 0)
    Q += batch * q_strides[0] + kv_head * group * q_strides[1]
    GradOut += batch * grad_out_strides[0] + kv_head * group * grad_out_strides[1]
    first_row = (batch * kv_heads + kv_head) * group * seq_q
    rows = (Q, q_strides, GradOut, grad_out_strides, Lse, Delta, Norm, first_row, seq_q, group)
    grads = (tl.zeros([KEYS, DIM], tl.float32), tl.zeros([KEYS, DIM], tl.float32))
    keys = (k, v, key)
    first = 0
    if CAUSAL:
        # Query blocks that end before the first key see none, and those that begin at the last or after it see all.
        last_key = first_key + KEYS - 1
        hidden, first = split_list(Index, count, first_key // BLOCK_Q * group, tl.cdiv(last_key, BLOCK_Q) * group, 1)
        grads = _walk(
            grads, keys, factor, rows, Index, hidden, first, True, SHORT_TAIL, GROUPED, BLOCK_Q, EDGE_ROWS, HEAD_DIM
        )
    grads = _walk(grads, keys, factor, rows, Index, first, count, False, SHORT_TAIL, GROUPED, BLOCK_Q, ROWS, HEAD_DIM)

    # A key that does not exist was given weights as well, which reach no other key's gradient.
    shown = (key_in_block < valid)[:, None]
    element = tile_mask(key_exists, HEAD_DIM, DIM)
    GradK = tile_pointers(GradK, grad_k_strides, batch, kv_head, first_key, KEYS, DIM)
    GradV = tile_pointers(GradV, grad_v_strides, batch, kv_head, first_key, KEYS, DIM)
    tl.store(GradK, tl.where(shown, grads[0] * scale, 0.0).to(GradK.dtype.element_ty), mask=element)
    tl.store(GradV, tl.where(shown, grads[1], 0.0).to(GradV.dtype.element_ty), mask=element)


@triton.jit
def _walk(
    grads,
    keys,
    factor,
    rows,
    Index,
    first,
    stop,
    CAUSAL: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Add the query blocks first ... stop - 1 of the list to the gradients; that of k is without its factor `scale`."""
    TILES_PER_BLOCK: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS
    MASKED: tl.constexpr = SHORT_TAIL or BLOCK_Q % ROWS != 0
    grad_k, grad_v = grads
    k, v, key = keys
    Q, q_strides, GradOut, grad_out_strides, Lse, Delta, Norm, first_row, seq_q, group = rows
    DIM: tl.constexpr = k.shape[1]
    token = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    entry = tl.load(Index + first, mask=first < stop, other=0)
    for step in tl.range(first * TILES_PER_BLOCK, stop * TILES_PER_BLOCK):
        # Loaded one step ahead, as in the forward.
        next_entry = tl.load(Index + tl.minimum((step + 1) // TILES_PER_BLOCK, stop - 1))
        head = (entry % group).to(tl.int64) if GROUPED else 0
        block = entry // group if GROUPED else entry
        offset_in_block = step % TILES_PER_BLOCK * ROWS
        begin = block * BLOCK_Q + offset_in_block
        of_row = first_row + head * seq_q + begin + token
        mask = None
        if MASKED:
            exists = token < tl.minimum(BLOCK_Q - offset_in_block, seq_q - begin)
            mask = exists[:, None]
            lse = tl.load(Lse + of_row, mask=exists, other=float("-inf"))
            delta = tl.load(Delta + of_row, mask=exists, other=0.0)
        else:
            lse = tl.load(Lse + of_row)
            delta = tl.load(Delta + of_row)
        if HEAD_DIM != DIM:
            channel = (dim < HEAD_DIM)[None, :]
            mask = channel if mask is None else mask & channel
        row = (begin + token)[:, None].to(tl.int64)
        q = load(Q + head * q_strides[1] + row * q_strides[2] + dim[None, :], mask)
        weights = weights_of(k, q.T, factor, base_of(lse)[None, :], Norm is not None)
        if Norm is not None:
            weights *= load(Norm + of_row, exists if MASKED else None)[None, :]
        if CAUSAL:
            weights = tl.where(key[:, None] <= (begin + token)[None, :], weights, 0.0)
        grad_out = load(GradOut + head * grad_out_strides[1] + row * grad_out_strides[2] + dim[None, :], mask)
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
        grad_scores = weights * (tl.dot(v, grad_out.T, input_precision="ieee") - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision="ieee")
        entry = next_entry
    return grad_k, grad_v
