"""Block-sparse attention on CPU: gather the listed key blocks of a few rows, then torch's flash operator on them.

A row is one block of queries of one head. Its list is split into full blocks, which need no mask, and partial ones
(crossing the causal edge, or short), whose result is merged by lse; blocks wholly in the future are dropped.
Rows with lists of one length share a call, so ragged lists cost no padding. All arithmetic is fp32, or fp64 where
`precision` asks for it: on halves, torch's operator is no faster without AMX and rounds the weights to the input dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import empty_result, like_query
from .gathered_lists import Grid, Split, allowed_keys, blocked, chunks, split_lists

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

# Gathered K and V of one call, per thread: they stay in the cache from the gather to the product (measured).
_BYTES_PER_THREAD = 2 << 20


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
    grid = Grid(*(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]), block_q, block_k, causal)
    lists = split_lists(block_index, block_count, key_sizes, grid)
    out, lse = attend(q.float(), k.float(), v.float(), lists, grid, scale)
    return like_query(out, q), lse.contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, lists: Split, grid: Grid, scale: float) -> tuple[Tensor, Tensor]:
    """`attention` in fp32 or fp64, all of one dtype."""
    queries = blocked(q, grid.block_q)
    gather = Gather(k, v, grid.block_k)
    out = torch.zeros_like(queries)
    lse = queries.new_full(queries.shape[:2], -torch.inf)
    for rows, blocks in chunks(lists.full, gather.limit):
        part, part_lse = _flash(queries.index_select(0, rows).unsqueeze(1), *gather(blocks), 0.0, False, scale=scale)
        out.index_copy_(0, rows, part.squeeze(1))
        lse.index_copy_(0, rows, part_lse.squeeze(1))
    for rows, blocks in chunks(lists.partial, gather.limit):
        allowed = allowed_keys(rows, blocks, lists.sizes, grid)
        mask = additive(allowed, queries.dtype)
        part, part_lse = _flash(
            queries.index_select(0, rows).unsqueeze(1), *gather(blocks), 0.0, False, attn_mask=mask, scale=scale
        )
        # The operator says 0 for a row that sees no key.
        part_lse = part_lse.squeeze(1).masked_fill(~allowed.any(dim=-1), -torch.inf)
        _merge(out, lse, rows, part.squeeze(1), part_lse)
    shape = grid.batch, grid.heads, grid.nq * grid.block_q
    return out.view(*shape, -1)[:, :, : grid.seq_q], lse.view(shape)[:, :, : grid.seq_q]


class Gather:
    """Copies listed blocks of K and V side by side, into the same two buffers every time.

    `index_select` into a buffer runs at memory speed; advanced indexing was 17 times slower, fresh memory 2 times.
    """

    def __init__(self, k: Tensor, v: Tensor, block_k: int) -> None:
        self.keys, self.values = blocked(k, block_k).flatten(1), blocked(v, block_k).flatten(1)
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


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
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
