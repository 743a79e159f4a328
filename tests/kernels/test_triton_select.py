"""Selection in Triton: bit for bit that of PyTorch, and every method that chooses blocks by it chooses the same."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from support.triton_aot import ARCHS, SHARED_LIMIT, gpu
from support.triton_interpreter import interpret, why_not_interpret
from torch import Tensor

from sparseattn.attn_ops.blocks import by_device, topk
from sparseattn.attn_ops.blocks.pooled import choose_blocks
from sparseattn.attn_ops.blocks.selection import Selection, select_blocks
from sparseattn.attn_ops.blocks.sla_method import SlaMethod
from sparseattn.attn_ops.blocks.tile_selection import TilePlan
from sparseattn.attn_ops.blocks.tiles import Tiling
from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.attn_ops.kernels import video_sparse
from sparseattn.attn_ops.kernels.triton.select import ROW_TILES, count_to_mass, top_k_blocks
from sparseattn.attn_ops.video_layout import VideoLayout

interpreted = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())
SIZES = pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000, 5000])


def scores_of(n: int) -> Tensor:
    """(2, 3, n): ties, both zeros, all different, NaN and infinities among numbers, only -inf, only NaN."""
    ties = torch.randint(-3, 4, (n,)).float()
    zeros = torch.where(torch.rand(n) < 0.5, -0.0, 0.0)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan, 1.0, 1e-42, -1e-42, 3e38])
    mixed = special[torch.randint(len(special), (n,))]
    lowest = torch.full((n,), -torch.inf)
    return torch.stack([ties, zeros, torch.randn(n), mixed, lowest, lowest * torch.nan]).view(2, 3, n)


def check(scores: Tensor, keep: int | Tensor, allowed: Tensor | None = None) -> None:
    before = scores.clone()
    with interpret():
        index, count = top_k_blocks(scores, keep, allowed)
    want, want_count = topk.top_k_blocks(scores, keep, allowed)
    assert torch.equal(count, want_count)
    assert torch.equal(index, want)
    assert (index.dtype, count.dtype, index.is_contiguous()) == (torch.int32, torch.int32, True)
    candidates = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand(scores.shape)
    assert torch.equal(count, torch.minimum(torch.as_tensor(keep), candidates.sum(dim=-1)))
    torch.testing.assert_close(scores, before, rtol=0, atol=0, equal_nan=True)


@interpreted
@SIZES
@pytest.mark.parametrize("restricted", [False, True])
def test_top_k_is_that_of_pytorch(n: int, restricted: bool) -> None:
    allowed = None
    if restricted:
        allowed = torch.rand(2, 3, n) < 0.6
        allowed[0, 0], allowed[1, 0] = False, False
    for keep in (1, n // 3 + 1, n + 5):
        check(scores_of(n), keep, allowed)


@interpreted
@SIZES
def test_a_number_for_every_row(n: int) -> None:
    allowed = torch.arange(n) % 3 != 1
    check(scores_of(n), torch.tensor([[1, n, 2 * n], [n // 2 + 1, 3, n]]), allowed)


@interpreted
@pytest.mark.parametrize("keep", [torch.tensor(3), torch.tensor([[2], [5]]), torch.tensor([1, 4, 2])[None]], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (20,), (3, 20), (3, 1), (2, 1, 20), (2, 3, 1), (1, 1, 20)], ids=str)
def test_broadcast_numbers_and_candidates(keep: Tensor, shape: tuple[int, ...]) -> None:
    check(scores_of(20), keep.int(), torch.rand(shape) < 0.7)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype: torch.dtype) -> None:
    check(scores_of(70).to(dtype), 9)


@interpreted
def test_any_strides_and_number_of_dimensions() -> None:
    check(torch.randn(4, 70)[:, 3:40], 5)
    check(torch.randn(30, 4).T, 5, torch.rand(30, 4).T < 0.5)
    check(torch.randn(33), 4)
    check(torch.randn(2, 1, 2, 2, 9), 4, torch.rand(2, 9) < 0.5)


@interpreted
def test_no_rows_no_blocks_and_what_it_refuses() -> None:
    with interpret():
        for shape in ((0, 5), (2, 0)):
            index, count = top_k_blocks(torch.zeros(shape), 3)
            assert index.shape == shape
            assert count.tolist() == [0] * shape[0]
        with pytest.raises(ArgumentError, match="keep must be at least 1, got 0"):
            top_k_blocks(torch.zeros(1, 3), 0)


@interpreted
@SIZES
def test_the_number_that_holds_a_mass_is_that_of_pytorch(n: int) -> None:
    rows = torch.stack([torch.zeros(n), torch.randn(n), 8 * torch.randn(n), torch.randint(0, 3, (n,)).float()])
    weights = rows.softmax(dim=-1)
    weights[2, n // 2] = torch.nan
    for mass in (0.0, 1e-9, 0.5, 0.98, 0.9999999, torch.tensor([0.3, 0.9, 0.2, 0.7])):
        mass = torch.as_tensor(mass)
        with interpret():
            count = count_to_mass(weights, mass)
        assert count.dtype is torch.int32
        assert torch.equal(count.long(), topk.count_to_mass(weights, mass))


@interpreted
def test_mass_that_nothing_holds_takes_all_that_count() -> None:
    """Half of the weight is lost in NaN, and a weight below 2**-40 is no unit."""
    weights = torch.tensor([[0.25, 0.25, torch.nan, 1e-13, 0.0], [0.0] * 5])
    with interpret():
        assert count_to_mass(weights, torch.tensor(0.9)).tolist() == [2, 0]


def by_triton(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call it as on a GPU."""
    with interpret(), mock.patch.object(by_device, "runs_triton", return_value=True):
        return function(*args, **kwargs)


