"""Sliding tile attention as tiling, then block-sparse attention to lists of tiles: what all its providers share.

The lists depend on sizes only, and yet are computed at every call: a tensor that outlives a call would be overwritten
by CUDA graphs, whose memory it lies in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks.sliding_tiles import window_lists
from ..blocks.tiles import Tiling
from ..layout import like_query


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tiling: Tiling,
    window: tuple[int, ...] | Tensor,
    text_length: int | None,
    tiled: bool,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, S, D), k, v: (B, Hkv, S, D), in tile order if `tiled`, else in raster order.

    Returns out like q and lse (B, Hq, S) fp32, in the same order.
    """
    lists, block = window_lists(tiling, window, text_length, q.device), tiling.volume
    in_tiles = (q, k, v) if tiled else tuple(map(tiling.to_tiles, (q, k, v)))
    out, lse = torch.ops.sparseattn.block_sparse_attention(
        *(*in_tiles, *lists), block_q=block, block_k=block, scale=scale, provider=provider
    )
    return (out, lse) if tiled else (like_query(tiling.from_tiles(out), q), tiling.from_tiles(lse, dim=-1))


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
    window: tuple[int, ...] | Tensor,
    text_length: int | None,
    tiled: bool,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` for q, k and v, in their layouts."""
    lists, block = window_lists(tiling, window, text_length, q.device), tiling.volume
    given = q, k, v
    if not tiled:
        grad_out, out, q, k, v = map(tiling.to_tiles, (grad_out, out, q, k, v))
        lse = tiling.to_tiles(lse, dim=-1)
        grad_lse = None if grad_lse is None else tiling.to_tiles(grad_lse, dim=-1)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.sparseattn.block_sparse_attention_backward(
        grad_out, grad_lse, out, lse, q, k, v, *lists, block, block, False, scale, provider
    )
    if tiled:
        return grads
    grad_q, grad_k, grad_v = (like_query(tiling.from_tiles(grad), x) for grad, x in zip(grads, given, strict=True))
    return grad_q, grad_k, grad_v
