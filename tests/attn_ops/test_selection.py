"""Selection of blocks: by number, by mass, by self-similarity, per head, and what is always kept."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseattn.attn_ops.blocks.block_index import mask_of
from sparseattn.attn_ops.blocks.selection import Selection, mass_blocks, mass_count, select_blocks, self_similarity
from sparseattn.attn_ops.reference import sparge as reference

PLAIN = Selection(
    keep_ratio=0.5, mass=None, similarity=-1.0, sink=False, smooth_k=False, block_q=16, block_k=16, causal=False
)


def kept(index: Tensor, count: Tensor) -> list[int]:
    """The list of one row."""
    return index[: int(count)].tolist()


def by_mass(weights: list[float], mass: float) -> list[int]:
    """The blocks that `mass_blocks` keeps of one row with these softmax weights."""
    index, count = mass_blocks(torch.tensor(weights).log(), mass)
    assert index.dtype is count.dtype is torch.int32
    return kept(index, count)


def test_mass_includes_the_block_that_reaches_it() -> None:
    """Published kernels leave it out: of two equal blocks at 0.9 they keep one, half of the mass."""
    assert by_mass([0.5, 0.5], 0.9) == [0, 1]
    assert by_mass([0.125, 0.5, 0.25, 0.125], 0.6) == [1, 2]
    assert by_mass([0.125, 0.5, 0.25, 0.125], 0.75) == [1, 2]
    assert by_mass([0.125, 0.5, 0.25, 0.125], 0.76) == [0, 1, 2]


def test_mass_keeps_at_least_one_block_and_at_one_all() -> None:
    assert by_mass([0.2, 0.5, 0.3], 0.0) == [1]
    assert by_mass([0.2, 0.5, 0.3], 1e-9) == [1]
    assert by_mass([0.2, 0.5, 0.3], 1.0) == [0, 1, 2]
    assert by_mass([1e-30, 1.0, 1e-30], 1.0) == [0, 1, 2]


def test_one_block_that_holds_all_mass_is_enough() -> None:
    index, count = mass_blocks(torch.tensor([-1000.0, 0.0, -1000.0]), 0.98)
    assert kept(index, count) == [1]


def test_ties_go_to_the_lower_block() -> None:
    assert by_mass([0.25] * 4, 0.5) == [0, 1]
    assert by_mass([0.1, 0.3, 0.3, 0.3], 0.6) == [1, 2]


def test_mass_is_not_rounded_to_half() -> None:
    """A running sum in bf16 stops growing at blocks below 2**-8; here 1000 equal blocks share the mass."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, count = mass_blocks(torch.zeros(1000, dtype=dtype), 0.98)
        assert int(count) == 980
        assert int(mass_blocks(torch.zeros(1000, dtype=dtype), 0.981)[1]) == 981


@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.99])
def test_kept_mass_is_enough_and_no_block_too_many(n: int, mass: float) -> None:
    scores = 3 * torch.randn(5, n)
    allowed = torch.rand(5, n) < 0.8
    allowed[:, 0] = True
    index, count = mass_blocks(scores, mass, allowed)
    chosen = mask_of(index, count, n)
    weights = scores.double().masked_fill(~allowed, -torch.inf).softmax(-1)
    held = (weights * chosen).sum(-1)
    assert not (chosen & ~allowed).any()
    assert (held >= mass - 1e-6).all()
    least = weights.masked_fill(~chosen, 2.0).amin(-1)
    assert ((held - least < mass + 1e-6) | (count == 1)).all()


def test_mass_where_nothing_is_allowed_is_zero_blocks() -> None:
    assert mass_count(torch.zeros(2, 3), 0.5, torch.zeros(2, 3, dtype=torch.bool)).tolist() == [0, 0]


def test_mass_per_row_is_a_tensor() -> None:
    scores = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(3, 4)
    _, count = mass_blocks(scores, torch.tensor([0.5, 0.7, 1.0]))
    assert count.tolist() == [1, 2, 4]


def mean_pairwise_cosine(rows: Tensor) -> float:
    """The definition, in fp64 and over pairs; a row of zeros has cosine 0 with every row."""
    cosines = [
        float(a @ b / (a.norm() * b.norm())) if a.any() and b.any() else 0.0
        for a in rows.double()
        for b in rows.double()
    ]
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [32, 37, 5])
def test_self_similarity_divides_by_true_counts(dtype: torch.dtype, tokens: int) -> None:
    x = (torch.randn(2, 1, tokens, 8) + torch.randn(8)).to(dtype)
    similar = self_similarity(x, 16)
    assert similar.dtype is torch.float32
    for batch, (number, block) in itertools.product(range(2), enumerate(x.split(16, dim=2))):
        assert similar[batch, 0, number].item() == pytest.approx(mean_pairwise_cosine(block[batch, 0]), abs=1e-5)


