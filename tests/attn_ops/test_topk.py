"""Block means and exact top-k against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseattn.attn_ops.blocks.topk import block_mean, top_k_blocks
from sparseattn.attn_ops.errors import ArgumentError


def by_sorting(scores: Tensor, keep: int, allowed: Tensor) -> list[int]:
    """Score descending, index ascending, over the allowed entries of one row."""
    order = sorted(torch.nonzero(allowed).flatten().tolist(), key=lambda j: (-scores[j].item(), j))
    return sorted(order[:keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "block"), [(32, 8), (30, 8), (5, 8), (7, 1)])
def test_block_mean_divides_by_true_counts(dtype: torch.dtype, tokens: int, block: int) -> None:
    x = torch.randn(2, tokens, 3, 4).to(dtype).transpose(1, 2)
    expected = torch.stack([part.double().mean(dim=2) for part in torch.split(x, block, dim=2)], dim=2)
    mean = block_mean(x, block)
    assert mean.dtype is torch.float32
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)


def test_block_mean_refuses_a_block_of_nothing() -> None:
    with pytest.raises(ArgumentError, match="block must be at least 1, got 0"):
        block_mean(torch.randn(1, 1, 4, 2), 0)


@pytest.mark.parametrize("keep", [1, 3, 7, 12])
@pytest.mark.parametrize("restricted", [False, True])
def test_top_k_is_exact_and_ties_go_to_the_lower_index(keep: int, restricted: bool) -> None:
    scores = torch.randint(-2, 3, (2, 3, 6, 9)).float()
    allowed = torch.rand(2, 3, 6, 9) < 0.6 if restricted else torch.ones(2, 3, 6, 9, dtype=torch.bool)
    index, count = top_k_blocks(scores, keep, allowed if restricted else None)
    assert index.dtype is torch.int32
    assert count.dtype is torch.int32
    rows = zip(scores.flatten(0, 2), allowed.flatten(0, 2), index.flatten(0, 2), count.flatten(), strict=True)
    for row_scores, row_allowed, row_index, row_count in rows:
        assert row_index[:row_count].tolist() == by_sorting(row_scores, keep, row_allowed)


@pytest.mark.parametrize("keep", [10, torch.tensor([10])])
def test_ties_of_thousands_go_to_the_lower_index(keep: int | Tensor) -> None:
    """Beyond 4096 blocks a published kernel calls torch.topk, which orders ties in another way."""
    index, count = top_k_blocks(torch.zeros(2, 5000), keep)
    assert (count == 10).all()
    assert torch.equal(index[:, :10], torch.arange(10, dtype=torch.int32).expand(2, 10))


def test_top_k_takes_a_count_per_row() -> None:
    scores = torch.randint(-2, 3, (2, 5, 8)).float()
    keep = torch.tensor([1, 2, 3, 8, 20])
    allowed = torch.arange(8) <= torch.tensor([[7], [0], [5], [7], [6]])
    index, count = top_k_blocks(scores, keep, allowed)
    assert count.tolist() == [[1, 1, 3, 8, 7]] * 2
    for batch in range(2):
        for row in range(5):
            expected = by_sorting(scores[batch, row], int(keep[row]), allowed[row])
            assert index[batch, row, : count[batch, row]].tolist() == expected


def test_infinite_scores_are_scores() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, torch.inf]])
    allowed = torch.tensor([[False, True, True, True]])
    index, count = top_k_blocks(scores, 3, allowed)
    assert index[0, : count[0]].tolist() == [1, 2, 3]


def test_nan_is_kept_rather_than_hidden() -> None:
    index, count = top_k_blocks(torch.tensor([[3.0, torch.nan, 2.0]]), 1)
    assert index[0, : count[0]].tolist() == [1]
    index, count = top_k_blocks(torch.full((1, 3), torch.nan), 2)
    assert index[0, : count[0]].tolist() == [0, 1]


def test_scores_are_not_modified() -> None:
    scores = torch.tensor([[1.0, torch.nan, 2.0]])
    before = scores.clone()
    top_k_blocks(scores, 1, torch.tensor([True, False, True]))
    torch.testing.assert_close(scores, before, equal_nan=True, rtol=0, atol=0)


def test_top_k_refuses_to_keep_nothing() -> None:
    with pytest.raises(ArgumentError, match="keep must be at least 1, got 0"):
        top_k_blocks(torch.randn(1, 3), 0)
