"""sliding_tile_attention, defined: dense attention under a mask that is decided token by token.

With n tiles along an axis and a window of k, r = k // 2: a query in tile i sees the keys of tile j where
|clamp(i, r, n - 1 - r) - j| <= r, along all three axes; where r > n - 1 - r, the clamp gives n - 1 - r.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..blocks.tiles import Tiling
from .attention import masked_attention, masked_attention_backward

_TEXT: tuple[int, ...] = (-1, -1, -1)


def sliding_tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tiling: Tiling,
    window: tuple[int, ...] | Tensor,
    text_length: int | None,
    tiled: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, S, D) to the windows of k, v: (B, Hkv, S, D). Returns out, lse (B, Hq, S)."""
    allowed = allowed_tokens(tiling, window, text_length, tiled=tiled, device=q.device)
    return masked_attention(q, k, v, allowed, scale)


def sliding_tile_attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `sliding_tile_attention` with respect to q, k and v."""
    allowed = allowed_tokens(tiling, window, text_length, tiled=tiled, device=q.device)
    return masked_attention_backward(grad_out, grad_lse, out, lse, q, k, v, allowed, scale)


def allowed_tokens(
    tiling: Tiling, window: tuple[int, ...] | Tensor, text_length: int | None, *, tiled: bool, device: torch.device
) -> Tensor:
    """(heads or 1, S, S) bool, True where a query may see a key: in raster order, or in tile order with its padding."""
    if isinstance(window, Tensor):
        window = tuple(max(int(size), 1) for size in window.tolist())
    tile, valid = _in_tile_order(tiling, text_length) if tiled else _in_raster_order(tiling, text_length)
    text = (tile < 0).any(dim=-1)
    masks = []
    for head in zip(*[iter(window)] * 3, strict=True):
        seen = torch.ones(len(tile), len(tile), dtype=torch.bool)
        for place, tiles, size in zip(tile.unbind(dim=-1), tiling.grid, head, strict=True):
            reach = size // 2
            middle = place.clamp(min=reach).clamp(max=tiles - 1 - reach)
            seen &= (middle[:, None] - place[None, :]).abs() <= reach
        masks.append((seen | text[:, None] | text[None, :]) & valid)
    return torch.stack(masks).to(device)


def _in_raster_order(tiling: Tiling, text_length: int | None) -> tuple[Tensor, Tensor]:
    """The tile of every token, (S, 3), -1 for text; and whether it may be seen as a key, (S,)."""
    layout = tiling.layout
    tokens = itertools.product(*(range(size) for size in layout.grid))
    video = [tuple(at // size for at, size in zip(token, tiling.tile, strict=True)) for token in tokens]
    text = [number < _valid(tiling, text_length) for number in range(layout.text_tokens)]
    return _joined(tiling, video, [True] * len(video), text)


def _in_tile_order(tiling: Tiling, text_length: int | None) -> tuple[Tensor, Tensor]:
    """The same of every place in tile order; padding may not be seen."""
    video, exists = [], []
    for tile in itertools.product(*(range(tiles) for tiles in tiling.grid)):
        tokens = 1
        for number, size, length in zip(tile, tiling.tile, tiling.layout.grid, strict=True):
            tokens *= min(size, length - number * size)
        video += [tile] * tiling.volume
        exists += [True] * tokens + [False] * (tiling.volume - tokens)
    text = [number < _valid(tiling, text_length) for number in range(tiling.text_tiles * tiling.volume)]
    return _joined(tiling, video, exists, text)


def _valid(tiling: Tiling, text_length: int | None) -> int:
    return tiling.layout.text_tokens if text_length is None else text_length


def _joined(
    tiling: Tiling, video: list[tuple[int, ...]], exists: list[bool], text: list[bool]
) -> tuple[Tensor, Tensor]:
    if tiling.layout.text_first:
        return torch.tensor([_TEXT] * len(text) + video), torch.tensor(text + exists)
    return torch.tensor(video + [_TEXT] * len(text)), torch.tensor(exists + text)
