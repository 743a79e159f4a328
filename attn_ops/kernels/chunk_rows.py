"""VMoBA as block-sparse attention: queries regrouped so that a row of them shares its one chunk of keys.

A query that chose n chunks is copied to n rows. How many rows a chunk needs is data, but how many there are in all is
not, where every query chooses equally many: each chunk's rows start at a whole block, and no chunk wastes more than
one. So shapes are fixed, no device is waited for, and the n results of a query are gathered and merged by lse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks.block_index import lists_of
from ..blocks.chunk_choice import ChunkRule, choose_chunks, chunk_gates, own_chunks
from ..blocks.tiles import Tiling
from ..layout import empty_result, like_query

_BLOCK_Q = 128


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, tiling: Tiling, rule: ChunkRule, scale: float, provider: str
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, S, D), k, v: (B, Hkv, S, D). Returns out like q and lse (B, Hq, S) fp32.

    The results of a query's chunks are rounded to q's dtype before they are merged, as upstream does.
    """
    if q.numel() == 0:
        return empty_result(q)
    keys, values = tiling.to_tiles(k), tiling.to_tiles(v)
    rows = _regroup(q, keys, tiling, rule)
    operands = _copied(q, rows.query), keys, values, *rows.lists
    out, lse = _attend(operands, tiling, scale, provider)
    parts, part_lse = _picked(out, rows).float(), _picked(lse.unsqueeze(-1), rows)
    total = part_lse.logsumexp(dim=3)
    merged = (parts * (part_lse - total.unsqueeze(3)).exp()).sum(dim=3)
    return like_query(merged, q), total.squeeze(-1)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    _out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tiling: Tiling,
    rule: ChunkRule,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` for q, k and v, in their layouts: back through the merging, then through every row.

    The rows attend again, for the results that were merged: the out and lse of all chunks of a query are not those of
    its rows, and the backward of block-sparse attention is told what its forward returned.
    """
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    keys, values = tiling.to_tiles(k), tiling.to_tiles(v)
    rows = _regroup(q, keys, tiling, rule)
    # A row that holds no query has a gradient of 0; that of the query it names instead may be anything.
    queries = _copied(q, rows.query).masked_fill_(~rows.used.unsqueeze(-1), 0)
    operands = queries, keys, values, *rows.lists
    parts = _attend(operands, tiling, scale, provider)
    grad_rows, grad_keys, grad_values = torch.ops.sparseattn.block_sparse_attention_backward(
        *(*_unmerged(grad_out, grad_lse, lse, *parts, rows), *parts, *operands),
        *(_BLOCK_Q, tiling.volume, False, scale, provider),
    )
    grad_q = _picked(grad_rows, rows).sum(dim=3, dtype=torch.float32)
    grad_k, grad_v = tiling.from_tiles(grad_keys), tiling.from_tiles(grad_values)
    return like_query(grad_q, q), like_query(grad_k, k), like_query(grad_v, v)


def _attend(operands: tuple[Tensor | None, ...], tiling: Tiling, scale: float, provider: str) -> tuple[Tensor, Tensor]:
    """Attention of every row to its chunk: out (B, Hq, R, D) and lse (B, Hq, R)."""
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.block_sparse_attention(
        *operands, block_q=_BLOCK_Q, block_k=tiling.volume, scale=scale, provider=provider
    )
    return result


def _unmerged(
    grad_out: Tensor, grad_lse: Tensor | None, lse: Tensor, row_out: Tensor, row_lse: Tensor, rows: _Rows
) -> tuple[Tensor, Tensor]:
    """Gradients of row_out and row_lse; 0 in a row that holds no query.

    From merged = sum(w * part) and w = exp(part_lse - lse): that of a part is w * grad_out, that of its lse is
    w * (grad_out . part - grad_out . merged + grad_lse).
    """
    grad_rows, total = _copied(grad_out, rows.query), _copied(lse.unsqueeze(-1), rows.query)
    weight = (row_lse.unsqueeze(-1) - total).exp().masked_fill(~rows.used.unsqueeze(-1), 0)
    product = (grad_rows.float() * row_out).sum(dim=-1, keepdim=True)
    mean = _picked(weight * product, rows).sum(dim=3)
    if grad_lse is not None:
        mean = mean - grad_lse.unsqueeze(-1)
    grad_row_lse = weight * (product - _copied(mean, rows.query))
    return (weight * grad_rows).to(row_out.dtype), grad_row_lse.squeeze(-1)


class _Rows(NamedTuple):
    """Where queries went.

    Args:
        query: (B, Hq, R) int64, the query that a row holds; 0 where it holds none.
        used: (B, Hq, R) bool, whether it holds one.
        places: (B, Hq, S, n) int64, the rows of every query.
        lists: block_index (B, Hq, R / block, 1), block_count and key_sizes of block_sparse_attention.
    """

    query: Tensor
    used: Tensor
    places: Tensor
    lists: tuple[Tensor, Tensor, Tensor | None]


def _regroup(q: Tensor, keys: Tensor, tiling: Tiling, rule: ChunkRule) -> _Rows:
    sizes = tiling.sizes(q.device)
    chosen = choose_chunks(chunk_gates(q, keys, sizes), own_chunks(tiling, q.device), rule)
    chunks = tiling.tiles
    many = chunks if rule.takes_all else min(rule.topk, chunks)
    chunk = lists_of(chosen)[0][..., :many].flatten(2).long()  # (B, Hq, S * n)
    members = chosen.sum(dim=2)  # (B, Hq, C)
    blocks = (members + _BLOCK_Q - 1) // _BLOCK_Q
    last_block = blocks.cumsum(dim=-1)
    # The copies in the order of their chunks; before the rows of a chunk there are `gap` rows that hold none.
    order = chunk.argsort(dim=-1, stable=True)
    gap = (last_block - blocks) * _BLOCK_Q - (members.cumsum(dim=-1) - members)
    row = gap.gather(2, chunk.gather(2, order)) + torch.arange(chunk.shape[2], device=q.device)
    capacity = -(-chunk.shape[2] // _BLOCK_Q) + chunks
    query = row.new_full((*row.shape[:2], capacity * _BLOCK_Q), -1).scatter_(2, row, order // many)
    places = torch.empty_like(row).scatter_(2, order, row).unflatten(2, (-1, many))
    block = torch.arange(capacity, device=q.device).expand(*row.shape[:2], -1).contiguous()
    owner = torch.searchsorted(last_block, block, right=True)
    index = owner.clamp(max=chunks - 1).to(torch.int32).unsqueeze(-1)
    lists = index, (owner < chunks).to(torch.int32), None if tiling.is_full else sizes
    return _Rows(query.clamp(min=0), query >= 0, places, lists)


def _copied(x: Tensor, query: Tensor) -> Tensor:
    """The rows of x: (B, Hq, S, D) that `query` names: (B, Hq, R, D)."""
    return x.gather(2, query.unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))


def _picked(x: Tensor, rows: _Rows) -> Tensor:
    """The rows of every query of x: (B, Hq, R, D), as (B, Hq, S, n, D)."""
    flat = rows.places.flatten(2)
    return _copied(x, flat).view(*rows.places.shape, x.shape[3])
