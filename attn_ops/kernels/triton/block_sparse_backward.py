"""Block-sparse attention, backward, in Triton: two kernels for sm_80 and newer; deterministic, without atomics.

One computes the gradient of a tile of queries over its list of key blocks, the other those of a tile of keys and values
over the query blocks that list it, for each query head that reads it, in ascending order. Both recompute the weights
from lse.

The gradient of the scores, weights * (grad_out @ v.T - delta) with delta = sum(grad_out * out), cancels where attention
is nearly one-hot: little more than the rounding of out is left then, of a half or of fp32 with scores in the hundreds.
But every row of it sums to grad_lse, and what it is off by is the error of delta. The first kernel corrects delta by
that for the second, and where it matters begins again with it.

So large a score in fp32, or lse, is off by 3e-5, and by as much of itself each weight. Where the GPU has
fast fp64, the scores of fp32 inputs are computed in it, and the weights are divided by what they add up to (WIDE).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .block_sparse import broadcast_strides
from .block_sparse_grad_kv import grad_kv_kernel
from .block_sparse_grad_q import grad_q_kernel
from .device import LOG2_E
from .tiles import (
    block_sparse_grad_kv_tile,
    block_sparse_grad_q_tile,
    has_fast_fp64,
    on_device,
    padded_head_dim,
    target_arch,
)
from .transpose import transposed_lists


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
    """Gradients of `block_sparse.attention` for q, k and v, in their layouts.

    Args:
        grad_out: (B, Hq, Sq, D) in q's dtype.
        grad_lse: (B, Hq, Sq) fp32, or None for 0.
        out: (B, Hq, Sq, D) of the forward, over the listed blocks and no others; its rounding does no harm.
        lse: (B, Hq, Sq) fp32, likewise.
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
    """
    if q.numel() == 0 or k.numel() == 0 or block_index.shape[-1] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_out, out, block_index = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_out, out, block_index))
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    grad_q, grad_k, grad_v, delta = map(torch.empty_like, (q, k, v, lse))
    (batch, heads, seq_q, head_dim), (kv_heads, seq_k) = q.shape, k.shape[1:3]
    dim, itemsize, group = padded_head_dim(head_dim), q.element_size(), heads // kv_heads
    scales = scale, scale * LOG2_E
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "HEAD_DIM": head_dim, "DIM": dim, "CAUSAL": causal}
    with on_device(q):
        tile = block_sparse_grad_q_tile(target_arch(), itemsize, dim, block_q, block_k)
        tiles = triton.cdiv(seq_q, block_q) * triton.cdiv(block_q, tile.rows)
        wide = itemsize == 4 and has_fast_fp64(target_arch())
        norm = torch.empty_like(lse) if wide else None
        repeat = q.new_empty(tiles * heads * batch, dtype=torch.uint8) if wide or itemsize < 4 else None
        for repeated in (False,) if repeat is None else (False, True):
            grad_q_kernel[(tiles * heads * batch,)](
                *_with_strides(q, k, v, out, grad_out, grad_q),
                *(lse, grad_lse, delta, norm, repeat, block_index, *broadcast_strides(block_index)),
                *(block_count, *broadcast_strides(block_count), key_sizes, *scales, tiles, heads, group, seq_q, seq_k),
                **blocks,
                SHORT_TAIL=seq_k % block_k != 0,
                REPEATED=repeated,
                WIDE=wide,
                ROWS=tile.rows,
                KEYS=tile.keys,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        lists, counts = transposed_lists(block_index, block_count, triton.cdiv(seq_k, block_k), group)
        tile = block_sparse_grad_kv_tile(target_arch(), itemsize, dim, block_q, block_k)
        tiles = triton.cdiv(seq_k, block_k) * triton.cdiv(block_k, tile.keys)
        grad_kv_kernel[(tiles * kv_heads * batch,)](
            *_with_strides(q, k, v, grad_out, grad_k, grad_v),
            *(lse, delta, norm, lists, *broadcast_strides(lists), counts, *broadcast_strides(counts)),
            *(key_sizes, *scales, tiles, kv_heads, group, seq_q, seq_k),
            **blocks,
            SHORT_TAIL=seq_q % block_q != 0,
            GROUPED=group > 1,
            ROWS=tile.rows,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return grad_q, grad_k, grad_v


def _with_strides(*tensors: Tensor) -> list[object]:
    """Each tensor, followed by its strides of (batch, head, token)."""
    return [argument for tensor in tensors for argument in (tensor, tensor.stride()[:3])]
