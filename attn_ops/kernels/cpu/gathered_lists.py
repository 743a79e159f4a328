"""The lists of a block-sparse call on CPU, row by row, for the kernels that gather the listed blocks.

A row is one block of queries of one head. A block is full, or partial: crossing the causal edge, or short.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The sizes of a call in tokens and blocks."""

    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int
    block_q: int
    block_k: int
    causal: bool

    @property
    def nq(self) -> int:
        """Blocks of queries."""
        return -(-self.seq_q // self.block_q)

    @property
    def nk(self) -> int:
        """Blocks of keys."""
        return -(-self.seq_k // self.block_k)


class Lists(NamedTuple):
    """One list per row: blocks (rows, width) int64, positions among all blocks of K, and their lengths (rows,)."""

    blocks: Tensor
    lengths: Tensor


class Split(NamedTuple):
    """The lists of full blocks, those of partial blocks or None, and the valid keys of every block of K, (nk,)."""

    full: Lists
    partial: Lists | None
    sizes: Tensor


class Whole(NamedTuple):
    """Lists of all blocks, and the valid keys of every block of K, (nk,), or None if no block is partial."""

    lists: Lists
    sizes: Tensor | None


def split_lists(block_index: Tensor, block_count: Tensor, key_sizes: Tensor | None, grid: Grid) -> Split:
    """The full blocks and the partial ones of every list; blocks wholly in the future, or empty, are in neither."""
    sizes = _sizes(key_sizes, grid)
    if _all_full(key_sizes, grid):
        return Split(_flat(block_index, block_count, grid), None, sizes)
    number, used, masked = _described(block_index, block_count, sizes, grid)
    full, partly = (_flat(*_kept(number, used & which), grid) for which in (~masked, masked))
    return Split(full, partly, sizes)


def whole_lists(block_index: Tensor, block_count: Tensor, key_sizes: Tensor | None, grid: Grid) -> Whole:
    """Every list, without blocks wholly in the future, or empty."""
    sizes = _sizes(key_sizes, grid)
    if _all_full(key_sizes, grid):
        return Whole(_flat(block_index, block_count, grid), None)
    number, used, masked = _described(block_index, block_count, sizes, grid)
    return Whole(_flat(*_kept(number, used), grid), sizes if bool((used & masked).any()) else None)


def _sizes(key_sizes: Tensor | None, grid: Grid) -> Tensor:
    """Valid keys of every block."""
    sizes = (grid.seq_k - grid.block_k * positions(grid.nk)).clamp_(max=grid.block_k)
    return sizes if key_sizes is None else torch.minimum(sizes, key_sizes)


def _all_full(key_sizes: Tensor | None, grid: Grid) -> bool:
    return key_sizes is None and not grid.causal and grid.seq_k % grid.block_k == 0


def _described(block_index: Tensor, block_count: Tensor, sizes: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The lists, which entries are used, and which blocks are partial."""
    used = positions(block_index.shape[-1]) < block_count.unsqueeze(-1)
    number = block_index.masked_fill(~used, 0)
    size = sizes.index_select(0, number.flatten()).view(number.shape)
    used &= size > 0
    masked = size < grid.block_k
    if grid.causal:
        first_query = (grid.block_q * positions(grid.nq)).unsqueeze(-1)
        last_query = (first_query + grid.block_q).clamp_(max=grid.seq_q) - 1
        used &= number * grid.block_k <= last_query
        masked = masked | (number * grid.block_k + size - 1 > first_query)
    return number, used, masked


def _kept(number: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of every list (..., width) where `keep` is True, in order, and how many they are."""
    width = keep.shape[-1]
    target = torch.where(keep, keep.cumsum(dim=-1) - 1, width)
    kept = number.new_zeros((*number.shape[:-1], width + 1)).scatter_(-1, target, number)
    return kept[..., :width], keep.sum(dim=-1)


def _flat(index: Tensor, count: Tensor, grid: Grid) -> Lists:
    """One list per row, in positions among all blocks of K; query head h reads head h // (Hq / Hkv)."""
    width = max(1, int(count.max()))
    heads = positions(grid.batch * grid.heads).view(grid.batch, grid.heads, 1, 1)
    first = heads // (grid.heads // grid.kv_heads) * grid.nk
    blocks = index[..., :width].expand(grid.batch, grid.heads, -1, -1) + first
    return Lists(blocks.reshape(-1, width), count.expand(grid.batch, grid.heads, -1).reshape(-1))


def chunks(lists: Lists | None, limit: int, least: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows (g,), their blocks (g, n)): rows whose lists have one length n > 0.

    About `limit` blocks at a time, but `least` rows if there are as many.
    """
    if lists is None:
        return
    order = lists.lengths.argsort(stable=True)
    start = 0
    for length, rows in enumerate(lists.lengths.bincount().tolist()):
        step = max(least, limit // max(1, length))
        for first in range(start, start + rows, step) if length else ():
            part = order[first : min(first + step, start + rows)]
            yield part, lists.blocks[:, :length].index_select(0, part)
        start += rows


def allowed_keys(rows: Tensor, blocks: Tensor, sizes: Tensor, grid: Grid) -> Tensor:
    """(g, 1 or block_q, n * block_k) bool: which gathered keys a query may see."""
    number = blocks % grid.nk
    offset = positions(grid.block_k)
    allowed = (offset < sizes[number].unsqueeze(-1)).flatten(1).unsqueeze(1)
    if not grid.causal:
        return allowed
    key = (number.unsqueeze(-1) * grid.block_k + offset).flatten(1).unsqueeze(1)
    query = (rows % grid.nq * grid.block_q).unsqueeze(-1) + positions(grid.block_q)
    return allowed & (key <= query.unsqueeze(-1))


def blocked(x: Tensor, block: int) -> Tensor:
    """(B, H, S, D) as (B * H * blocks, block, D), the last block padded with zeros; a view where it can be."""
    if tail := -x.shape[2] % block:
        x = torch.nn.functional.pad(x, (0, 0, 0, tail))
    return x.reshape(-1, block, x.shape[3])


def positions(n: int) -> Tensor:
    """0 ... n - 1, on the CPU whatever the default device is."""
    return torch.arange(n, device="cpu")
