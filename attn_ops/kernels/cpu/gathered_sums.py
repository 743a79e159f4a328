"""Gradients in the making of a block-sparse call on CPU that gathers the listed blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .gathered_lists import Grid


class Sums:
    """Sums over all rows; those of K and V are scattered back to the blocks they came from."""

    def __init__(self, dim: int, dtype: torch.dtype, grid: Grid) -> None:
        self._grid, self._dim = grid, dim
        self._grad_q = torch.zeros(grid.batch * grid.heads * grid.nq, grid.block_q, dim, dtype=dtype, device="cpu")
        self._grad_k = self._grad_q.new_zeros(grid.batch * grid.kv_heads * grid.nk, grid.block_k * dim)
        self._grad_v = torch.zeros_like(self._grad_k)

    def add_queries(self, rows: Tensor, grad: Tensor) -> None:
        """Add grad (g, block_q, D) to the rows (g,)."""
        self._grad_q.index_add_(0, rows, grad)

    def add_keys(self, blocks: Tensor, grad: Tensor) -> None:
        """Add grad (g, n * block_k, D) to the blocks (g, n) of K."""
        self._grad_k.index_add_(0, blocks.flatten(), grad.reshape(blocks.numel(), -1))

    def add_values(self, blocks: Tensor, grad: Tensor) -> None:
        """Add grad (g, n * block_k, D) to the blocks (g, n) of V."""
        self._grad_v.index_add_(0, blocks.flatten(), grad.reshape(blocks.numel(), -1))

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q: (B, Hq, Sq, D), k and v: (B, Hkv, Sk, D)."""
        grid = self._grid
        grad_q = self._grad_q.view(grid.batch, grid.heads, -1, self._dim)[:, :, : grid.seq_q]
        shape = grid.batch, grid.kv_heads, -1, self._dim
        grad_k, grad_v = (grad.view(shape)[:, :, : grid.seq_k] for grad in (self._grad_k, self._grad_v))
        return grad_q, grad_k, grad_v
