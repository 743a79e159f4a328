"""video_sparse_attention, defined: tokens in the order they come, and for each the number of its tile.

m = mean of the tokens of every tile;  s = scale * m_q @ m_k.T
sparse = attention of every token to the tokens of the tiles chosen by the largest s of its own tile
out = sparse + gate * (softmax(s) @ m_v of its own tile)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks.tile_selection import TilePlan
from ..blocks.tiles import Tiling
from ..heads import per_kv_head, per_query_head
from .attention import masked_attention, masked_attention_backward


class _Tiles(NamedTuple):
    """Which tile holds a token: own (S, tiles), 1 for its own; mean (tiles, S), 1 / size for its tokens."""

    own: Tensor
    mean: Tensor


class _Coarse(NamedTuple):
    """Means of tiles (B, Hq, tiles, D), the scores and their softmax (B, Hq, nq, nk)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    weights: Tensor


def video_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    sparsities: Tensor | None,
    *,
    plan: TilePlan,
) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, Sq, D) to k, v: (B, Hkv, Sk, D), gate like q or None. Returns out, lse (B, Hq, Sq)."""
    queries, keys, scale = plan.queries, plan.keys, plan.scale
    if plan.tiled:
        q, k, v = queries.from_tiles(q), keys.from_tiles(k), keys.from_tiles(v)
        gate = None if gate is None else queries.from_tiles(gate)
    dtype, compute = q.dtype, _compute_dtype(q)
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    tiles_q, tiles_k = _tiles(queries, q), _tiles(keys, k)
    coarse = _coarse(q, k, v, tiles_q, tiles_k, scale)
    allowed = _tokens(chosen_tiles(coarse.scores, sparsities, plan), tiles_q, tiles_k)
    out, lse = masked_attention(q, k, v, allowed, scale)
    if gate is not None:
        out = out + gate * (tiles_q.own @ (coarse.weights @ coarse.v))
    out = out.to(dtype)
    if not plan.tiled:
        return out, lse
    return queries.to_tiles(out), queries.fill_padding(queries.to_tiles(lse, -1), -torch.inf, dim=-1)


def video_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    _out: Tensor,
    _lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    sparsities: Tensor | None,
    *,
    plan: TilePlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `video_sparse_attention` for q, k, v and gate, the chosen tiles held fixed; empty for no gate."""
    queries, keys, scale = plan.queries, plan.keys, plan.scale
    if plan.tiled:
        grad_out, q, k, v = (
            tiling.from_tiles(x) for tiling, x in zip((queries, queries, keys, keys), (grad_out, q, k, v), strict=True)
        )
        grad_lse = None if grad_lse is None else queries.from_tiles(grad_lse, -1)
        gate = None if gate is None else queries.from_tiles(gate)
    dtype, compute = q.dtype, _compute_dtype(q)
    grad_out, q, k, v = (x.to(compute) for x in (grad_out, q, k, v))
    tiles_q, tiles_k = _tiles(queries, q), _tiles(keys, k)
    coarse = _coarse(q, k, v, tiles_q, tiles_k, scale)
    allowed = _tokens(chosen_tiles(coarse.scores, sparsities, plan), tiles_q, tiles_k)
    sparse = masked_attention(q, k, v, allowed, scale)
    grads = masked_attention_backward(grad_out, grad_lse, *sparse, q, k, v, allowed, scale)
    grad_gate = grad_out.new_empty(0)
    if gate is not None:
        grad_gate = grad_out * (tiles_q.own @ (coarse.weights @ coarse.v))
        grad_branch = tiles_q.own.mT @ (grad_out * gate)
        more = _coarse_backward(grad_branch, coarse, tiles_q, tiles_k, scale, k.shape[1])
        grads = grads[0] + more[0], grads[1] + more[1], grads[2] + more[2]
    if plan.tiled:
        grads = queries.to_tiles(grads[0]), keys.to_tiles(grads[1]), keys.to_tiles(grads[2])
        grad_gate = grad_gate if gate is None else queries.to_tiles(grad_gate)
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype), grad_gate.to(dtype)


def chosen_tiles(scores: Tensor, sparsities: Tensor | None, plan: TilePlan) -> Tensor:
    """(B, Hq, nq, nk) bool: the best tiles of the video, the lower number first among equals, and all of the text.

    A tile of text attends to all tiles.
    """
    queries, keys = plan.queries, plan.keys
    chosen = torch.ones_like(scores, dtype=torch.bool)
    videos = slice(keys.first_video_tile, keys.first_video_tile + keys.video_tiles)
    rows = slice(queries.first_video_tile, queries.first_video_tile + queries.video_tiles)
    best = scores[:, :, rows, videos].sort(dim=-1, descending=True, stable=True).indices
    per_head = [plan.sparsity] if sparsities is None else [round(s, 6) for s in sparsities.reshape(-1).tolist()]
    for head in range(scores.shape[1]):
        keep = math.ceil((1 - per_head[head % len(per_head)]) * keys.video_tiles)
        kept = best[:, head, :, : max(1, min(keep, keys.video_tiles))]
        chosen[:, head, rows, videos] = torch.zeros_like(best[:, head], dtype=torch.bool).scatter_(-1, kept, True)
    return chosen


def _coarse(q: Tensor, k: Tensor, v: Tensor, tiles_q: _Tiles, tiles_k: _Tiles, scale: float) -> _Coarse:
    mean_k, mean_v = (tiles_k.mean @ per_query_head(x, q.shape[1]) for x in (k, v))
    mean_q = tiles_q.mean @ q
    scores = scale * mean_q @ mean_k.mT
    return _Coarse(mean_q, mean_k, mean_v, scores, scores.softmax(dim=-1))


def _coarse_backward(
    grad: Tensor, coarse: _Coarse, tiles_q: _Tiles, tiles_k: _Tiles, scale: float, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weights @ mean_v, whose gradient is grad: (B, Hq, nq, D), for q, k and v."""
    grad_weights = grad @ coarse.v.mT
    grad_scores = coarse.weights * (grad_weights - (grad_weights * coarse.weights).sum(dim=-1, keepdim=True))
    grad_q = tiles_q.mean.mT @ (scale * grad_scores @ coarse.k)
    grad_k = tiles_k.mean.mT @ (scale * grad_scores.mT @ coarse.q)
    grad_v = tiles_k.mean.mT @ (coarse.weights.mT @ grad)
    return grad_q, per_kv_head(grad_k, kv_heads), per_kv_head(grad_v, kv_heads)


def _tiles(tiling: Tiling, x: Tensor) -> _Tiles:
    number = tiling.places(x.device) // tiling.volume
    own = torch.nn.functional.one_hot(number, tiling.tiles).to(x.dtype)
    return _Tiles(own, own.mT / own.sum(dim=0).unsqueeze(-1))


def _tokens(chosen: Tensor, tiles_q: _Tiles, tiles_k: _Tiles) -> Tensor:
    """(B, Hq, nq, nk) of tiles as (B, Hq, Sq, Sk) of tokens."""
    return chosen[:, :, tiles_q.own.argmax(dim=1)][..., tiles_k.own.argmax(dim=1)]


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
