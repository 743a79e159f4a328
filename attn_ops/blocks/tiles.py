"""Tiling: the tokens of a video regrouped so that every tile of space and time is one block of a sequence.

In tile order the tiles follow each other in raster order, and so do the tokens inside a tile. Every tile has room for
`volume` tokens: one that the border cuts short holds its tokens first and padding after them. Text is cut into tiles
of its own, before or after those of the video.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..video_layout import VideoLayout


@dataclass(frozen=True)
class Tiling:
    """A layout cut into tiles.

    It holds numbers only. Its tensors are computed where they are asked for, by torch operations on those numbers, so
    that they can be traced and wait for no device.

    Args:
        layout: where the tokens lie before; raster order.
        tile: (t, h, w), tokens of a tile along each axis.
    """

    layout: VideoLayout
    tile: tuple[int, int, int]

    @property
    def volume(self) -> int:
        """Places of a tile."""
        return math.prod(self.tile)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tiles along each axis."""
        t, h, w = (-(-tokens // size) for tokens, size in zip(self.layout.grid, self.tile, strict=True))
        return t, h, w

    @property
    def video_tiles(self) -> int:
        """Tiles of the video."""
        return math.prod(self.grid)

    @property
    def text_tiles(self) -> int:
        """Tiles of text; the last may be short."""
        return -(-self.layout.text_tokens // self.volume)

    @property
    def tiles(self) -> int:
        """All tiles."""
        return self.video_tiles + self.text_tiles

    @property
    def first_video_tile(self) -> int:
        """Number of the first tile of the video: those of a leading text come before it."""
        return self.text_tiles if self.layout.text_first else 0

    @property
    def first_text_tile(self) -> int:
        """Number of the first tile of text, if there is text."""
        return 0 if self.layout.text_first else self.video_tiles

    @property
    def padded_tokens(self) -> int:
        """Places of all tiles: the length of a sequence in tile order."""
        return self.tiles * self.volume

    @property
    def is_full(self) -> bool:
        """Whether no tile is short: then tile order is a permutation, without padding."""
        return self.padded_tokens == self.layout.tokens

    def places(self, device: torch.device) -> Tensor:
        """(tokens,) int64: where in tile order each token of the layout goes."""
        number, inside = _zeros(device), _zeros(device)
        for axis, (tokens, size) in enumerate(zip(self.layout.grid, self.tile, strict=True)):
            position = torch.arange(tokens, device=device)
            first = position // size * size
            shape = [-1 if axis == other else 1 for other in range(3)]
            number = number * self.grid[axis] + (position // size).view(shape)
            # The tile may be short along this axis: its tokens are counted by what it has.
            inside = inside * (tokens - first).clamp(max=size).view(shape) + (position - first).view(shape)
        video = ((number + self.first_video_tile) * self.volume + inside).flatten()
        if not self.layout.text_tokens:
            return video
        text = torch.arange(self.layout.text_tokens, device=device) + self.first_text_tile * self.volume
        return torch.cat([text, video] if self.layout.text_first else [video, text])

    def sizes(self, device: torch.device) -> Tensor:
        """(tiles,) int32: tokens of each tile."""
        if self.is_full:
            return torch.full((self.tiles,), self.volume, dtype=torch.int32, device=device)
        video = torch.ones((1, 1, 1), dtype=torch.int32, device=device)
        for axis, (tokens, size) in enumerate(zip(self.layout.grid, self.tile, strict=True)):
            shape = [-1 if axis == other else 1 for other in range(3)]
            video = video * _lengths(tokens, size, device).view(shape)
        if not self.layout.text_tokens:
            return video.flatten()
        text = _lengths(self.layout.text_tokens, self.volume, device)
        return torch.cat([text, video.flatten()] if self.layout.text_first else [video.flatten(), text])

    def padding(self, device: torch.device) -> Tensor:
        """(padded_tokens,) bool: the places without a token."""
        return (torch.arange(self.volume, device=device) >= self.sizes(device).unsqueeze(-1)).flatten()

    def to_tiles(self, x: Tensor, dim: int = -2, *, places: Tensor | None = None) -> Tensor:
        """Copy x into tile order along `dim`, `layout.tokens` long, which becomes `padded_tokens`; padding is 0.

        `places(x.device)` may be given, here and below, where several tensors are moved.
        """
        shape = list(x.shape)
        shape[dim] = self.padded_tokens
        fresh = x.new_empty(shape) if self.is_full else x.new_zeros(shape)
        return fresh.index_copy_(dim, self.places(x.device) if places is None else places, x)

    def from_tiles(self, x: Tensor, dim: int = -2, *, places: Tensor | None = None) -> Tensor:
        """Copy x back from tile order along `dim`, which becomes `layout.tokens` long; padding is dropped."""
        return x.index_select(dim, self.places(x.device) if places is None else places)

    def fill_padding(self, x: Tensor, value: float = 0.0, dim: int = -2) -> Tensor:
        """x, in tile order along `dim`, with `value` where no token is; x itself if there is no such place."""
        if self.is_full:
            return x
        return x.masked_fill(self.padding(x.device).view(-1, *([1] * (-dim - 1))), value)

    def __str__(self) -> str:
        return f"{self.layout} in {self.tiles} tiles of {'x'.join(map(str, self.tile))}"


def tiling_of(
    op: str,
    seq: int,
    *,
    grid: Sequence[int],
    tile: Sequence[int],
    text_tokens: int = 0,
    text_first: bool = False,
    tiled: bool = False,
    name: str = "grid",
) -> Tiling:
    """The tiling that an op's arguments describe, for a sequence of `seq` tokens, or of places if it is `tiled`.

    Raises:
        ArgumentError: on a wrong grid, text or tile, or a length that is not theirs; the message has the arithmetic
            and calls the grid `name`.
    """
    if len(grid) != 3 or min(grid) < 1:
        raise ArgumentError(op, name, "be three positive ints (T, H, W)", list(grid))
    if text_tokens < 0:
        raise ArgumentError(op, "text_tokens", "be at least 0", text_tokens)
    if len(tile) != 3 or min(tile) < 1:
        raise ArgumentError(op, "tile", "be three positive ints (t, h, w)", list(tile))
    layout = VideoLayout((grid[0], grid[1], grid[2]), text_tokens, text_first)
    tiling = Tiling(layout, (tile[0], tile[1], tile[2]))
    wanted = tiling.padded_tokens if tiled else layout.tokens
    if seq != wanted:
        must = f"make the {seq} tokens of the sequence"
        product = " * ".join(map(str, layout.grid))
        text = f" + {text_tokens} of text" if text_tokens else ""
        got = f"{product}{text} = {layout.tokens}"
        if tiled:
            must = f"make the {seq} places of the sequence in tile order"
            got = f"{got} tokens in {tiling.tiles} tiles of {tiling.volume} = {wanted} places"
        raise ArgumentError(op, name, must, got)
    return tiling


def _zeros(device: torch.device) -> Tensor:
    return torch.zeros((1, 1, 1), dtype=torch.int64, device=device)


def _lengths(tokens: int, size: int, device: torch.device) -> Tensor:
    """Tokens of each part when `tokens` are cut into parts of `size`, (ceil(tokens / size),) int32."""
    first = torch.arange(0, tokens, size, dtype=torch.int32, device=device)
    return (tokens - first).clamp(max=size)
