"""The windows of Sliding Tile Attention: which tiles of keys every tile of queries sees, as lists of blocks.

Along an axis, every tile sees the same number of tiles: at the border the window slides inwards and keeps its width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import dtype_name
from ..errors import ArgumentError
from ..video_layout import VideoLayout
from .block_index import BlockIndex, lists_of
from .tiles import Tiling

_CPU = torch.device("cpu")


def window_width(tiles: int, window: int) -> int:
    """Tiles that a window covers along an axis of `tiles`: an even window is widened by one, to have a middle."""
    return min(2 * (window // 2) + 1, tiles)


def window_mask(tiles: int, window: int | Tensor, device: torch.device = _CPU) -> Tensor:
    """(tiles, tiles) bool: which tiles each one sees along one axis; one such for each head of a window (heads, 1)."""
    width = window_width(tiles, window) if isinstance(window, int) else (window // 2 * 2 + 1).clamp(max=tiles)
    number = torch.arange(tiles, device=device)
    first = (number - window // 2).clamp(min=0).clamp(max=tiles - width)
    return (number >= first.unsqueeze(-1)) & (number < (first + width).unsqueeze(-1))


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
    tiling: Tiling, window: Sequence[int] | Tensor, text_length: int | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The lists of `window_index`, computed on the device that needs them, without waiting for it.

    Args:
        tiling: the layout, cut into tiles.
        window: three numbers, or three for every head, flattened; a tensor of them is read on its device.
        text_length: valid tokens of text, the first ones; None means all.
        device: where the lists are needed.

    Returns:
        index: (1, 1 or Hq, tiles, width) int32; one head if all have the same window.
        count: (1, 1 or Hq, tiles) int32.
        key_sizes: (tiles,) int32, or None if all tiles are full.
    """
    sizes = _key_sizes(tiling, text_length, device)
    if isinstance(window, Tensor):
        heads = window.long().clamp(min=1).view(-1, 1, 3)
        index, count = (part[None] for part in lists_of(_mask(tiling, heads.unbind(dim=-1), device) & (sizes > 0)))
    else:
        index, count = _fixed_lists(tiling, window, sizes)
    return index.contiguous(), count, None if tiling.is_full and text_length is None else sizes


def _fixed_lists(tiling: Tiling, window: Sequence[int], sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The index and count of windows that are known: each is computed once, and the lists are as long as they must."""
    heads = [tuple(window[at : at + 3]) for at in range(0, len(window), 3)]
    lists = {head: lists_of(_mask(tiling, head, sizes.device) & (sizes > 0)) for head in dict.fromkeys(heads)}
    shown = heads if len(lists) > 1 else heads[:1]
    index, count = (torch.stack(parts)[None] for parts in zip(*(lists[head] for head in shown), strict=True))
    # Text sees all tiles; without it the longest list is that of the largest window.
    width = tiling.tiles if tiling.text_tiles else max(_tiles_seen(tiling, head) for head in heads)
    return index[..., :width], count


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


def check_windows(op: str, windows: Tensor, q: Tensor) -> None:
    """Raises ArgumentError unless `windows`, which nobody reads before the device does, has a place beside q."""
    shapes, shape = ((3,), (3 * q.shape[1],)), tuple(windows.shape)
    if shape not in shapes or windows.device != q.device or windows.dtype == torch.bool or windows.is_complex():
        must = f"be real numbers of shape (3,) or ({3 * q.shape[1]},), three per query head, on q's device {q.device}"
        raise ArgumentError(op, "windows", must, f"{dtype_name(windows.dtype)} {shape} on {windows.device}")


def _tiles_seen(tiling: Tiling, window: Sequence[int]) -> int:
    """Tiles of video that every tile of video sees in one head."""
    return math.prod(map(window_width, tiling.grid, window))


def _mask(tiling: Tiling, window: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """([heads,] tiles, tiles) bool: tiles of video see their window and the text, text sees everything."""
    video = torch.ones(1, 1, dtype=torch.bool, device=device)
    for tiles, size in zip(tiling.grid, window, strict=True):
        axis = window_mask(tiles, size, device)
        video = (video[..., :, None, :, None] & axis[..., None, :, None, :]).flatten(-2).flatten(-3, -2)
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
