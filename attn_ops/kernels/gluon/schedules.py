"""How a Hopper kernel walks a list of key blocks: two schedules of the same steps.

sources is (K, V, plane): descriptors of tiles of one block, and the batch and head to read. lists is (Index, count),
and an Index of None lists every block. about is (Sizes, KScale, seq_k, short_tail): sizes of blocks, scales of
integers, and seq_k once more if the last block is short; all but seq_k may be None.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from .device import barriers, fetch, fetch_values, multiply_keys, multiply_values, tiles
from .softmax import hide_missing, per_thread_layout, weigh, weigh_integers

REGISTERS = {False: 128, True: 168}
"""Whether products overlap the softmax -> registers of a thread: four or three programs of 128 threads on an SM."""


@gluon.jit
def walk(
    state,
    q,
    factor,
    sources,
    lists,
    about,
    q_ready,
    OVERLAPPED: gl.constexpr,
    PEAK_LOG2: gl.constexpr,
    SCORES: gl.constexpr,
    OUT: gl.constexpr,
):
    """Bring the listed blocks into the state. q is a tile of queries that q_ready announces, factor is for its rows."""
    if OVERLAPPED:
        state = overlapped(state, q, factor, sources, lists, about, q_ready, PEAK_LOG2, SCORES, OUT)
    else:
        state = one_buffer(state, q, factor, sources, lists, about, q_ready, PEAK_LOG2, SCORES, OUT)
    return state


@gluon.jit
def one_buffer(
    state,
    q,
    factor,
    sources,
    lists,
    about,
    q_ready,
    PEAK_LOG2: gl.constexpr,
    SCORES: gl.constexpr,
    OUT: gl.constexpr,
):
    """Wait for each product, and copy the next block into the tile that it has read at once.

    With one tile of K and one of V, four programs fit on a multiprocessor and overlap one another.
    """
    acc, total, top = state
    K, V, plane = sources
    Index, count = lists
    KEYS: gl.constexpr = K.block_type.shape[2]
    k_tile, v_tile = tiles(K, 1).index(0), tiles(V, 1).index(0)
    k_ready, v_ready = barriers(1).index(0), barriers(1).index(0)
    block = listed(Index, 0)
    fetch(K, plane, block * KEYS, k_tile, k_ready, count > 0)
    fetch_values(V, plane, block * KEYS, v_tile, v_ready, count > 0)
    mbarrier.wait(q_ready, 0)
    for step in range(count):
        more = step + 1 < count
        next_block = listed(Index, gl.minimum(step + 1, count - 1))
        mbarrier.wait(k_ready, step & 1)
        scores = warpgroup_mma_wait(0, [multiply_keys(q, k_tile, SCORES)])
        fetch(K, plane, next_block * KEYS, k_tile, k_ready, more)
        weights, total, top, decay = weigh_block(scores, block, factor, about, total, top, PEAK_LOG2, SCORES)
        mbarrier.wait(v_ready, step & 1)
        acc = warpgroup_mma_wait(0, [multiply_values(weights, v_tile, acc, decay, OUT)])
        fetch_values(V, plane, next_block * KEYS, v_tile, v_ready, more)
        block = next_block
    return acc, total, top


@gluon.jit
def overlapped(
    state,
    q,
    factor,
    sources,
    lists,
    about,
    q_ready,
    PEAK_LOG2: gl.constexpr,
    SCORES: gl.constexpr,
    OUT: gl.constexpr,
):
    """Multiply q by the next block's keys during the softmax of a block, with two tiles of K and one of V."""
    acc, total, top = state
    K, V, plane = sources
    Index, count = lists
    KEYS: gl.constexpr = K.block_type.shape[2]
    k_tiles, v_tile = tiles(K, 2), tiles(V, 1).index(0)
    k_ready, v_ready = barriers(2), barriers(1).index(0)
    block = listed(Index, 0)
    next_block = listed(Index, gl.minimum(1, gl.maximum(count, 1) - 1))
    fetch(K, plane, block * KEYS, k_tiles.index(0), k_ready.index(0), count > 0)
    fetch_values(V, plane, block * KEYS, v_tile, v_ready, count > 0)
    fetch(K, plane, next_block * KEYS, k_tiles.index(1), k_ready.index(1), count > 1)
    mbarrier.wait(q_ready, 0)
    if count > 0:
        mbarrier.wait(k_ready.index(0), 0)
        scores = warpgroup_mma_wait(0, [multiply_keys(q, k_tiles.index(0), SCORES)])
        for step in range(count):
            more = step + 1 < count
            this, other = step & 1, (step + 1) & 1
            # The product with this tile has ended: the block after the next goes into it.
            later_block = listed(Index, gl.minimum(step + 2, count - 1))
            fetch(K, plane, later_block * KEYS, k_tiles.index(this), k_ready.index(this), step + 2 < count)
            # After the last block, the product is with what the tile holds, and nobody reads it.
            mbarrier.wait(k_ready.index(other), ((step + 1) >> 1) & 1, pred=more)
            next_scores = multiply_keys(q, k_tiles.index(other), SCORES)
            # Here, because ptxas moves no exponential above this branch, and so none before the product.
            mbarrier.wait(v_ready, step & 1)
            weights, total, top, decay = weigh_block(scores, block, factor, about, total, top, PEAK_LOG2, SCORES)
            next_acc = multiply_values(weights, v_tile, acc, decay, OUT)
            scores = warpgroup_mma_wait(1, [next_scores])
            acc = warpgroup_mma_wait(0, [next_acc])
            fetch_values(V, plane, next_block * KEYS, v_tile, v_ready, more)
            block, next_block = next_block, later_block
    return acc, total, top


@gluon.jit
def weigh_block(scores, block, factor, about, total, top, PEAK_LOG2: gl.constexpr, SCORES: gl.constexpr):
    """The softmax of one block. Returns what `weigh` does."""
    Sizes, KScale, seq_k, short_tail = about
    KEYS: gl.constexpr = scores.shape[1]
    HIDDEN: gl.constexpr = Sizes is not None or short_tail is not None
    if KScale is None:
        scores = hide_missing(scores, block, Sizes, short_tail, KEYS, SCORES)
        weights, total, top, decay = weigh(scores, factor, total, top, HIDDEN, PEAK_LOG2)
    else:
        LAYOUT: gl.constexpr = per_thread_layout(KEYS, gl.num_warps())
        token = 2 * gl.arange(0, 4, LAYOUT)
        # In 64 bits, so that what is the same in every step stays apart from the block's offset.
        KScale += token + block * gl.full([4], KEYS, gl.int64, LAYOUT)
        if short_tail is None:
            k_scale = gl.load(KScale)
        else:
            k_scale = gl.load(KScale, mask=block * KEYS + token < seq_k, other=0.0)
        scores = hide_missing(scores.to(gl.float32), block, Sizes, short_tail, KEYS, SCORES)
        weights, total, top, decay = weigh_integers(scores, factor, k_scale, total, top, HIDDEN, PEAK_LOG2, SCORES)
    return weights, total, top, decay


@gluon.jit
def listed(Index, entry):
    """The block that is an entry of the list. A list of None holds all of them."""
    if Index is None:  # noqa: SIM108  (as an expression, both sides would be compiled)
        block = entry
    else:
        block = gl.load(Index + entry)
    return block
