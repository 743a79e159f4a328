"""Tilings: where tokens go, how many each tile has, and the way back."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from sparseattn.attn_ops.blocks.tiles import Tiling, tiling_of
from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.attn_ops.video_layout import VideoLayout

CPU = torch.device("cpu")
# grid, text tokens, text first, tile
TILINGS = {
    "exact": ((4, 8, 8), 0, False, (4, 4, 4)),
    "one tile": ((2, 3, 4), 0, False, (4, 4, 4)),
    "short on every axis": ((5, 6, 7), 0, False, (4, 4, 4)),
    "short by one": ((5, 9, 9), 0, False, (4, 4, 4)),
    "Wan 1.3B, scaled down": ((21, 6, 10), 0, False, (4, 4, 4)),
    "flat tiles": ((4, 16, 24), 0, False, (2, 8, 8)),
    "image": ((1, 10, 12), 0, False, (1, 8, 8)),
    "image in deep tiles": ((1, 10, 12), 0, False, (4, 4, 4)),
    "text last": ((5, 6, 7), 9, False, (2, 2, 4)),
    "text first": ((5, 6, 7), 33, True, (2, 2, 4)),
    "whole tiles of text": ((4, 4, 4), 16, True, (2, 2, 4)),
    "uneven tile": ((7, 5, 11), 3, False, (3, 2, 5)),
}


def tiling(name: str) -> Tiling:
    grid, text, first, tile = TILINGS[name]
    return Tiling(VideoLayout(grid, text, first), tile)


def tiles_by_hand(given: Tiling) -> list[list[int]]:
    """The tokens of every tile, one tile at a time: those of the video clipped at the border, text in plain pieces."""
    (frames, rows, columns), text = given.layout.grid, given.layout.text_tokens
    first_video = text if given.layout.text_first else 0
    first_text = 0 if given.layout.text_first else given.layout.video_tokens
    t, h, w = given.tile
    video = [
        [
            first_video + (a * rows + b) * columns + c
            for a in range(t0, min(t0 + t, frames))
            for b in range(h0, min(h0 + h, rows))
            for c in range(w0, min(w0 + w, columns))
        ]
        for t0, h0, w0 in product(range(0, frames, t), range(0, rows, h), range(0, columns, w))
    ]
    volume = t * h * w
    pieces = [
        list(range(first_text + start, first_text + min(start + volume, text))) for start in range(0, text, volume)
    ]
    return [*pieces, *video] if given.layout.text_first else [*video, *pieces]


@pytest.mark.parametrize("name", TILINGS)
def test_places_and_sizes_are_those_made_by_hand(name: str) -> None:
    given = tiling(name)
    tiles = tiles_by_hand(given)
    assert given.tiles == len(tiles)
    assert given.sizes(CPU).tolist() == [len(tile) for tile in tiles]
    places = given.places(CPU)
    for number, tile in enumerate(tiles):
        assert places[tile].tolist() == [number * given.volume + i for i in range(len(tile))]
    assert given.is_full == all(len(tile) == given.volume for tile in tiles)


@pytest.mark.parametrize("name", TILINGS)
@pytest.mark.parametrize("dim", [-2, 1, -1])
def test_round_trip(name: str, dim: int) -> None:
    given = tiling(name)
    shape = [2, 3, 4]
    shape[dim] = given.layout.tokens
    x = torch.randn(shape)
    tiled = given.to_tiles(x, dim)
    assert tiled.shape[dim] == given.padded_tokens
    assert torch.equal(given.from_tiles(tiled, dim), x)
    assert torch.equal(tiled.sum(), given.fill_padding(tiled, dim=dim if dim < 0 else dim - 3).sum())
    assert int((tiled != 0).sum()) == x.numel()


@pytest.mark.parametrize("name", TILINGS)
def test_padding_and_nothing_else_is_filled(name: str) -> None:
    given = tiling(name)
    ones = torch.ones(2, given.padded_tokens, 3)
    filled = given.fill_padding(ones, 7.0)
    assert torch.equal(filled, 7.0 - 6.0 * given.to_tiles(torch.ones(2, given.layout.tokens, 3)))
    rows = given.fill_padding(ones[..., 0], 7.0, dim=-1)
    assert torch.equal(rows, filled[..., 0])
    assert (filled is ones) == given.is_full


def test_gradients_go_the_other_way() -> None:
    given = tiling("short on every axis")
    x = torch.randn(1, given.layout.tokens, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, given.padded_tokens, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(given.to_tiles, x, fast_mode=True)
    assert torch.autograd.gradcheck(given.from_tiles, y, fast_mode=True)


@pytest.mark.parametrize("name", ["exact", "text first", "short on every axis"])
def test_traced_without_constants_and_without_breaks(name: str) -> None:
    given = tiling(name)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def there_and_back(x: Tensor) -> tuple[Tensor, Tensor]:
        tiled = given.to_tiles(x)
        return tiled, given.from_tiles(tiled)

    x = torch.randn(2, given.layout.tokens, 3)
    tiled, back = there_and_back(x)
    assert torch.equal(tiled, given.to_tiles(x))
    assert torch.equal(back, x)


def test_wan_1_3b_at_480_by_832() -> None:
    given = Tiling(VideoLayout((21, 30, 52)), (4, 4, 4))
    assert given.grid == (6, 8, 13)
    assert (given.tiles, given.layout.tokens, given.padded_tokens) == (624, 32760, 39936)
    sizes = given.sizes(CPU).view(given.grid)
    per_axis = [4, 4, 4, 4, 4, 1], [4] * 7 + [2], [4] * 13
    assert sizes.tolist() == [[[t * h * w for w in per_axis[2]] for h in per_axis[1]] for t in per_axis[0]]
    assert int(sizes.sum()) == 32760
    places = given.places(CPU)
    assert int(places.unique().numel()) == 32760
    assert int(places.max()) < 39936


@pytest.mark.parametrize(("grid", "tiles"), [((30, 48, 80), 300), ((36, 48, 48), 216), ((18, 48, 80), 180)])
def test_canvases_of_sliding_tiles_are_permutations(grid: tuple[int, int, int], tiles: int) -> None:
    given = Tiling(VideoLayout(grid), (6, 8, 8))
    assert given.is_full
    assert given.tiles == tiles
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    number = (t // 6 * given.grid[1] + h // 8) * given.grid[2] + w // 8
    expected = number * 384 + (t % 6 * 8 + h % 8) * 8 + w % 8
    assert torch.equal(given.places(CPU), expected.flatten())


@pytest.mark.parametrize("name", TILINGS)
def test_tiling_of_an_op_checks_the_length(name: str) -> None:
    grid, text, first, tile = TILINGS[name]
    given = tiling(name)
    settings = {"grid": list(grid), "tile": list(tile), "text_tokens": text, "text_first": first}
    assert tiling_of("op", given.layout.tokens, **settings) == given
    assert tiling_of("op", given.padded_tokens, tiled=True, **settings) == given
    arithmetic = " \\* ".join(map(str, grid)) + (f" \\+ {text} of text" if text else "")
    with pytest.raises(
        ArgumentError, match=f"grid must make the 100000 tokens .* {arithmetic} = {math.prod(grid) + text}"
    ):
        tiling_of("op", 100_000, **settings)
    with pytest.raises(ArgumentError, match=f"in {given.tiles} tiles of {given.volume} = {given.padded_tokens} places"):
        tiling_of("op", 100_000, tiled=True, **settings)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"grid": [2, 3]}, r"grid must be three positive ints \(T, H, W\), got \[2, 3\]"),
        ({"grid": [2, 3, 0]}, "grid must be three positive ints"),
        ({"text_tokens": -1}, "text_tokens must be at least 0, got -1"),
        ({"tile": [4, 4]}, r"tile must be three positive ints \(t, h, w\), got \[4, 4\]"),
        ({"tile": [4, 0, 4]}, "tile must be three positive ints"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, object], says: str) -> None:
    settings = {"grid": [2, 3, 4], "tile": [4, 4, 4]} | wrong
    with pytest.raises(ArgumentError, match=says):
        tiling_of("op", 24, **settings)