def test_a_short_last_block_of_equal_rows_is_similar() -> None:
    """Published kernels divide by nothing in padding rows, so that every short block fails the test."""
    torch.testing.assert_close(self_similarity(torch.randn(8).expand(1, 1, 20, 8), 16), torch.ones(1, 1, 2))


def test_a_row_of_zeros_is_similar_to_nothing_and_harms_nobody() -> None:
    x = torch.ones(1, 1, 4, 8)
    x[0, 0, 1] = 0
    assert self_similarity(x, 4).item() == pytest.approx(9 / 16)
    assert self_similarity(torch.zeros(1, 1, 4, 8), 4).item() == 0.0


def inputs(seq_q: int = 128, seq_k: int = 128, heads: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k = torch.randn(2, heads, seq_q, 8), torch.randn(2, 2, seq_k, 8)
    return [(x + 0.5 * torch.randn(x.shape[1], 1, 8)).to(dtype) for x in (q, k)]


def chosen(q: Tensor, k: Tensor, scale: float = 0.5, **changes: Any) -> Tensor:
    """(B, Hq, nq, nk) bool."""
    index, count = select_blocks(q, k, dataclasses.replace(PLAIN, **changes), scale)
    return mask_of(index, count, index.shape[-1])


HOW: dict[str, dict[str, Any]] = {
    "ratio": {"keep_ratio": 0.3},
    "mass": {"mass": 0.6},
    "similarity": {"similarity": 0.3, "keep_ratio": 0.3},
    "similarity and mass": {"similarity": 0.3, "mass": 0.6},
    "sink": {"sink": True, "mass": 0.4},
    "per head": {"mass": torch.tensor([0.2, 0.4, 0.8, 1.0]), "similarity": torch.tensor([-1.0, 0.25, 0.3, 1.0])},
    "0-d": {"keep_ratio": torch.tensor(0.6), "similarity": torch.tensor(0.2)},
}


@pytest.mark.parametrize("name", HOW)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "block_q", "block_k"),
    [(128, 128, 16, 16), (117, 117, 32, 16), (70, 130, 16, 32), (130, 70, 8, 16)],
)
def test_chosen_blocks_are_those_of_the_definition(
    name: str, causal: bool, seq_q: int, seq_k: int, block_q: int, block_k: int
) -> None:
    q, k = inputs(seq_q, seq_k)
    changes = HOW[name] | {"causal": causal, "block_q": block_q, "block_k": block_k}
    for scale in (0.5, -0.5):
        exact = reference.chosen_blocks(q, k, how=dataclasses.replace(PLAIN, **changes), scale=scale)
        assert torch.equal(chosen(q, k, scale, **changes), exact)


