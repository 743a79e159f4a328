"""Block-sparse attention through the native kernel: allocate results, describe tensors by address and strides, call.

Every tensor whose address is in a `Call` is held by a local name until the call returns.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ....layout import like_query
from .library import DTYPES, Call, Lists, Tokens, check_status, empty_like, unit_stride

_LANE_PAD = 16
_MOST_SPLITS = 16
_IDLE = 1.1


def attention(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, Sq, D), k, v: (B, Hkv, Sk, D). Returns out like q and lse (B, Hq, Sq) fp32."""
    lists = _lists(block_index, block_count, key_sizes)
    out, lse = empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    call = _call(q, k, v, *lists, block_q=block_q, block_k=block_k, causal=causal, scale=scale)
    call.out, call.lse = Tokens.of(out), lse.data_ptr()
    _checked(library.sparseattn_forward(ctypes.byref(call)), k, block_index, block_k)
    return like_query(out, q), lse


def attention_backward(
    library: ctypes.CDLL,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` for q, k and v, in their layouts."""
    lists = _lists(block_index, block_count, key_sizes)
    grad_out, out, lse = unit_stride(grad_out), unit_stride(out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_q = empty_like(q)
    batch, kv_heads, seq_k, dim = k.shape
    splits = _splits(batch * kv_heads, torch.get_num_threads())
    padded = -(-dim // _LANE_PAD) * _LANE_PAD
    sums_k, sums_v = (q.new_zeros((splits, batch, kv_heads, seq_k, padded), dtype=torch.float32) for _ in range(2))
    call = _call(q, k, v, *lists, block_q=block_q, block_k=block_k, causal=causal, scale=scale)
    call.out, call.grad_out, call.grad_q = Tokens.of(out), Tokens.of(grad_out), Tokens.of(grad_q)
    call.lse, call.grad_lse = lse.data_ptr(), None if grad_lse is None else grad_lse.data_ptr()
    call.grad_k, call.grad_v, call.splits = sums_k.data_ptr(), sums_v.data_ptr(), splits
    _checked(library.sparseattn_backward(ctypes.byref(call)), k, block_index, block_k)
    grad_k, grad_v = ((x.sum(dim=0) if splits > 1 else x[0])[..., :dim] for x in (sums_k, sums_v))
    return like_query(grad_q, q), like_query(grad_k, k), like_query(grad_v, v)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> Call:
    batch, heads, seq_q, dim = q.shape
    return Call(
        q=Tokens.of(q),
        k=Tokens.of(k),
        v=Tokens.of(v),
        index=Lists.of(block_index),
        count=Lists.of(block_count),
        key_sizes=None if key_sizes is None else key_sizes.data_ptr(),
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        seq_q=seq_q,
        seq_k=k.shape[2],
        block_q=block_q,
        block_k=block_k,
        width=block_index.shape[3],
        channels=dim,
        dtype=DTYPES[q.dtype],
        causal=causal,
        threads=torch.get_num_threads(),
        scale=scale,
    )


def _lists(index: Tensor, count: Tensor, key_sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return unit_stride(index), count, None if key_sizes is None else key_sizes.contiguous()


def _splits(heads: int, threads: int) -> int:
    """In how many parts, each with sums of its own, to cut the queries of a key head so that no thread idles long."""
    busy = [-(-heads * splits // threads) * threads / (heads * splits) for splits in range(1, _MOST_SPLITS + 1)]
    enough = max(_IDLE, min(busy))
    return next(splits for splits, excess in enumerate(busy, start=1) if excess <= enough)


def _checked(status: int, k: Tensor, block_index: Tensor, block_k: int) -> None:
    check_status("block_sparse_attention", status, blocks=-(-k.shape[2] // block_k), width=block_index.shape[3])
