"""Queries, keys and values, and lists of key blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.attn_ops.blocks.block_index import BlockIndex


def normal(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q, k and v of the default generator: never zeros, which some kernels do faster."""
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    return q, k, v


def random_lists(
    heads: int,
    seq: int,
    block: int | tuple[int, int],
    *,
    density: float = 1.0,
    keep: int | None = None,
    device: str = "cpu",
) -> BlockIndex:
    """For every head and block of queries the same number of key blocks, drawn at random.

    Args:
        heads: number of heads.
        seq: tokens.
        block: tokens of a block, or those of (block_q, block_k).
        density: fraction of the key blocks.
        keep: number of the key blocks, instead of the fraction.
        device: where the lists are; they are drawn on the CPU, so that every device gets the same.
    """
    block_q, block_k = (block, block) if isinstance(block, int) else block
    rows, columns = -(-seq // block_q), -(-seq // block_k)
    keep = keep or max(1, round(density * columns))
    chosen = torch.rand(1, heads, rows, columns).topk(keep).indices
    mask = torch.zeros(1, heads, rows, columns, dtype=torch.bool).scatter_(-1, chosen, True)
    return BlockIndex.from_mask(mask.to(device), block_q=block_q, block_k=block_k, seq_q=seq, seq_k=seq)
