"""Attention with INT8 scores through the native kernels, from tensors as they are given: round, then attend.

Integers and scales are those of the reference. V is rounded to FP16, and the weights stay fp32; but a bf16 V is
multiplied in bf16 where the CPU does that natively: V is exact then, and P keeps 8 bits, as in dense bf16 attention.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...numerics.block_rounding import key_mean
from ...numerics.quantize import GROUPS, Groups
from .native import quantized as native


def dense(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    granularity: str,
    smooth_k: bool,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, Sq, D) to all of k, v: (B, Hkv, Sk, D). Returns out like q and lse (B, Hq, Sq) fp32."""
    mean = k.float().mean(dim=-2, keepdim=True) if smooth_k else None
    blocks = q.shape[2], k.shape[2]
    return _attend(library, (q, k, v), mean, _one_block(), blocks, GROUPS[granularity], causal, scale)


def dense_integers(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same of int8 q and k with the scales of their tokens, (B, H, S) fp32; out is in v's dtype."""
    return native.attention(
        *(library, torch.empty_like(q, dtype=v.dtype), native.given(q, q_scale), native.given(k, k_scale)),
        *(_values(library, v), *_one_block()),
        block_q=q.shape[2],
        block_k=k.shape[2],
        causal=causal,
        scale=scale,
        lse_shift=None,
    )


def on_lists(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    *,
    block_q: int,
    block_k: int,
    smooth_k: bool,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same to listed blocks, with the scales of `round_qk`."""
    mean = key_mean(k, block_q=block_q, causal=causal) if smooth_k else None
    groups = Groups(block_q), Groups(1 if causal else block_k)
    lists, blocks = (block_index, block_count), (block_q, block_k)
    return _attend(library, (q, k, v), mean, lists, blocks, groups, causal, scale)


def _one_block() -> tuple[Tensor, Tensor]:
    """The lists of one block of queries that attends to one block of keys."""
    return torch.zeros((1, 1, 1, 1), dtype=torch.int32), torch.ones((1, 1, 1), dtype=torch.int32)


def _values(library: ctypes.CDLL, v: Tensor) -> Tensor:
    """V in a dtype that the kernel multiplies."""
    return v if v.dtype is torch.bfloat16 and library.sparseattn_multiplies_bf16() else v.half()


def _attend(
    library: ctypes.CDLL,
    qkv: tuple[Tensor, Tensor, Tensor],
    k_mean: Tensor | None,
    lists: tuple[Tensor, Tensor],
    blocks: tuple[int, int],
    groups: tuple[Groups, Groups],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    queries = native.rounded(library, q, groups[0], along=k_mean)
    keys = native.rounded(library, k, groups[1], mean=k_mean)
    return native.attention(
        *(library, q, queries, keys, _values(library, v), *lists),
        block_q=blocks[0],
        block_k=blocks[1],
        causal=causal,
        scale=scale,
        lse_shift=None if queries.products is None else queries.products.mul_(scale),
    )
