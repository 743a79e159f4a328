"""VMoBA on CPU: for every chunk of keys, gather the queries that chose it and run torch's flash operator on them.

The results of a query's chunks are merged by lse. Keys are never gathered: a chunk is a slice in tile order.
All arithmetic is fp32, for the reason given in gathered.py, or fp64 where `precision` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...blocks.chunk_choice import ChunkRule, choose_chunks, chunk_gates, own_chunks
from ...blocks.tiles import Tiling
from ...layout import empty_result, like_query
from ..lse_gradient import with_lse_gradient
from .precision import exact_operands

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, tiling: Tiling, rule: ChunkRule, scale: float
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, S, D), k, v: (B, Hkv, S, D). Returns out like q and lse (B, Hq, S) fp32."""
    if q.numel() == 0:
        return empty_result(q)
    out, lse = _attend(q.float(), k.float(), v.float(), _chosen(q, k, tiling, rule), tiling, scale)
    return like_query(out, q), lse


def _attend(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, tiling: Tiling, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to the chosen chunks, (B, Hq, S, C) bool, in fp32 or fp64."""
    queries, keys, values = q.contiguous(), tiling.to_tiles(k), tiling.to_tiles(v)
    out, lse = empty_result(queries)
    for head, kv_head, rows, chunk in _parts(chosen, tiling, k.shape[1]):
        part, part_lse = _flash(
            *(queries[head].index_select(0, rows)[None, None], keys[kv_head][None, None, chunk]),
            *(values[kv_head][None, None, chunk], 0.0, False),
            scale=scale,
        )
        _merge(out[head], lse[head], rows, part[0, 0], part_lse[0, 0])
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tiling: Tiling,
    rule: ChunkRule,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` for q, k and v, in their layouts: exact, with out and lse over all chunks of a query."""
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    given, chosen = (q, k, v), _chosen(q, k, tiling, rule)
    attend = partial(_attend, chosen=chosen, tiling=tiling, scale=scale)
    grad_out, out, lse, q, k, v = exact_operands(attend, grad_out, out, lse, q, k, v)

    def by_chunk(grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = tiling.to_tiles(k), tiling.to_tiles(v)
        per_query = [x.contiguous() for x in (grad_out, q, out)]
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (per_query[1], keys, values))
        for head, kv_head, rows, chunk in _parts(chosen, tiling, k.shape[1]):
            gathered = [x[head].index_select(0, rows)[None, None] for x in per_query]
            part_q, part_k, part_v = _flash_backward(
                *(gathered[0], gathered[1], keys[kv_head][None, None, chunk], values[kv_head][None, None, chunk]),
                *(gathered[2], lse[head].index_select(0, rows)[None, None], 0.0, False),
                scale=scale,
            )
            grad_q[head].index_add_(0, rows, part_q[0, 0])
            grad_k[kv_head][chunk] += part_k[0, 0]
            grad_v[kv_head][chunk] += part_v[0, 0]
        return grad_q, tiling.from_tiles(grad_k), tiling.from_tiles(grad_v)

    grad_q, grad_k, grad_v = map(like_query, with_lse_gradient(by_chunk, grad_out, grad_lse, out, q, k, v), given)
    return grad_q, grad_k, grad_v


def _chosen(q: Tensor, k: Tensor, tiling: Tiling, rule: ChunkRule) -> Tensor:
    """(B, Hq, S, C) bool: the chunks of every query."""
    keys, sizes, own = tiling.to_tiles(k), tiling.sizes(q.device), own_chunks(tiling, q.device)
    # Heads that do not compete are taken in turn: choosing takes forty times the memory of what is chosen (measured).
    turns = 1 if 1 in rule.inside else k.shape[1]
    heads = zip(q.chunk(turns, dim=1), keys.chunk(turns, dim=1), strict=True)
    return torch.cat([choose_chunks(chunk_gates(*some, sizes), own, rule) for some in heads], dim=1)


def _parts(
    chosen: Tensor, tiling: Tiling, kv_heads: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int], Tensor, slice]]:
    """(query head, its key head, rows of the queries that chose a chunk, its keys in tile order) for every chunk."""
    batch, heads = chosen.shape[:2]
    sizes = tiling.sizes(chosen.device).tolist()
    for item in range(batch):
        for head in range(heads):
            by_chunk = chosen[item, head].mT.contiguous()
            rows = by_chunk.nonzero()[:, 1].split(by_chunk.sum(dim=1).tolist())
            for number, (size, queries) in enumerate(zip(sizes, rows, strict=True)):
                first = number * tiling.volume
                if len(queries):
                    yield (item, head), (item, head * kv_heads // heads), queries, slice(first, first + size)


def _merge(out: Tensor, lse: Tensor, rows: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a result over more keys, part: (n, D) and part_lse: (n,), into rows of out and lse."""
    before = lse.index_select(0, rows)
    both = torch.logaddexp(before, part_lse)
    old = out.index_select(0, rows).mul_((before - both).exp_().unsqueeze(-1))
    out.index_copy_(0, rows, old.add_(part.mul_((part_lse - both).exp_().unsqueeze(-1))))
    lse.index_copy_(0, rows, both)
