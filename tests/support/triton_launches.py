"""Calls of host code that launch the Triton kernels, of sizes that only matter in what they make the compiler do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.attn_ops.kernels.triton import (
    block_sparse,
    block_sparse_backward,
    block_sparse_fused_backward,
    coarse,
    sage,
    sparge,
)
from sparseattn.attn_ops.kernels.triton.linear_branch import add_linear_branch
from sparseattn.attn_ops.kernels.triton.quantize import Rounding, round_operands
from sparseattn.attn_ops.numerics.quantize import GROUPS


def qkv(dtype: torch.dtype, head_dim: int, seq_q: int, seq_k: int, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(1, heads, seq_q, head_dim, dtype=dtype), torch.randn(1, 2, seq_k, head_dim, dtype=dtype)
    return q, k, torch.randn_like(k)


def launch_block_sparse(
    dtype: torch.dtype,
    head_dim: int,
    block: int,
    masked: bool,
    seq_q: int = 256,
    seq_k: int = 256,
    heads: int = 4,
    *,
    descriptors: bool = False,
) -> None:
    """Launch on whole blocks, or with every mask there is: causal, short last block and key sizes."""
    given, options = block_sparse_call(dtype, head_dim, (block, block), masked, seq_q, seq_k, heads)
    block_sparse.attention(*given, **options, descriptors=descriptors)


def launch_block_sparse_backward(
    dtype: torch.dtype,
    head_dim: int,
    blocks: tuple[int, int],
    masked: bool,
    seq_q: int = 256,
    seq_k: int = 256,
    heads: int = 4,
) -> None:
    """Likewise the gradients, with masks through lse too."""
    given, options = block_sparse_call(dtype, head_dim, blocks, masked, seq_q, seq_k, heads)
    block_sparse_backward.attention_backward(*_results(given[0], masked), *given, **options)


def launch_fused_backward(
    head_dim: int, block_q: int, masked: bool, seq: tuple[int, int] = (256, 256), heads: int = 4
) -> None:
    """Likewise those by the fused kernel, in bf16."""
    given, options = block_sparse_call(torch.bfloat16, head_dim, (block_q, 64), masked, *seq, heads)
    block_sparse_fused_backward.attention_backward(*_results(given[0], masked), *given, **options)


def _results(q: Tensor | None, through_lse: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """grad_out, grad_lse, out and lse."""
    assert q is not None
    lse = torch.zeros(q.shape[:-1])
    return q, lse if through_lse else None, q, lse


def block_sparse_call(
    dtype: torch.dtype, head_dim: int, blocks: tuple[int, int], masked: bool, seq_q: int, seq_k: int, heads: int
) -> tuple[list[Tensor | None], dict[str, Any]]:
    seq_k -= 10 * masked
    blocks_q, blocks_k = -(-seq_q // blocks[0]), -(-seq_k // blocks[1])
    index = torch.zeros(1, heads, blocks_q, blocks_k, dtype=torch.int32)
    sizes = torch.zeros(blocks_k, dtype=torch.int32) if masked else None
    options = {"block_q": blocks[0], "block_k": blocks[1], "causal": masked, "scale": 0.1}
    return [*qkv(dtype, head_dim, seq_q, seq_k, heads), index, index[..., 0], sizes], options


def launch_sage(
    dtype: torch.dtype,
    head_dim: int,
    pv: str,
    masked: bool,
    seq_q: int = 256,
    seq_k: int = 256,
    heads: int = 4,
    smooth: bool = False,
) -> None:
    """Launch with k smoothed, or all of q, k and v."""
    q, k, v = qkv(dtype, head_dim, seq_q, seq_k - 10 * masked, heads)
    options = {"granularity": "per_thread", "smooth_k": True, "smooth_q": smooth, "smooth_v": smooth}
    sage.attention(q, k, v, causal=masked, scale=0.1, pv=pv, **options)


def launch_sparge(
    dtype: torch.dtype,
    head_dim: int,
    pv: str,
    masked: bool,
    *,
    skips: bool = False,
    blocks: tuple[int, int] = (128, 64),
    seq: tuple[int, int] = (256, 256),
    heads: int = 4,
) -> None:
    """Launch on whole blocks, or causal with a short last block."""
    seq_q, seq_k = seq[0], seq[1] - 10 * masked
    q, k = torch.randn(1, heads, seq_q, head_dim, dtype=dtype), torch.randn(1, 2, seq_k, head_dim, dtype=dtype)
    index = torch.zeros(1, heads, -(-seq_q // blocks[0]), -(-seq_k // blocks[1]), dtype=torch.int32)
    threshold = torch.zeros(heads) if skips else None
    sizes = {"block_q": blocks[0], "block_k": blocks[1]}
    modes: dict[str, Any] = {"pv": pv, "smooth_k": True, "pv_threshold": threshold, "causal": masked, "scale": 0.1}
    sparge.attention(q, k, torch.randn_like(k), index, index[..., 0], **sizes, **modes)


def launch_rounding(dtype: torch.dtype, head_dim: int, pv: str, smooth: bool, heads: int = 4, seq: int = 256) -> None:
    """Round q, k and v, k without its mean, or all of them."""
    q, k = torch.randn(1, heads, seq, head_dim, dtype=dtype), torch.randn(1, 2, seq, head_dim, dtype=dtype)
    options: dict[str, Any] = {"smooth_q": smooth, "smooth_v": smooth}
    round_operands(q, k, torch.randn_like(k), Rounding(*GROUPS["per_thread"], pv, **options))


def launch_linear_branch(dtype: torch.dtype, head_dim: int, heads: int = 4, seq: int = 256) -> None:
    """SLA's linear branch, with a bias."""
    q, k, v = qkv(dtype, head_dim, seq, seq, heads)
    weight, bias = torch.zeros(head_dim, head_dim), torch.zeros(head_dim)
    add_linear_branch(torch.empty_like(q), q, k, v, weight, bias, feature_map="softmax")


def launch_coarse(head_dim: int, heads: int = 4, tiles: int = 100) -> None:
    """VSA's coarse branch, between means of tiles."""
    coarse.attend(*qkv(torch.float32, head_dim, tiles, tiles, heads), 0.1)
