"""Device functions that the kernels share: masked loads, and the running softmax in base 2 (exp2 is one instruction).

A state is (acc, total, top): the weighted sum of values, the sum of weights, and the largest scaled score seen so far;
the weights are relative to top. A row that has seen no key has total 0 and top -inf, and never makes a NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def load(pointers, mask):
    """Load, 0 where the mask is False; a mask of None is no mask, which costs nothing."""
    if mask is None:  # noqa: SIM108  (as an expression, both sides would be compiled)
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def tile_pointers(X, strides, batch, head, first, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Pointers to tokens first ... first + ROWS - 1 of X (batch, head, token, channel), (ROWS, DIM)."""
    X += batch * strides[0] + head * strides[1] + first.to(tl.int64) * strides[2]
    return X + tl.arange(0, ROWS)[:, None] * strides[2] + tl.arange(0, DIM)[None, :]


@triton.jit
def tile_mask(row_exists, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Mask of a tile (ROWS, DIM): the rows that exist, and the channels before the padding."""
    return row_exists[:, None] & (tl.arange(0, DIM) < HEAD_DIM)[None, :]


@triton.jit
def start(ROWS: tl.constexpr, DIM: tl.constexpr):
    """Return the state before the first key."""
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    return acc, total, top


@triton.jit
def weigh(scores, factor, total, top, PEAK_LOG2: tl.constexpr):
    """Turn scores (M, N) into weights 2 ** (scores * factor - top + PEAK_LOG2).

    factor (M,) must be positive, so that the largest score stays the largest and the product folds into one FMA.
    Returns the weights, the new total and top, and the decay (M,) that brings acc to the new top.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.math.exp2(scores * factor[:, None] - (finite_top - PEAK_LOG2)[:, None])
    decay = tl.math.exp2(top - finite_top)
    return weights, total * decay + tl.sum(weights, 1), new_top, decay


@triton.jit
def finish(acc, total, top, PEAK_LOG2: tl.constexpr):
    """Return the output (M, D) and the base-2 lse (M,): 0 and -inf for a row that saw no key."""
    some = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), top + tl.math.log2(some) - PEAK_LOG2)
    return acc / some[:, None], lse


@triton.jit
def weights_of(a, b, factor, base, WIDE: tl.constexpr):
    """Weights 2 ** (a @ b * factor - base), fp32; if WIDE the exponent is computed in fp64, of fp32 a and b.

    An exponent of 1000 in fp32 would be off by 3e-5, and a weight by as much of itself.
    """
    if WIDE:
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return tl.math.exp2((product * factor - base).to(tl.float32))


@triton.jit
def base_of(lse):
    """The lse in base 2, for weights 2 ** (score - base); infinite in a row that saw no key, where they are 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)
