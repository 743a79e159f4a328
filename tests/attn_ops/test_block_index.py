"""BlockIndex: conversions, density, the picture."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparseattn.attn_ops.blocks.block_index import BlockIndex, lists_of
from sparseattn.attn_ops.errors import ArgumentError


def random_lists(*lead: int, key_sizes: bool = False) -> BlockIndex:
    mask = torch.rand(*lead, 4, 5) < 0.5
    mask[..., 1, :] = False
    sizes = torch.tensor([8, 3, 0, 8, 5], dtype=torch.int32) if key_sizes else None
    return BlockIndex.from_mask(mask, block_q=16, block_k=8, seq_q=60, seq_k=37, key_sizes=sizes)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 3), (2, 1)])
def test_mask_survives_the_round_trip(lead: tuple[int, ...]) -> None:
    mask = torch.rand(*lead, 6, 7) < 0.4
    lists = BlockIndex.from_mask(mask, block_q=16, block_k=8)
    assert (lists.seq_q, lists.seq_k) == (96, 56)
    assert torch.equal(lists.to_mask(), mask[(None,) * (4 - mask.dim())])
    assert lists.index.shape[-1] == max(1, int(lists.count.max()))
    assert lists.density == pytest.approx(mask.double().mean().item())


def test_lists_ascend_and_padding_is_ignored() -> None:
    lists = random_lists(2, 3)
    for row, count in zip(lists.index.flatten(0, 2), lists.count.flatten(), strict=True):
        assert row[:count].tolist() == sorted(set(row[:count].tolist()))
    padded = torch.where(torch.arange(lists.index.shape[-1]) < lists.count[..., None], lists.index, 10_000).int()
    other = BlockIndex(padded, lists.count, 16, 8, 60, 37)
    assert torch.equal(other.to_mask(), lists.to_mask())


def test_lists_of_an_empty_mask() -> None:
    index, count = lists_of(torch.zeros(2, 3, dtype=torch.bool))
    assert index.shape == (2, 3)
    assert count.tolist() == [0, 0]


def test_token_mask_spells_out_every_pair() -> None:
    lists = random_lists(2, 3, key_sizes=True)
    blocks, tokens = lists.to_mask(), lists.token_mask()
    assert tokens.shape == (2, 3, 60, 37)
    for query in range(60):
        for key in range(37):
            valid = key % 8 < [8, 3, 0, 8, 5][key // 8]
            assert torch.equal(tokens[:, :, query, key], blocks[:, :, query // 16, key // 8] & valid)


@pytest.mark.parametrize("key_sizes", [False, True])
def test_block_mask_allows_the_same_tokens(key_sizes: bool) -> None:
    lists = random_lists(2, 3, key_sizes=key_sizes)
    q, k, v = (torch.randn(2, 3, tokens, 16) for tokens in (60, 37, 37))
    out = flex_attention(q, k, v, block_mask=lists.to_block_mask())
    allowed = lists.token_mask()
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(out, torch.where(allowed.any(dim=-1, keepdim=True), exact, 0.0))


def test_block_mask_survives_the_round_trip() -> None:
    lists = random_lists(1, 3)
    again = BlockIndex.from_block_mask(lists.to_block_mask())
    assert torch.equal(again.to_mask(), lists.to_mask())
    assert (again.block_q, again.block_k, again.seq_q, again.seq_k) == (16, 8, 60, 37)


def test_block_mask_lists_short_blocks_as_partial() -> None:
    lists = random_lists(1, 3, key_sizes=True)
    block_mask = lists.to_block_mask()
    short = torch.tensor([False, True, True, False, True])
    assert torch.equal(block_mask.kv_num_blocks, (lists.to_mask() & short).sum(dim=-1))
    assert torch.equal(block_mask.full_kv_num_blocks, (lists.to_mask() & ~short).sum(dim=-1))


def test_partial_blocks_are_refused() -> None:
    causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, device="cpu")
    with pytest.raises(ArgumentError, match="must have full blocks only, got 2 partial blocks"):
        BlockIndex.from_block_mask(causal)


def test_a_block_mask_of_full_blocks_is_taken() -> None:
    block_mask = create_block_mask(lambda b, h, q, k: q // 128 >= k // 128, None, None, 384, 384, device="cpu")
    lists = BlockIndex.from_block_mask(block_mask)
    assert torch.equal(lists.to_mask()[0, 0], torch.ones(3, 3).tril().bool())


def test_picture() -> None:
    mask = torch.ones(2, 3, 3).tril().bool()
    mask[1, 2, 2] = False
    text = str(BlockIndex.from_mask(mask, block_q=64, block_k=64, seq_k=150))
    assert text.splitlines() == [
        "BlockIndex: 192 x 150 tokens in 3 x 3 blocks of 64 x 64, batch 1, heads 2, density 61.1%",
        "  batch 0 head 0: 66.7%",
        "    █  ",
        "    ██ ",
        "    ███",
        "  batch 0 head 1: 55.6%",
    ]


def test_picture_of_a_large_mask_is_small() -> None:
    text = str(BlockIndex.from_mask(torch.rand(4, 8, 100, 300) < 0.3, block_q=64, block_k=64))
    lines = text.splitlines()
    assert len(lines) == 1 + 8 + 32 + 1
    assert max(map(len, lines[1:])) <= 4 + 32
    assert lines[-1] == "  and 24 more"


def test_picture_of_nothing() -> None:
    lists = BlockIndex.from_mask(torch.zeros(1, 0, 3, dtype=torch.bool), block_q=64, block_k=64)
    assert "density 0.0%" in str(lists)


def test_mistakes_are_named() -> None:
    index, count = torch.zeros(1, 1, 4, 2, dtype=torch.int32), torch.zeros(1, 1, 4, dtype=torch.int32)
    with pytest.raises(ArgumentError, match="mask must be bool with 2 to 4 dimensions"):
        BlockIndex.from_mask(torch.ones(3, 3), block_q=8, block_k=8)
    with pytest.raises(ArgumentError, match=r"mask must have \(4, 3\) blocks, got \(3, 3\)"):
        BlockIndex.from_mask(torch.ones(3, 3).bool(), block_q=8, block_k=8, seq_q=25)
    with pytest.raises(ArgumentError, match=r"block_index must be 4-D, \(batch or 1, heads or 1, 5 query blocks"):
        BlockIndex(index, count, 8, 8, 40, 24)
    with pytest.raises(ArgumentError, match="block_count must have shape"):
        BlockIndex(index, count[..., :3], 8, 8, 32, 24)
    with pytest.raises(ArgumentError, match="key_sizes must have one entry for each of the 3 key blocks"):
        BlockIndex(index, count, 8, 8, 32, 24, torch.ones(4, dtype=torch.int32))