def same(function: Any, *args: Any, **kwargs: Any) -> None:
    index, count = by_triton(function, *args, **kwargs)
    want, want_count = function(*args, **kwargs)
    assert torch.equal(count, want_count)
    assert torch.equal(index, want)


def integers(*shape: int) -> Tensor:
    """Means of a power of two of them, and products of those means, are exact: scores have many ties."""
    return torch.randint(-3, 4, shape).float()


@interpreted
@pytest.mark.parametrize("causal", [False, True])
def test_block_topk_chooses_the_same(causal: bool) -> None:
    q, k = integers(2, 4, 100, 8), integers(2, 2, 100, 8)
    same(choose_blocks, q, k, keep_ratio=0.4, block_q=16, block_k=8, causal=causal)


SPARGE = Selection(
    keep_ratio=0.4, mass=None, similarity=-1.0, sink=True, smooth_k=False, block_q=16, block_k=8, causal=True
)


@interpreted
@pytest.mark.parametrize(
    "changes",
    [{}, {"mass": 0.7}, {"mass": torch.tensor([0.5, 1.0]), "causal": False}, {"similarity": 0.2, "sink": False}],
    ids=["ratio", "mass", "mass per head", "similarity"],
)
def test_sparge_chooses_the_same(changes: dict[str, Any]) -> None:
    same(select_blocks, integers(1, 2, 90, 8), integers(1, 1, 90, 8), dataclasses.replace(SPARGE, **changes), 0.1)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("keep_ratios", [None, torch.tensor([0.2, 0.6])], ids=["ratio", "ratio per head"])
def test_sla_chooses_the_same(dtype: torch.dtype, compat: bool, keep_ratios: Tensor | None) -> None:
    how = SlaMethod(0.4, "all", "softmax", 16, 8, compat, keep_ratios)
    same(how.critical_blocks, integers(1, 2, 128, 8).to(dtype), integers(1, 1, 128, 8).to(dtype))


@interpreted
@pytest.mark.parametrize("grid", [(4, 4, 8), (3, 5, 7)], ids=["full tiles", "short tiles"])
def test_vsa_attends_to_the_same(grid: tuple[int, int, int]) -> None:
    tiling = Tiling(VideoLayout(grid, 5), (2, 2, 4))
    plan = TilePlan(tiling, tiling, False, 0.6, 0.3)
    q, k, v, gate = (integers(1, heads, tiling.layout.tokens, 8) for heads in (2, 1, 1, 2))
    arguments = {"plan": plan, "provider": "reference"}
    got = by_triton(video_sparse.attention, q, k, v, gate, None, **arguments)
    want = video_sparse.attention(q, k, v, gate, None, **arguments)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("tile", ROW_TILES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_without_spills(arch: int, tile: Any) -> None:
    """With candidates and a number for every row, which take the most registers."""
    rows = torch.zeros(2, 3, tile.entries)
    with gpu(arch) as kernels:
        top_k_blocks(rows, torch.tensor([1, 2, 3]), rows == 0)
        count_to_mass(rows, torch.tensor(0.5))
    assert [kernel.launches for kernel in kernels] == [[(6, 1, 1)]] * 2
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= SHARED_LIMIT[arch], kernel


def test_a_kernel_for_each_tile_and_none_for_each_length() -> None:
    with gpu(90) as kernels:
        for n in (1, 16, 100, 256, 257, 1024, 1025, 4096, 10000):
            for rows in (1, 3, 16):
                top_k_blocks(torch.zeros(rows, n), 1 if rows == 3 else 16)
    assert [len(kernel.launches) for kernel in kernels] == [12, 6, 9]
