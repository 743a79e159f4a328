"""Block-sparse attention, backward, in Triton for Hopper (sm_90): one kernel for all three gradients, by key block.

Of each pair of blocks it computes scores and weights once, five products where the split kernels of
`block_sparse_backward` take seven. The price: a tile of queries is reached by many programs, whose shares the copy
engine adds up in memory, in fp32 and in whatever order they come. So grad_q is another in its last bits every run.

And delta = sum(grad_out * out) is taken from the rounded out: what the split kernels correct it by is known only after
a walk over all keys. That leaves an error in grad_q and grad_k where the softmax is nearly one-hot. Relative L2 errors,
the largest of 16 small problems of normal inputs, measured in the interpreter:

    inputs times             1               4               16
    bf16 fused, split        2.7e-3, 2.7e-3  7.1e-3, 2.9e-3  1.3e-2, 3.5e-3
    fp16 fused, split        3.3e-4, 3.2e-4  9.8e-4, 9.8e-4  1.5e-3, 1.3e-3
"""

from __future__ import annotations

import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...errors import UnsupportedError
from .block_sparse import broadcast_strides, split_list
from .device import LOG2_E, base_of, load, tile_pointers
from .tiles import on_device
from .transpose import transposed_lists

_ROWS, _KEYS, _STAGES = 64, 64, 2
_WARPS = {64: 4, 128: 8}
"""By head dimension: with 4 warps, 128 channels spill."""


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `block_sparse.attention` for q, k and v, in their layouts; that of q is not deterministic.

    Args:
        grad_out: (B, Hq, Sq, D) in q's dtype.
        grad_lse: (B, Hq, Sq) fp32, or None for 0.
        out: (B, Hq, Sq, D) of the forward; the gradients of q and k are as good as its rounding.
        lse: (B, Hq, Sq) fp32, likewise.
        q: (B, Hq, Sq, D) fp16 or bf16, D 64 or 128, unit stride on D.
        k: (B, Hkv, Sk, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        block_index: (B or 1, Hq or 1, nq, max_blocks) int32, ascending within count.
        block_count: (B or 1, Hq or 1, nq) int32.
        key_sizes: (nk,) int32, the number of valid tokens at the start of each key block, or None for all.
        block_q: tokens of a block of queries, a multiple of 64.
        block_k: tokens of a block of keys, 64.
        causal: token i sees keys 0 ... i (top-left).
        scale: factor on the scores.

    Raises:
        UnsupportedError: under `torch.use_deterministic_algorithms(True)`; with `warn_only=True` it warns.
    """
    _alert_not_deterministic()
    if q.numel() == 0 or k.numel() == 0 or block_index.shape[-1] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_out, out, block_index = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_out, out, block_index))
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    grad_q, grad_k, grad_v = map(torch.empty_like, (q, k, v))
    (batch, heads, seq_q, dim), (kv_heads, seq_k) = q.shape, k.shape[1:3]
    blocks_q, group = triton.cdiv(seq_q, block_q), heads // kv_heads
    padded = batch, heads, blocks_q * block_q
    delta, base = (lse.new_empty(padded) for _ in range(2))
    sums = lse.new_zeros((*padded, dim))
    with on_device(q):
        tiles = blocks_q * block_q // _ROWS
        _prepare[(tiles * heads * batch,)](
            *(out, out.stride()[:3], grad_out, grad_out.stride()[:3], lse, grad_lse, delta, base, tiles, heads, seq_q),
            ROWS=_ROWS,
            DIM=dim,
        )
        lists, counts = transposed_lists(block_index, block_count, triton.cdiv(seq_k, block_k), group)
        tiles = triton.cdiv(seq_k, _KEYS)
        fused_kernel[(tiles * kv_heads * batch,)](
            *(q, q.stride()[:3], k, k.stride()[:3], v, v.stride()[:3], grad_out, grad_out.stride()[:3]),
            TensorDescriptor.from_tensor(sums.view(-1, dim), [_ROWS, dim]),
            *(grad_k, grad_k.stride()[:3], grad_v, grad_v.stride()[:3], delta, base),
            *(lists, *broadcast_strides(lists), counts, *broadcast_strides(counts), key_sizes),
            *(scale, scale * LOG2_E, tiles, kv_heads, group, seq_q, seq_k, padded[2]),
            BLOCK_Q=block_q,
            CAUSAL=causal,
            SHORT_ROWS=seq_q % block_q != 0,
            SHORT_KEYS=seq_k % block_k != 0,
            GROUPED=group > 1,
            ROWS=_ROWS,
            KEYS=_KEYS,
            DIM=dim,
            num_warps=_WARPS[dim],
            num_stages=_STAGES,
        )
    return torch.mul(sums[:, :, :seq_q], scale, out=grad_q), grad_k, grad_v


def _alert_not_deterministic() -> None:
    """Do what PyTorch's own operators without a deterministic kernel do."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        'block_sparse_attention: the backward of provider "triton_fused_backward" sums grad_q in another order every '
        'run, and torch.use_deterministic_algorithms(True) is set. Name the provider "triton", whose backward is '
        "deterministic, or set warn_only=True."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise UnsupportedError(message)
    warnings.warn(message, UserWarning, stacklevel=2)


@triton.jit(do_not_specialize=["Lse", "GradLse", "Delta", "Base", "tiles_q", "heads", "seq_q"])
def _prepare(
    Out,
    out_strides,
    GradOut,
    grad_out_strides,
    Lse,
    GradLse,
    Delta,
    Base,
    tiles_q,
    heads,
    seq_q,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Of every query, sum(grad_out * out) - grad_lse and its lse in base 2; what pads the last block weighs nothing."""
    first_row = tl.program_id(0) % tiles_q * ROWS
    of_head = (tl.program_id(0) // tiles_q).to(tl.int64)
    row = first_row + tl.arange(0, ROWS)
    exists = row < seq_q
    element = exists[:, None]
    batch, head = of_head // heads, of_head % heads
    out = tl.load(tile_pointers(Out, out_strides, batch, head, first_row, ROWS, DIM), mask=element, other=0.0)
    GradOut = tile_pointers(GradOut, grad_out_strides, batch, head, first_row, ROWS, DIM)
    grad_out = tl.load(GradOut, mask=element, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    if GradLse is not None:
        delta -= tl.load(GradLse + of_head * seq_q + row, mask=exists, other=0.0)
    lse = tl.load(Lse + of_head * seq_q + row, mask=exists, other=float("-inf"))
    to = of_head * tiles_q * ROWS + row
    tl.store(Delta + to, delta)
    tl.store(Base + to, base_of(lse))


@triton.jit(
    do_not_specialize=[
        *("Delta", "Base", "Index", "index_batch", "index_head", "index_row", "Count", "count_batch", "count_head"),
        *("count_row", "Sizes", "tiles_k", "kv_heads", "group", "seq_q", "seq_k", "padded_q"),
    ]
)
def fused_kernel(
    Q,
    q_strides,
    K,
    k_strides,
    V,
    v_strides,
    GradOut,
    grad_out_strides,
    Sums,
    GradK,
    grad_k_strides,
    GradV,
    grad_v_strides,
    Delta,
    Base,
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
    padded_q,
    BLOCK_Q: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHORT_ROWS: tl.constexpr,
    SHORT_KEYS: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Gradients of a block of keys and values, and its share of those of the queries that list it, added to Sums.

    Index lists, in ascending order, the query blocks of each key block. Sums (B * Hq * padded_q, D) is without its
    factor `scale`.
    """
    block = tl.program_id(0) % tiles_k
    batch = (tl.program_id(0) // tiles_k // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles_k % kv_heads).to(tl.int64)
    first_key = block * KEYS
    size = tl.load(Sizes + block) if Sizes is not None else KEYS
    size = tl.minimum(size, seq_k - first_key)
    token = tl.arange(0, KEYS)
    shown = token < size

    k = tl.load(tile_pointers(K, k_strides, batch, kv_head, first_key, KEYS, DIM), mask=shown[:, None], other=0.0)
    v = tl.load(tile_pointers(V, v_strides, batch, kv_head, first_key, KEYS, DIM), mask=shown[:, None], other=0.0)
    Index += batch * index_batch + kv_head * index_head + block.to(tl.int64) * index_row
    count = tl.load(Count + batch * count_batch + kv_head * count_head + block * count_row)
    count = tl.where(size > 0, count, 0)
    Q += batch * q_strides[0] + kv_head * group * q_strides[1]
    GradOut += batch * grad_out_strides[0] + kv_head * group * grad_out_strides[1]
    first_row = (batch * kv_heads + kv_head) * group * padded_q
    rows = (Q, q_strides, GradOut, grad_out_strides, Sums, Delta, Base, first_row, seq_q, padded_q, group)
    keys = (k, v, first_key + token, shown if SHORT_KEYS or Sizes is not None else None)
    grads = (tl.zeros([KEYS, DIM], tl.float32), tl.zeros([KEYS, DIM], tl.float32))
    first = 0
    if CAUSAL:
        # Query blocks that end before the first key see none, and those that begin at the last or after it see all.
        last = tl.cdiv(first_key + KEYS - 1, BLOCK_Q)
        hidden, first = split_list(Index, count, first_key // BLOCK_Q * group, last * group, 1)
        grads = _walk(grads, keys, factor, rows, Index, hidden, first, True, SHORT_ROWS, GROUPED, BLOCK_Q, ROWS)
    grads = _walk(grads, keys, factor, rows, Index, first, count, False, SHORT_ROWS, GROUPED, BLOCK_Q, ROWS)

    exists = (first_key + token < seq_k)[:, None]
    GradK = tile_pointers(GradK, grad_k_strides, batch, kv_head, first_key, KEYS, DIM)
    GradV = tile_pointers(GradV, grad_v_strides, batch, kv_head, first_key, KEYS, DIM)
    tl.store(GradK, (grads[0] * scale).to(GradK.dtype.element_ty), mask=exists)
    tl.store(GradV, grads[1].to(GradV.dtype.element_ty), mask=exists)


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
    SHORT_ROWS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Go over the query blocks first ... stop - 1 of the list. The gradients of q and k are without `scale`."""
    TILES_PER_BLOCK: tl.constexpr = BLOCK_Q // ROWS
    grad_k, grad_v = grads
    k, v, key, shown = keys
    Q, q_strides, GradOut, grad_out_strides, Sums, Delta, Base, first_row, seq_q, padded_q, group = rows
    DIM: tl.constexpr = k.shape[1]
    token = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    entry = tl.load(Index + first, mask=first < stop, other=0)
    for step in tl.range(first * TILES_PER_BLOCK, stop * TILES_PER_BLOCK):
        # Loaded one step ahead, as in the forward.
        next_entry = tl.load(Index + tl.minimum((step + 1) // TILES_PER_BLOCK, stop - 1))
        head = (entry % group).to(tl.int64) if GROUPED else 0
        block = entry // group if GROUPED else entry
        begin = block * BLOCK_Q + step % TILES_PER_BLOCK * ROWS
        row = (begin + token)[:, None].to(tl.int64)
        exists = row < seq_q if SHORT_ROWS else None
        to = first_row + head * padded_q + begin
        q = load(Q + head * q_strides[1] + row * q_strides[2] + dim[None, :], exists)
        scores = tl.dot(k, q.T)
        weights = tl.math.exp2(scores * factor - tl.load(Base + to + token)[None, :])
        if CAUSAL:
            weights = tl.where(key[:, None] <= (begin + token)[None, :], weights, 0.0)
        if shown is not None:  # of a key that does not exist, even an infinite one would reach a gradient of q
            weights = tl.where(shown[:, None], weights, 0.0)
        grad_out = load(GradOut + head * grad_out_strides[1] + row * grad_out_strides[2] + dim[None, :], exists)
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v)
        grad_scores = weights * (tl.dot(v, grad_out.T) - tl.load(Delta + to + token)[None, :])
        grad_scores = grad_scores.to(q.dtype)
        grad_k = tl.dot(grad_scores, q, grad_k)
        Sums.atomic_add([to.to(tl.int32), 0], tl.dot(grad_scores.T, k))
        entry = next_entry
    return grad_k, grad_v
