"""Which tiles are chosen: how many, which among equals, and text."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseattn.attn_ops.blocks.block_index import mask_of
from sparseattn.attn_ops.blocks.tile_selection import TilePlan, choose_tiles, kept_tiles, split_tiles
from sparseattn.attn_ops.blocks.tiles import Tiling
from sparseattn.attn_ops.reference.vsa import chosen_tiles
from sparseattn.attn_ops.video_layout import VideoLayout

TILE = (2, 2, 4)
# layouts of queries and keys
LAYOUTS = {
    "full tiles": (VideoLayout((4, 6, 8)),) * 2,
    "short tiles": (VideoLayout((5, 6, 7)),) * 2,
    "one tile": (VideoLayout((2, 2, 3)),) * 2,
    "text last": (VideoLayout((5, 6, 7), 9),) * 2,
    "text first": (VideoLayout((3, 5, 8), 21, True),) * 2,
    "cross": (VideoLayout((2, 4, 6)), VideoLayout((5, 4, 6))),
    "cross with text": (VideoLayout((4, 4, 7), 5, True), VideoLayout((2, 3, 4), 5, True)),
}


def plan_of(name: str, sparsity: float = 0.7) -> TilePlan:
    queries, keys = (Tiling(layout, TILE) for layout in LAYOUTS[name])
    return TilePlan(queries, keys, False, sparsity, 1.0)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_chosen_tiles_are_those_of_the_definition(name: str, sparsity: float) -> None:
    plan = plan_of(name, sparsity)
    queries, keys = plan.queries, plan.keys
    # Few different values: most rows have equals at the edge of what is kept.
    scores = torch.randint(0, 4, (2, 2, queries.tiles, keys.tiles)).float()
    index, count = choose_tiles(scores, None, plan)
    assert torch.equal(mask_of(index, count, keys.tiles), chosen_tiles(scores, None, plan))
    expected = torch.full_like(count, keys.tiles)
    videos = slice(queries.first_video_tile, queries.first_video_tile + queries.video_tiles)
    expected[:, :, videos] = kept_tiles(sparsity, keys.video_tiles) + keys.text_tiles
    assert torch.equal(count, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sparsity_per_head(name: str) -> None:
    plan = plan_of(name)
    scores = torch.randint(0, 9, (2, 4, plan.queries.tiles, plan.keys.tiles)).float()
    values = (0.9, 0.7, 0.3, 0.0)
    index, count = choose_tiles(scores, torch.tensor(values), plan)
    mask = mask_of(index, count, plan.keys.tiles)
    assert torch.equal(mask, chosen_tiles(scores, torch.tensor(values), plan))
    for head, sparsity in enumerate(values):
        assert torch.equal(mask[:, head], chosen_tiles(scores, None, plan_of(name, sparsity))[:, head])


@pytest.mark.parametrize(
    ("sparsity", "tiles", "kept"),
    [
        (0.7, 10, 4),  # 1 - 0.7 is a little more than 0.3 in doubles, and upstream keeps what that gives
        (0.7, 100, 31),
        (0.9, 10, 1),
        (0.9, 624, 63),
        (0.8, 624, 125),
        (0.9, 768, 77),
        (0.0, 624, 624),
        (1.0, 624, 1),
        (0.999, 5, 1),
        (0.5, 1, 1),
    ],
)
def test_number_of_kept_tiles(sparsity: float, tiles: int, kept: int) -> None:
    assert kept_tiles(sparsity, tiles) == kept
    tiling = Tiling(VideoLayout((1, 1, tiles)), (1, 1, 1))
    scores = torch.randn(1, 1, 4, tiles).repeat(1, 1, -(-tiles // 4), 1)[:, :, :tiles]
    for sparsities in (None, torch.tensor(sparsity), torch.tensor(sparsity, dtype=torch.float64)):
        _, count = choose_tiles(scores, sparsities, TilePlan(tiling, tiling, False, sparsity, 1.0))
        assert (count == kept).all()


def test_a_tensor_keeps_as_many_as_a_number() -> None:
    """At every sparsity of two decimals, although fp32 holds few of them."""
    tiling = Tiling(VideoLayout((1, 1, 100)), (1, 1, 1))
    scores = torch.randn(1, 101, 100, 100)
    values = [i / 100 for i in range(101)]
    _, count = choose_tiles(scores, torch.tensor(values), TilePlan(tiling, tiling, False, 0.0, 1.0))
    assert count[0, :, 0].tolist() == [kept_tiles(value, 100) for value in values]


def test_equal_scores_go_to_the_lowest_tiles_and_never_to_more() -> None:
    plan = plan_of("full tiles")
    index, count = choose_tiles(torch.zeros(1, 1, 12, 12), None, plan)
    assert (count == 4).all()
    assert (index[..., :4] == torch.arange(4)).all()
    # A bisection between the least and the largest score never meets 0 here, and takes all that are equal to it.
    scores = torch.zeros(1, 1, 12, 12)
    scores[..., 11], scores[..., 1] = 1e30, -1e30
    index, count = choose_tiles(scores, None, plan)
    assert (count == 4).all()
    assert (index[..., :4] == torch.tensor([0, 2, 3, 11])).all()


def test_rows_without_a_finite_score_keep_as_many() -> None:
    plan = plan_of("full tiles")
    scores = torch.randn(1, 1, 12, 12)
    scores[0, 0, 0], scores[0, 0, 1], scores[0, 0, 2] = -math.inf, math.inf, math.nan
    index, count = choose_tiles(scores, None, plan)
    assert (count == 4).all()
    assert (index[0, 0, :3, :4] == torch.arange(4)).all()


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", ["full tiles", "short tiles", "text first"])
def test_tiles_in_parts_are_the_same_attention(name: str, parts: int) -> None:
    plan, block = plan_of(name), 16 // parts
    sizes = None if plan.keys.is_full else plan.keys.sizes(torch.device("cpu"))
    lists = *choose_tiles(torch.randn(1, 2, plan.queries.tiles, plan.keys.tiles), None, plan), sizes
    q = plan.queries.to_tiles(torch.randn(1, 2, plan.queries.layout.tokens, 16))
    k, v = (plan.keys.to_tiles(torch.randn(1, 2, plan.keys.layout.tokens, 16)) for _ in range(2))
    attend = torch.ops.sparseattn.block_sparse_attention
    whole = attend(q, k, v, *lists, block_q=16, block_k=16)
    split = attend(q, k, v, *split_tiles(*lists, parts, block), block_q=block, block_k=block)
    torch.testing.assert_close(split, whole)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_device_is_waited_for(name: str) -> None:
    """A fake tensor has no values: reading one on the host would raise."""
    plan = plan_of(name)
    with FakeTensorMode():
        scores = torch.randn(1, 2, plan.queries.tiles, plan.keys.tiles)
        for sparsities in (None, torch.tensor(0.5)):
            index, count = choose_tiles(scores, sparsities, plan)
            assert (index.shape, count.shape) == (scores.shape, scores.shape[:3])
