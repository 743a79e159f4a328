"""Blocks of a sequence that ranks share, without any rank: laid out, summed in parts, chosen, and their lists cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseattn.attn_ops.blocks.block_index import lists_of, lists_within, mask_of
from sparseattn.attn_ops.blocks.choice_in_parts import BLOCK_SUMS, CHOOSE_BY_SUMS
from sparseattn.attn_ops.blocks.pooled import choose_blocks
from sparseattn.attn_ops.sharding import shard_tokens
from sparseattn.fx_passes.parallel.pooled_sums import PooledSums
from sparseattn.fx_passes.parallel.ring import Ring, Run
from sparseattn.fx_passes.parallel.run_blocks import RunBlocks
from sparseattn.fx_passes.parallel.ulysses import Piece

BLOCK = 4


@pytest.mark.parametrize(
    ("first", "size", "laid", "sizes"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7], None),
        (8, 6, [0, 1, 2, 3, 4, 5], None),
        (6, 8, [0, 1, -1, -1, 2, 3, 4, 5, 6, 7], [2, 4, 2]),
        (6, 6, [0, 1, -1, -1, 2, 3, 4, 5], [2, 4]),
        (5, 2, [0, 1], None),
    ],
)
def test_a_run_is_laid_out_in_the_blocks_of_the_sequence(
    first: int, size: int, laid: list[int], sizes: list[int] | None
) -> None:
    place = 3
    x = torch.arange(20.0)[None, None, :, None]
    blocks = RunBlocks(Run(place, first, size), BLOCK)
    found = blocks.lay(x)
    assert found.flatten().tolist() == [place + token if token >= 0 else 0 for token in laid]
    assert torch.equal(blocks.take(found), x[:, :, place : place + size])
    full = blocks.lay(x, full=True)
    assert full.shape[2] == blocks.count * BLOCK
    assert torch.equal(blocks.take(full), x[:, :, place : place + size])
    told = blocks.sizes(x)
    assert (None if told is None else told.tolist()) == sizes


@pytest.mark.parametrize("video", [32, 29, 5])
@pytest.mark.parametrize("text", [0, 3, 4])
@pytest.mark.parametrize("text_first", [False, True])
def test_sums_in_parts_are_those_of_the_whole(video: int, text: int, text_first: bool) -> None:
    """Also a block of three ranks, ranks without tokens, and text in the middle of a block."""
    ranks, words, x = 4, torch.randn(2, 3, text, 5), torch.randn(2, 3, video, 5)
    shards = [shard_tokens(x, 2, ranks, rank) for rank in range(ranks)]
    pieces = [Piece(shards[0].shape[2], video, sharded=True), Piece(text, text, sharded=False)]
    order = slice(None, None, -1 if text_first else 1)
    held = [torch.cat([shard, words][order], dim=2) for shard in shards]
    pooled = [PooledSums(Ring(tuple(pieces[order]), False, ranks, rank, ""), BLOCK) for rank in range(ranks)]
    received = torch.stack([one.own(tokens) for one, tokens in zip(pooled, held, strict=True)])
    assert received.shape[3] == pooled[0].sent
    wanted = BLOCK_SUMS(torch.cat([x, words][order], dim=2), BLOCK)
    for one, tokens in zip(pooled, held, strict=True):
        torch.testing.assert_close(one.whole(tokens, received), wanted)
    starts = [run.first for one in pooled for run in one.ring.runs(one.ring.rank, whole=True) if run.size]
    assert pooled[0].in_parts == any(start % BLOCK for start in starts)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("varies", [False, True])
def test_rows_choose_by_sums_what_they_choose_by_tokens(causal: bool, varies: bool) -> None:
    q, k, tokens = torch.randn(2, 4, 90, 8), torch.randn(2, 2, 90, 8), 90
    ratios = torch.tensor([0.2, 0.4, 0.6, 1.0]) if varies else None
    index, count = choose_blocks(
        q, k, keep_ratio=0.3 if ratios is None else ratios, block_q=8, block_k=16, causal=causal
    )
    rows = BLOCK_SUMS(q, 8)[:, :, 5:9], BLOCK_SUMS(k, 16)
    found, counted = CHOOSE_BY_SUMS(*rows, ratios, 0.3, 5, tokens, 8, 16, causal)
    assert torch.equal(counted, count[:, :, 5:9])
    assert torch.equal(found, index[:, :, 5:9])


def test_the_part_of_lists_within_some_blocks() -> None:
    mask = torch.rand(2, 3, 5, 11) < 0.4
    mask[0, 0, 0], mask[0, 0, 1] = False, True
    lists = lists_of(mask)
    for first, blocks in ((0, 11), (0, 1), (3, 4), (8, 3)):
        index, count = lists_within(*lists, first, blocks)
        assert int(index.min()) >= 0
        assert int(index.max()) < blocks
        assert torch.equal(mask_of(index, count, blocks), mask[..., first : first + blocks])


@pytest.mark.parametrize("ratios", [None, torch.tensor([0.5, 0.25])])
def test_the_ops_are_what_they_say(ratios: Tensor | None) -> None:
    q = torch.randn(1, 2, 13, 8)
    torch.library.opcheck(BLOCK_SUMS, (q, 4))
    rows, keys = BLOCK_SUMS(q, 4), BLOCK_SUMS(q, 4)
    torch.library.opcheck(CHOOSE_BY_SUMS, (rows, keys, ratios, 0.5, 0, 13, 4, 4, True))
