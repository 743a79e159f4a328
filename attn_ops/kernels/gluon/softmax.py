"""The running softmax of the Hopper kernels, in base 2.

A state is (acc, total, top) as in the Triton kernels: the weighted sum of values, the sum of weights, and the largest
scaled score seen so far. A row that has seen no key has total 0 and top -inf, and never makes a NaN.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LEAST_FACTOR = gl.constexpr(2.0**-120)
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def by_thread(keys, warps):
    """The layout of scores (rows, keys), as a wgmma gives them, of scores (rows, keys // 8, 4, 2).

    The last but one axis is that of the four threads which share a row: each holds 2 of every 8 keys.
    """
    registers = [[0, 0, 0, 1], [8, 0, 0, 0], *([0, 1 << i, 0, 0] for i in range((keys // 8).bit_length() - 1))]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    of_warps = [[16 << i, 0, 0, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [16 * warps, keys // 8, 4, 2])


@gluon.constexpr_function
def per_thread_layout(keys, warps):
    """That of one number for each of these threads, (4,)."""
    return gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, by_thread(keys, warps))))


@gluon.constexpr_function
def per_row_layout(keys, warps):
    """That of one number for each row of them, (rows,)."""
    return gl.SliceLayout(1, gl.SliceLayout(1, gl.SliceLayout(3, by_thread(keys, warps))))


@gluon.jit
def start(ROWS: gl.constexpr, DIM: gl.constexpr, ROW: gl.constexpr, OUT: gl.constexpr):
    """Return the state before the first key."""
    acc = gl.zeros([ROWS, DIM], gl.float32, OUT)
    total = gl.full([ROWS], 0.0, gl.float32, ROW)
    top = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    return acc, total, top


@gluon.jit
def hide_missing(scores, block, Sizes, seq_k, KEYS: gl.constexpr, SCORES: gl.constexpr):
    """Give keys that do not exist the score -inf. With Sizes and seq_k None, all do."""
    if Sizes is not None or seq_k is not None:
        exist = KEYS
        if seq_k is not None:
            exist = seq_k - block * KEYS
        if Sizes is not None:
            exist = gl.minimum(exist, gl.load(Sizes + block))
        if exist < KEYS:  # a branch: few blocks have such keys, and masks would cost a tenth of a step
            token = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
            scores = gl.where((token < exist)[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def weigh(scores, factor, total, top, HIDDEN: gl.constexpr, PEAK_LOG2: gl.constexpr):
    """Turn scores (M, N) into weights 2 ** (scores * factor - top + PEAK_LOG2).

    factor (M,) must be positive, so that the largest score stays the largest and the product folds into one FMA.
    Returns the weights, the new total and top, and the decay (M,) that brings acc to the new top.
    """
    new_top = gl.maximum(top, gl.max(scores, 1) * factor)
    finite_top = finite(new_top, HIDDEN)
    weights = gl.exp2(scores * factor[:, None] - (finite_top - PEAK_LOG2)[:, None])
    decay = gl.exp2(top - finite_top)
    return weights, total * decay + gl.sum(weights, 1), new_top, decay


@gluon.jit
def weigh_integers(
    scores, factor, k_scale, total, top, HIDDEN: gl.constexpr, PEAK_LOG2: gl.constexpr, SCORES: gl.constexpr
):
    """Likewise scores of integers, with the scales of keys 0, 2, 4 and 6 of every 8, which keys 1, 3, 5 and 7 share.

    A thread holds keys of one scale only, so that four scales cost no more than one.
    """
    ROWS: gl.constexpr = scores.shape[0]
    KEYS: gl.constexpr = scores.shape[1]
    BY_THREAD: gl.constexpr = by_thread(KEYS, gl.num_warps())
    scores = gl.convert_layout(scores.reshape([ROWS, KEYS // 8, 4, 2]), BY_THREAD, assert_trivial=True)
    factors = factor[:, None] * k_scale[None, :]
    if HIDDEN:
        factors = gl.maximum(factors, LEAST_FACTOR)  # keeps -inf * factor from being NaN
    new_top = gl.maximum(top, gl.max(gl.max(gl.max(scores, 3), 1) * factors, 1))
    finite_top = finite(new_top, HIDDEN)
    base = (finite_top - PEAK_LOG2)[:, None][:, None, :][:, :, :, None]
    weights = gl.exp2(scores * factors[:, None, :][:, :, :, None] - base)
    decay = gl.exp2(top - finite_top)
    total = total * decay + gl.sum(gl.sum(gl.sum(weights, 3), 1), 1)
    return gl.convert_layout(weights.reshape([ROWS, KEYS]), SCORES, assert_trivial=True), total, new_top, decay


@gluon.jit
def finite(top, HIDDEN: gl.constexpr):
    """What may be subtracted from scores: 0 where all were hidden, which can only be if some are."""
    if HIDDEN:
        top = gl.where(top == float("-inf"), 0.0, top)
    return top


@gluon.jit
def finish(state, PEAK_LOG2: gl.constexpr, OUT: gl.constexpr):
    """Return the output (M, D) and the natural lse (M,): 0 and -inf for a row that saw no key."""
    acc, total, top = state
    some = gl.where(total == 0.0, 1.0, total)
    lse = gl.where(total == 0.0, float("-inf"), top + gl.log2(some) - PEAK_LOG2)
    share = gl.convert_layout(1.0 / some, gl.SliceLayout(1, OUT))
    return acc * share[:, None], lse * _LN_2