@pytest.mark.parametrize(("keep_ratio", "number"), [(0.0, 1), (0.05, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_number_of_kept_blocks(keep_ratio: float, number: int) -> None:
    q, k = inputs()
    assert (chosen(q, k, keep_ratio=keep_ratio).sum(-1) == number).all()
    assert torch.equal(chosen(q, k, keep_ratio=keep_ratio), chosen(q, k, keep_ratio=torch.full((4,), keep_ratio)))


@pytest.mark.parametrize("keep_ratio", [0.25, 0.5])
def test_ratio_is_of_the_blocks_a_row_may_see(keep_ratio: float) -> None:
    """Published: of all blocks, so that early rows are dense and late ones sparse."""
    q, k = inputs()
    wanted = [max(1, int(keep_ratio * visible + 0.5)) for visible in range(1, 9)]
    number = chosen(q, k, keep_ratio=keep_ratio, causal=True).sum(-1)
    assert torch.equal(number, torch.tensor(wanted).expand_as(number))


def test_a_tensor_and_a_number_choose_alike() -> None:
    """0.7 of 5 blocks is 3.5, rounded up; 0.7 in fp32 is a little less than 0.7, and 5 times it is 3.5 again."""
    q, k = inputs(seq_k=80)
    for keep_ratio in (0.1, 0.3, 0.7, 0.9):
        assert torch.equal(chosen(q, k, keep_ratio=keep_ratio), chosen(q, k, keep_ratio=torch.tensor(keep_ratio)))
    assert (chosen(q, k, keep_ratio=0.7).sum(-1) == 4).all()


def test_blocks_that_are_always_kept_count_towards_the_ratio() -> None:
    q, k = inputs()
    with_sink = chosen(q, k, keep_ratio=0.25, sink=True)
    assert with_sink[..., 0].all()
    assert (with_sink.sum(-1) == 2).all()


def test_every_head_has_its_own_thresholds() -> None:
    q, k = inputs()
    count = chosen(q, k, keep_ratio=torch.tensor([0.125, 0.25, 0.5, 1.0])).sum(-1)
    assert torch.equal(count, torch.tensor([1, 2, 4, 8])[:, None].expand_as(count))


def test_query_heads_of_one_group_choose_for_themselves() -> None:
    q, k = inputs()
    q[:, 1] = -q[:, 0]
    blocks = chosen(q, k, keep_ratio=0.5)
    assert torch.equal(blocks[:, 0], ~blocks[:, 1])


def test_dissimilar_queries_keep_all_and_dissimilar_keys_are_kept() -> None:
    q, k = torch.ones(1, 1, 64, 8), torch.ones(1, 1, 64, 8)
    q[0, 0, 16:32:2] *= -1  # a block whose mean is 0
    k[0, 0, 48::2] *= -1
    blocks = chosen(q, k, keep_ratio=0.25, similarity=0.5)[0, 0]
    assert blocks.tolist() == [
        [False, False, False, True],
        [True] * 4,
        [False, False, False, True],
        [False] * 3 + [True],
    ]
    assert not chosen(q, k, keep_ratio=0.25)[0, 0, :, 3].any()


def test_smoothing_is_what_makes_offset_keys_dissimilar() -> None:
    """Of keys with a large common offset, all pairs are similar; without it, they are not."""
    k = torch.randn(1, 1, 64, 8) + 100
    assert self_similarity(k, 16).min() > 0.99
    assert self_similarity(k - k.mean(2, keepdim=True), 16).max() < 0.5


@pytest.mark.parametrize("mass", [None, 0.0, 0.5])
def test_own_blocks_are_always_kept_under_causal(mass: float | None) -> None:
    q, _ = inputs(heads=2)
    blocks = chosen(q, -q, keep_ratio=0.0, mass=mass, causal=True)
    own = torch.eye(8, dtype=torch.bool)
    assert (blocks & own == own).all()
    assert not (blocks & own.triu(1).logical_or(torch.ones(8, 8).triu(1).bool())).any()
    wide = chosen(q, -q, keep_ratio=0.0, mass=mass, causal=True, block_q=32)
    assert wide[:, :, 1, 2:4].all()
    assert not wide[:, :, 1, 4:].any()


def test_choice_of_earlier_rows_does_not_see_later_tokens() -> None:
    q, k = inputs(heads=2)
    later_q, later_k = q.clone(), k.clone()
    later_q[:, :, 64:] += 3
    later_k[:, :, 50:] *= -2
    for changes in HOW.values():
        if not any(isinstance(value, Tensor) and value.dim() for value in changes.values()):
            before, after = (chosen(*qk, causal=True, **changes) for qk in ((q, k), (q, later_k)))
            assert torch.equal(before[:, :, :4], after[:, :, :4])
            assert torch.equal(before[:, :, :4], chosen(later_q, later_k, causal=True, **changes)[:, :, :4])


def test_scale_decides_how_sharp_the_mass_is() -> None:
    """Published kernels use D ** -0.5 here, whatever scale is given."""
    q, k = inputs()
    numbers = [chosen(q, k, scale, mass=0.5).sum() for scale in (0.01, 1.0, 10.0)]
    assert numbers[0] > numbers[1] > numbers[2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_kept(bad: float) -> None:
    q, k = inputs()
    k[0, 0, 40, 0] = bad
    for changes in ({"keep_ratio": 0.125}, {"mass": 0.1}):
        reached = chosen(q, k, **changes)[0, :2, :, 2] | (q[0, :2].unflatten(1, (8, 16)).mean(2)[..., 0] < 0)
        assert reached.all()
        assert (chosen(q, k, **changes).sum(-1) >= 1).all()


def test_no_device_is_waited_for() -> None:
    """A fake tensor has no values: reading one on the host would raise."""
    with FakeTensorMode():
        for changes in ({}, {"keep_ratio": torch.ones(4)}, {"mass": 0.7}, {"mass": torch.ones(()), "similarity": 0.5}):
            for causal in (False, True):
                how = dataclasses.replace(PLAIN, sink=True, causal=causal, **changes)
                index, count = select_blocks(*inputs(100, 100), how, 0.5)
                assert (index.shape, count.shape) == ((2, 4, 7, 7), (2, 4, 7))
