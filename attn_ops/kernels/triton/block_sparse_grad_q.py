"""Block-sparse attention, backward: the kernel for the gradient of the queries, see `block_sparse_backward`."""

from __future__ import annotations

import triton
import triton.language as tl

from .block_sparse import split_list
from .device import base_of, load, tile_mask, tile_pointers, weights_of

_BEARABLE = tl.constexpr(2.0**-18)
"""The square of the error of a tile's delta that may stay, relative to that of the rows' sums of absolute gradients.

With it grad_q in bf16 is off by 0.0025 to 0.0033, for scores of standard deviation 1 (where all of the error stays) to
256; if all of it stayed, by 0.0063 at 16 and 0.0088 at 64 (measured). In fp16 it hardly matters.
"""
_BEARABLE_WIDE = tl.constexpr(2.0**-36)
"""Likewise in fp32: grad_q is off by 2e-6 at most, and at input scale 16 by 8e-5 if all of it stayed (measured)."""


@triton.jit(
    do_not_specialize=[
        *("Lse", "GradLse", "Delta", "Norm", "Repeat", "Index", "index_batch", "index_head", "index_row"),
        *("Count", "count_batch", "count_head", "count_row", "Sizes", "tiles_q", "heads", "group", "seq_q", "seq_k"),
    ]
)
def grad_q_kernel(
    Q,
    q_strides,
    K,
    k_strides,
    V,
    v_strides,
    Out,
    out_strides,
    GradOut,
    grad_out_strides,
    GradQ,
    grad_q_strides,
    Lse,
    GradLse,
    Delta,
    Norm,
    Repeat,
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
    tiles_q,
    heads,
    group,
    seq_q,
    seq_k,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    REPEATED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradient of a tile of queries; and of every query Delta, sum(grad_out * out) - grad_lse.

    With Repeat, corrects Delta and notes there whether it was too far off; launched again, REPEATED, it begins anew
    where that is so.
    """
    EDGE_KEYS: tl.constexpr = KEYS if KEYS <= 32 else KEYS // 2  # masks take registers, as in the forward
    TILES_PER_BLOCK: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS
    tile = tl.program_id(0) % tiles_q
    if CAUSAL:
        tile = tiles_q - 1 - tile  # the longest lists start first
    batch = (tl.program_id(0) // tiles_q // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles_q % heads).to(tl.int64)
    block = tile // TILES_PER_BLOCK
    row_in_block = tile % TILES_PER_BLOCK * ROWS + tl.arange(0, ROWS)
    row = block * BLOCK_Q + row_in_block
    row_exists = (row < seq_q) & (row_in_block < BLOCK_Q)
    first_row = block * BLOCK_Q + tile % TILES_PER_BLOCK * ROWS

    element = tile_mask(row_exists, HEAD_DIM, DIM)
    of_row = (batch * heads + head) * seq_q + row
    lse = tl.load(Lse + of_row, mask=row_exists, other=float("-inf"))
    GradOut = tile_pointers(GradOut, grad_out_strides, batch, head, first_row, ROWS, DIM)
    grad_out = tl.load(GradOut, mask=element, other=0.0)
    grad_lse = tl.zeros([ROWS], tl.float32)
    if REPEATED:
        if tl.load(Repeat + tl.program_id(0)) == 0:
            return
        delta = tl.load(Delta + of_row, mask=row_exists, other=0.0)
    else:
        out = tl.load(tile_pointers(Out, out_strides, batch, head, first_row, ROWS, DIM), mask=element, other=0.0)
        if GradLse is not None:
            grad_lse = tl.load(GradLse + of_row, mask=lse != float("-inf"), other=0.0)
        delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1) - grad_lse
    q = tl.load(tile_pointers(Q, q_strides, batch, head, first_row, ROWS, DIM), mask=element, other=0.0)

    K += batch * k_strides[0] + head // group * k_strides[1]
    V += batch * v_strides[0] + head // group * v_strides[1]
    Index += batch * index_batch + head * index_head + block.to(tl.int64) * index_row
    count = tl.load(Count + batch * count_batch + head * count_head + block * count_row)
    whole, seen = count, count
    if CAUSAL:
        whole, seen = split_list(Index, count, tl.minimum(first_row + 1, seq_k), first_row + ROWS, BLOCK_K)
    elif SHORT_TAIL:
        whole, seen = split_list(Index, count, seq_k, seq_k, BLOCK_K)

    rows = (q, grad_out, base_of(lse), delta, row)
    keys = (K, k_strides[2], V, v_strides[2], Sizes, seq_k)
    nothing = tl.zeros([ROWS], tl.float32)
    state = (tl.zeros([ROWS, DIM], tl.float32), nothing, nothing, nothing)
    state = _walk(state, rows, factor, keys, Index, 0, whole, False, False, BLOCK_K, KEYS, HEAD_DIM, WIDE)
    if CAUSAL or SHORT_TAIL:
        state = _walk(
            state, rows, factor, keys, Index, whole, seen, CAUSAL, SHORT_TAIL, BLOCK_K, EDGE_KEYS, HEAD_DIM, WIDE
        )

    grad, error, size, total = state
    if WIDE:
        # lse in fp32 is off by as much as a score would be: the weights are divided by what they add up to.
        norm = tl.where(total == 0.0, 0.0, 1.0 / total)
        grad, error, size = grad * norm[:, None], error * norm, size * norm
        tl.store(Norm + of_row, norm, mask=row_exists)
    GradQ = tile_pointers(GradQ, grad_q_strides, batch, head, first_row, ROWS, DIM)
    tl.store(GradQ, (grad * scale).to(GradQ.dtype.element_ty), mask=element)
    if not REPEATED:
        if Repeat is not None:
            error -= grad_lse
            delta += error
            too_far = tl.sum(error * error, 0) > tl.sum(size * size, 0) * (_BEARABLE_WIDE if WIDE else _BEARABLE)
            tl.store(Repeat + tl.program_id(0), too_far.to(tl.uint8))
        tl.store(Delta + of_row, delta, mask=row_exists)


@triton.jit
def _walk(
    state,
    rows,
    factor,
    keys,
    Index,
    first,
    stop,
    CAUSAL: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add the listed blocks first ... stop - 1 to the state.

    A state is (grad, error, size, total): the gradient without its factor `scale`; of every row of the scores' gradient
    the sum, which less grad_lse is the error of delta, and the sum of absolute values; and if WIDE the sum of weights.
    """
    TILES_PER_BLOCK: tl.constexpr = (BLOCK_K + KEYS - 1) // KEYS
    grad, error, size, total = state
    q, grad_out, base, delta, row = rows
    K, k_stride, V, v_stride, Sizes, seq_k = keys
    MASKED: tl.constexpr = SHORT_TAIL or BLOCK_K % KEYS != 0 or Sizes is not None
    DIM: tl.constexpr = q.shape[1]
    token = tl.arange(0, KEYS)
    dim = tl.arange(0, DIM)
    block = tl.load(Index + first, mask=first < stop, other=0)
    valid = tl.load(Sizes + block) if Sizes is not None else BLOCK_K
    for step in tl.range(first * TILES_PER_BLOCK, stop * TILES_PER_BLOCK):
        # Loaded one step ahead: an address that waits for a load of its own step would halve the pipeline's depth.
        next_block = tl.load(Index + tl.minimum((step + 1) // TILES_PER_BLOCK, stop - 1))
        offset_in_block = step % TILES_PER_BLOCK * KEYS
        begin = block * BLOCK_K + offset_in_block
        mask = None
        if MASKED:
            exists = token < tl.minimum(valid - offset_in_block, seq_k - begin)
            mask = exists[:, None]
        if HEAD_DIM != DIM:
            channel = (dim < HEAD_DIM)[None, :]
            mask = channel if mask is None else mask & channel
        row_of_key = (begin + token)[:, None].to(tl.int64)
        k = load(K + row_of_key * k_stride + dim[None, :], mask)
        weights = weights_of(q, k.T, factor, base[:, None], WIDE)
        if MASKED:
            weights = tl.where(exists[None, :], weights, 0.0)
        if CAUSAL:
            weights = tl.where((begin + token)[None, :] <= row[:, None], weights, 0.0)
        v = load(V + row_of_key * v_stride + dim[None, :], mask)
        grad_scores = (weights * (tl.dot(grad_out, v.T, input_precision="ieee") - delta[:, None])).to(k.dtype)
        grad = tl.dot(grad_scores, k, grad, input_precision="ieee")
        entered = grad_scores.to(tl.float32)  # not before it is rounded, which would take twice the registers
        error += tl.sum(entered, 1)
        size += tl.sum(tl.abs(entered), 1)
        if WIDE:
            total += tl.sum(weights, 1)
        block = next_block
        if Sizes is not None:
            valid = tl.load(Sizes + next_block)
    return grad, error, size, total
