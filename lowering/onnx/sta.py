"""sliding_tile_attention: windows that are numbers become constant lists; those of a tensor are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...attn_ops.blocks.sliding_tiles import fitted, window_lists
from ...attn_ops.blocks.tiles import Tiling
from .attend import Lists, attend
from .graph import INT64, Graph, Value
from .selection import lists_of
from .tiles import from_tiles, tiling_of, to_tiles

_CPU = torch.device("cpu")


def sliding_tile_attention(
    graph: Graph,
    given: dict[str, Value],
    *,
    grid: Sequence[int],
    text_tokens: int,
    text_first: bool,
    tile: Sequence[int],
    window: Sequence[int],
    text_length: int | None,
    tiled: bool,
    scale: float,
    **_: Any,
) -> tuple[Value, Value]:
    """Body of `sliding_tile_attention`."""
    tiling = tiling_of(grid, tile, text_tokens, text_first)
    tiling = tiling if tiled else fitted(tiling)
    index, count, sizes = window_lists(tiling, window, text_length, _CPU)
    valid = None if sizes is None else graph.constant(sizes.long())
    if "windows" in given:
        chosen = _lists(given["windows"], tiling, valid)
    else:
        chosen = graph.constant(index.long()), graph.constant(count.long())
    lists = Lists(*chosen, tiling.volume, tiling.volume, sizes=valid)
    q, k, v = (given[name] for name in ("q", "k", "v"))
    if tiled:
        return attend(q, k, v, lists, scale=scale)
    q, k, v = (to_tiles(x, tiling) for x in (q, k, v))
    out, lse = attend(q, k, v, lists, scale=scale)
    return from_tiles(out, tiling), from_tiles(lse, tiling)


def _lists(windows: Value, tiling: Tiling, valid: Value | None) -> tuple[Value, Value]:
    """The lists of windows (3,) or (3 * Hq,), read when the model runs."""
    heads = windows.cast(INT64).at_least(1).reshape(-1, 3)
    t, h, w = (_window(heads.slice(1, axis, axis + 1).unsqueeze(2), tiles) for axis, tiles in enumerate(tiling.grid))
    seen = t.unsqueeze(2, 3, 5, 6) & h.unsqueeze(1, 3, 4, 6) & w.unsqueeze(1, 2, 4, 5)
    seen = seen.reshape(-1, tiling.video_tiles, tiling.video_tiles)
    mask = _with_text(seen, tiling)
    if valid is not None:
        mask = mask & (valid > 0)
    return lists_of(mask.unsqueeze(0))


def _window(size: Value, tiles: int) -> Value:
    """Which tiles along one axis each sees, (heads, tiles, tiles) BOOL; size: (heads, 1, 1)."""
    number = size.graph.constant(list(range(tiles)))
    reach = size // 2
    width = (reach * 2 + 1).at_most(tiles)
    first = (number.unsqueeze(1) - reach).at_least(0)
    first = first.at_most(width * -1 + tiles)
    return (number >= first) & (number < first + width)


def _with_text(video: Value, tiling: Tiling) -> Value:
    """Tiles of text see everything and are seen by all."""
    if not tiling.text_tiles:
        return video
    before = tiling.first_video_tile
    after = tiling.text_tiles - before
    padded = video.graph.op("Pad", video.cast(INT64), [0, before, before, 0, after, after], 0) > 0
    number = torch.arange(tiling.tiles)
    text = (number < before) | (number >= tiling.tiles - after)
    return padded | video.graph.constant(text) | video.graph.constant(text.unsqueeze(-1))
