"""Block-sparse attention on CPU: gather the listed key blocks of a few rows, then torch's flash operator on them.

A row is one block of queries of one head. Its list is split into full blocks, which need no mask, and partial ones
(crossing the causal edge, or short), whose result is merged by lse; blocks wholly in the future are dropped.
Rows with lists of one length share a call, so ragged lists cost no padding. All arithmetic is fp32, or fp64 where
`precision` asks for it: on halves, torch's operator is no faster without AMX and rounds the weights to the input dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import empty_result, like_query
from ..lse_gradient import with_lse_gradient
from .precision import exact_operands

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Gathered K and V of one call, per thread: they stay in the cache from the gather to the product (measured).
_BYTES_PER_THREAD = 2 << 20


class _Grid(NamedTuple):
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
        return -(-self.seq_q // self.block_q)

    @property
    def nk(self) -> int:
        return -(-self.seq_k // self.block_k)


class _Lists(NamedTuple):
    """One list per row: blocks (rows, width) int64, positions among all blocks of K, and their lengths (rows,)."""

    blocks: Tensor
    lengths: Tensor


class _Split(NamedTuple):
    """The lists of full blocks, those of partial blocks or None, and the valid keys of every block of K, (nk,)."""

    full: _Lists
    partial: _Lists | None
    sizes: Tensor


def attention(
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
    if q.numel() == 0 or k.numel() == 0 or block_index.numel() == 0:
        return empty_result(q)
    grid = _Grid(*(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]), block_q, block_k, causal)
    lists = _split(block_index, block_count, key_sizes, grid)
    out, lse = _attend(q.float(), k.float(), v.float(), lists, grid, scale)
    return like_query(out, q), lse.contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, lists: _Split, grid: _Grid, scale: float) -> tuple[Tensor, Tensor]:
    """`attention` in fp32 or fp64, all of one dtype."""
    queries = _blocked(q, grid.block_q)
    gather = _Gather(k, v, grid.block_k)
    out = torch.zeros_like(queries)
    lse = queries.new_full(queries.shape[:2], -torch.inf)
    for rows, blocks in _chunks(lists.full, gather.limit):
        part, part_lse = _flash(queries.index_select(0, rows).unsqueeze(1), *gather(blocks), 0.0, False, scale=scale)
        out.index_copy_(0, rows, part.squeeze(1))
        lse.index_copy_(0, rows, part_lse.squeeze(1))
    for rows, blocks in _chunks(lists.partial, gather.limit):
        allowed = _allowed(rows, blocks, lists.sizes, grid)
        mask = _additive(allowed, queries.dtype)
        part, part_lse = _flash(
            queries.index_select(0, rows).unsqueeze(1), *gather(blocks), 0.0, False, attn_mask=mask, scale=scale
        )
        # The operator says 0 for a row that sees no key.
        part_lse = part_lse.squeeze(1).masked_fill(~allowed.any(dim=-1), -torch.inf)
        _merge(out, lse, rows, part.squeeze(1), part_lse)
    shape = grid.batch, grid.heads, grid.nq * grid.block_q
    return out.view(*shape, -1)[:, :, : grid.seq_q], lse.view(shape)[:, :, : grid.seq_q]


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
    key_sizes: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` for q, k and v, in their layouts."""
    if q.numel() == 0 or k.numel() == 0 or block_index.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grid = _Grid(*(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]), block_q, block_k, causal)
    lists = _split(block_index, block_count, key_sizes, grid)
    given = q, k, v
    attend = partial(_attend, lists=lists, grid=grid, scale=scale)
    grad_out, out, lse, q, k, v = exact_operands(attend, grad_out, out, lse, q, k, v)
    # exp(-inf - 0) = 0 in a row with no key, where -inf - -inf would be NaN.
    row_lse = _blocked(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1), block_q).squeeze(-1)

    def gathered(grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums = _Sums(grad_out, out, row_lse, q, k, v, grid, scale)
        for rows, blocks in _chunks(lists.full, sums.gather.limit):
            sums.add(rows, blocks, None)
        for rows, blocks in _chunks(lists.partial, sums.gather.limit):
            sums.add(rows, blocks, _additive(_allowed(rows, blocks, lists.sizes, grid), q.dtype))
        return sums.result()

    grad_q, grad_k, grad_v = map(like_query, with_lse_gradient(gathered, grad_out, grad_lse, out, q, k, v), given)
    return grad_q, grad_k, grad_v


def _blocked(x: Tensor, block: int) -> Tensor:
    """(B, H, S, D) as (B * H * blocks, block, D), the last block padded with zeros; a view where it can be."""
    if tail := -x.shape[2] % block:
        x = torch.nn.functional.pad(x, (0, 0, 0, tail))
    return x.reshape(-1, block, x.shape[3])


class _Gather:
    """Copies listed blocks of K and V side by side, into the same two buffers every time.

    `index_select` into a buffer runs at memory speed; advanced indexing was 17 times slower, fresh memory 2 times.
    """

    def __init__(self, k: Tensor, v: Tensor, block_k: int) -> None:
        self.keys, self.values = _blocked(k, block_k).flatten(1), _blocked(v, block_k).flatten(1)
        bytes_per_block = 2 * self.keys.shape[1] * self.keys.element_size()
        self.limit = max(1, _BYTES_PER_THREAD * torch.get_num_threads() // bytes_per_block)
        self._dim = k.shape[3]
        self._buffers = self.keys.new_empty(2, 0, self.keys.shape[1])

    def __call__(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of blocks (rows, n): each (rows, 1, n * block_k, D), valid until the next call."""
        needed = blocks.numel()
        if self._buffers.shape[1] < needed:
            self._buffers = self.keys.new_empty(2, max(needed, self.limit), self.keys.shape[1])
        keys, values = self._buffers[0, :needed], self._buffers[1, :needed]
        torch.index_select(self.keys, 0, blocks.flatten(), out=keys)
        torch.index_select(self.values, 0, blocks.flatten(), out=values)
        shape = blocks.shape[0], 1, -1, self._dim
        return keys.view(shape), values.view(shape)


class _Sums:
    """Gradients in the making: sums over all rows, for K and V scattered back to the blocks they came from."""

    def __init__(
        self, grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, grid: _Grid, scale: float
    ) -> None:
        self._grid, self._scale = grid, scale
        self._rows = tuple(_blocked(x, grid.block_q) for x in (grad_out, q, out))
        self._lse = lse
        self.gather = _Gather(k, v, grid.block_k)
        self._grad_q = torch.zeros_like(self._rows[1])
        self._grad_k = torch.zeros_like(self.gather.keys)
        self._grad_v = torch.zeros_like(self.gather.values)

    def add(self, rows: Tensor, blocks: Tensor, mask: Tensor | None) -> None:
        """Add what rows (g,) and their blocks (g, n) contribute, under an additive mask."""
        keys, values = self.gather(blocks)
        grad_out, q, out = (x.index_select(0, rows).unsqueeze(1) for x in self._rows)
        lse = self._lse.index_select(0, rows).unsqueeze(1)
        grads = _flash_backward(*(grad_out, q, keys, values, out, lse, 0.0, False), attn_mask=mask, scale=self._scale)
        self._grad_q.index_add_(0, rows, grads[0].squeeze(1))
        self._grad_k.index_add_(0, blocks.flatten(), grads[1].reshape(blocks.numel(), -1))
        self._grad_v.index_add_(0, blocks.flatten(), grads[2].reshape(blocks.numel(), -1))

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q: (B, Hq, Sq, D), k and v: (B, Hkv, Sk, D)."""
        grid = self._grid
        shape = grid.batch, grid.kv_heads, grid.nk * grid.block_k, -1
        grad_q = self._grad_q.view(grid.batch, grid.heads, grid.nq * grid.block_q, -1)[:, :, : grid.seq_q]
        grad_k, grad_v = (grad.view(shape)[:, :, : grid.seq_k] for grad in (self._grad_k, self._grad_v))
        return grad_q, grad_k, grad_v


def _split(block_index: Tensor, block_count: Tensor, key_sizes: Tensor | None, grid: _Grid) -> _Split:
    block, nk = grid.block_k, grid.nk
    sizes = (grid.seq_k - block * _range(nk)).clamp_(max=block)
    if key_sizes is not None:
        sizes = torch.minimum(sizes, key_sizes)
    if key_sizes is None and not grid.causal and grid.seq_k % block == 0:
        return _Split(_flat(block_index, block_count, grid), None, sizes)
    used = _range(block_index.shape[-1]) < block_count.unsqueeze(-1)
    number = block_index.masked_fill(~used, 0)
    size = sizes.index_select(0, number.flatten()).view(number.shape)
    used &= size > 0
    masked = size < block
    if grid.causal:
        first_query = (grid.block_q * _range(grid.nq)).unsqueeze(-1)
        last_query = (first_query + grid.block_q).clamp_(max=grid.seq_q) - 1
        used &= number * block <= last_query
        masked |= number * block + size - 1 > first_query
    full, partly = (_flat(*_kept(number, used & which), grid) for which in (~masked, masked))
    return _Split(full, partly, sizes)


def _kept(number: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of every list (..., width) where `keep` is True, in order, and how many they are."""
    width = keep.shape[-1]
    target = torch.where(keep, keep.cumsum(dim=-1) - 1, width)
    kept = number.new_zeros((*number.shape[:-1], width + 1)).scatter_(-1, target, number)
    return kept[..., :width], keep.sum(dim=-1)


def _flat(index: Tensor, count: Tensor, grid: _Grid) -> _Lists:
    """One list per row, in positions among all blocks of K; query head h reads head h // (Hq / Hkv)."""
    width = max(1, int(count.max()))
    heads = _range(grid.batch * grid.heads).view(grid.batch, grid.heads, 1, 1)
    first = heads // (grid.heads // grid.kv_heads) * grid.nk
    blocks = index[..., :width].expand(grid.batch, grid.heads, -1, -1) + first
    return _Lists(blocks.reshape(-1, width), count.expand(grid.batch, grid.heads, -1).reshape(-1))


def _chunks(lists: _Lists | None, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows (g,), their blocks (g, n)): rows whose lists have one length n > 0, about `limit` blocks at a time."""
    if lists is None:
        return
    order = lists.lengths.argsort(stable=True)
    start = 0
    for length, rows in enumerate(lists.lengths.bincount().tolist()):
        step = max(1, limit // max(1, length))
        for first in range(start, start + rows, step) if length else ():
            part = order[first : min(first + step, start + rows)]
            yield part, lists.blocks[:, :length].index_select(0, part)
        start += rows


def _allowed(rows: Tensor, blocks: Tensor, sizes: Tensor, grid: _Grid) -> Tensor:
    """(g, 1 or block_q, n * block_k) bool: which gathered keys a query may see."""
    number = blocks % grid.nk
    offset = _range(grid.block_k)
    allowed = (offset < sizes[number].unsqueeze(-1)).flatten(1).unsqueeze(1)
    if not grid.causal:
        return allowed
    key = (number.unsqueeze(-1) * grid.block_k + offset).flatten(1).unsqueeze(1)
    query = (rows % grid.nq * grid.block_q).unsqueeze(-1) + _range(grid.block_q)
    return allowed & (key <= query.unsqueeze(-1))


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, else -inf, with a dimension for the one head."""
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, -torch.inf).unsqueeze(1)


def _merge(out: Tensor, lse: Tensor, rows: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a result over more keys, part: (g, block_q, D) and part_lse: (g, block_q), into rows of out and lse."""
    before = lse.index_select(0, rows)
    both = torch.logaddexp(before, part_lse)
    finite = both.masked_fill(both == -torch.inf, 0.0)
    old = out.index_select(0, rows) * (before - finite).exp_().unsqueeze(-1)
    new = part * (part_lse - finite).exp_().unsqueeze(-1)
    out.index_copy_(0, rows, old + new)
    lse.index_copy_(0, rows, both)


def _range(n: int) -> Tensor:
    """0 ... n - 1, on the CPU whatever the default device is."""
    return torch.arange(n, device="cpu")
