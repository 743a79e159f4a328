"""Tokens of a video moved into tile order and back, by constant index: a grid is known when a model is exported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...attn_ops.blocks.tiles import Tiling
from ...attn_ops.video_layout import VideoLayout
from .graph import Graph, Value

_CPU = torch.device("cpu")


def tiling_of(grid: Sequence[int], tile: Sequence[int], text_tokens: int, text_first: bool) -> Tiling:
    """The tiling that the parameters of an op describe."""
    layout = VideoLayout((grid[0], grid[1], grid[2]), text_tokens, text_first)
    return Tiling(layout, (tile[0], tile[1], tile[2]))


def to_tiles(x: Value, tiling: Tiling) -> Value:
    """x: (B, H, S, D) in tile order; padding is 0."""
    if tiling.is_full:
        return x.take(_sources(tiling), axis=2)
    zero = x.slice(2, 0, 1) * 0.0
    return x.graph.concat(x, zero, axis=2).take(_sources(tiling), axis=2)


def from_tiles(x: Value, tiling: Tiling) -> Value:
    """The inverse; padding is dropped."""
    return x.take(tiling.places(_CPU), axis=2)


def without_padding(x: Value, tiling: Tiling, padding: float = 0.0) -> Value:
    """The same in tile order, with another number where no token is."""
    if tiling.is_full:
        return x
    return x.graph.where(x.graph.constant(tiling.padding(_CPU).unsqueeze(-1)), padding, x)


def sizes_of(graph: Graph, tiling: Tiling) -> Value | None:
    """Tokens of every tile, INT64; None if all are full."""
    return None if tiling.is_full else graph.constant(tiling.sizes(_CPU).long())


def tile_mean(x: Value, tiling: Tiling) -> Value:
    """Mean of the tokens of every tile of x: (B, H, places, D), padding 0: (B, H, tiles, D)."""
    total = x.reshape(x.size(0), x.size(1), tiling.tiles, tiling.volume, x.size(3)).sum(3, keep=False)
    return total / tiling.sizes(_CPU).float().unsqueeze(-1)


def _sources(tiling: Tiling) -> Tensor:
    """Which token every place takes; that after the last for padding."""
    sources = torch.full((tiling.padded_tokens,), tiling.layout.tokens)
    return sources.index_copy_(0, tiling.places(_CPU), torch.arange(tiling.layout.tokens))
