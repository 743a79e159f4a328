"""The windows of Sliding Tile Attention: which tiles of keys every tile of queries sees, as lists of blocks.

Along an axis, every tile sees the same number of tiles: at the border the window slides inwards and keeps its width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..video_layout import VideoLayout
from .block_index import BlockIndex, lists_of
from .tiles import Tiling

_CPU = torch.device("cpu")


def window_width(tiles: int, window: int) -> int:
    """Tiles that a window covers along an axis of `tiles`: an even window is widened by one, to have a middle."""
    return min(2 * (window // 2) + 1, tiles)


def window_mask(tiles: int, window: int, device: torch.device = _CPU) -> Tensor:
    """(tiles, tiles) bool: which tiles each one sees along one axis."""
    width = window_width(tiles, window)
    number = torch.arange(tiles, device=device)
    first = (number - window // 2).clamp(0, tiles - width).unsqueeze(-1)
    return (number >= first) & (number < first + width)


def window_index(
    layout: VideoLayout, tile: Sequence[int], window: Sequence[int], *, text_length: int | None = None
) -> BlockIndex:
    """The pattern of `sliding_tile_attention`, in tile order: print it, measure its density, or give it to other ops.

    One block is one tile of `Tiling(layout, tile)`; `index.to_block_mask()` is the same pattern for FlexAttention.

    Args:
        layout: where the tokens lie.
        tile: (t, h, w) in tokens.
        window: (t, h, w) in tiles, or that of every head, flattened.
        text_length: valid tokens of text, the first ones; None means all.

    Raises:
        ArgumentError: on a tile or window that is not made of positive ints, three per head.

    Paper: https://arxiv.org/abs/2502.04507
    """
    check_window("window_index", window)
    if len(tile) != 3 or min(tile) < 1:
        raise ArgumentError("window_index", "tile", "be three positive ints (t, h, w)", list(tile))
    tiling = Tiling(layout, (tile[0], tile[1], tile[2]))
    index, count, sizes = window_lists(tiling, window, text_length, _CPU)
    return BlockIndex(index, count, tiling.volume, tiling.volume, tiling.padded_tokens, tiling.padded_tokens, sizes)


def window_lists(
    tiling: Tiling, window: Sequence[int], text_length: int | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The lists of `window_index`, computed on the device that needs them, without waiting for it.

    Returns:
        index: (1, 1 or Hq, tiles, width) int32; one head if all have the same window.
        count: (1, 1 or Hq, tiles) int32.
        key_sizes: (tiles,) int32, or None if all tiles are full.
    """
    heads = [tuple(window[at : at + 3]) for at in range(0, len(window), 3)]
    sizes = _key_sizes(tiling, text_length, device)
    lists = {head: lists_of(_mask(tiling, head, device) & (sizes > 0)) for head in dict.fromkeys(heads)}
    shown = heads if len(lists) > 1 else heads[:1]
    index, count = (torch.stack(parts)[None] for parts in zip(*(lists[head] for head in shown), strict=True))
    # Text sees all tiles; without it the longest list is that of the largest window.
    width = tiling.tiles if tiling.text_tiles else max(_tiles_seen(tiling, head) for head in heads)
    return index[..., :width].contiguous(), count, None if tiling.is_full and text_length is None else sizes


def fitted(tiling: Tiling) -> Tiling:
    """The same tiles without those sides that are longer than their axis: they hold the same tokens, and padding."""
    t, h, w = map(min, tiling.tile, tiling.layout.grid)
    return Tiling(tiling.layout, (t, h, w))


def window_density(tiling: Tiling, window: Sequence[int]) -> float:
    """Tiles of video that a tile of video sees over all of them, 0 ... 1, mean over the heads."""
    heads = [_tiles_seen(tiling, window[at : at + 3]) for at in range(0, len(window), 3)]
    return sum(heads) / len(heads) / tiling.video_tiles


def check_window(op: str, window: Sequence[int], heads: int | None = None) -> None:
    """Raises ArgumentError unless `window` is three positive ints, or three for every one of `heads` (None: any)."""
    wanted = (3, 3 * heads) if heads else ()
    fits = len(window) in wanted if wanted else len(window) > 0 and len(window) % 3 == 0
    if not fits or min(window) < 1:
        every = f"each of the {heads} query heads" if heads else "every query head"
        must = f"be three positive ints (t, h, w), in tiles, or three for {every}"
        raise ArgumentError(op, "window", must, f"{len(window)} entries: {list(window)[:12]}")


def _tiles_seen(tiling: Tiling, window: Sequence[int]) -> int:
    """Tiles of video that every tile of video sees in one head."""
    return math.prod(map(window_width, tiling.grid, window))


def _mask(tiling: Tiling, window: Sequence[int], device: torch.device) -> Tensor:
    """(tiles, tiles) bool of one head: tiles of video see their window and the text, text sees everything."""
    video = torch.ones(1, 1, dtype=torch.bool, device=device)
    for tiles, size in zip(tiling.grid, window, strict=True):
        axis = window_mask(tiles, size, device)
        video = (video[:, None, :, None] & axis[None, :, None, :]).reshape(len(video) * tiles, -1)
    text = tiling.text_tiles
    sides = (text, 0, text, 0) if tiling.layout.text_first else (0, text, 0, text)
    return torch.nn.functional.pad(video, sides, value=True)


def _key_sizes(tiling: Tiling, text_length: int | None, device: torch.device) -> Tensor:
    """(tiles,) int32: keys of each tile that anyone may see."""
    sizes = tiling.sizes(device)
    if text_length is not None:
        text = slice(tiling.first_text_tile, tiling.first_text_tile + tiling.text_tiles)
        first = torch.arange(tiling.text_tiles, device=device, dtype=torch.int32) * tiling.volume
        sizes[text] = torch.minimum(sizes[text], (text_length - first).clamp(min=0))
    return sizes
