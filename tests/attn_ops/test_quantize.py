"""quantize: groups exactly as published, rounding, and what must not become 0 / 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.attn_ops.numerics.quantize import (
    GRANULARITIES,
    LARGEST,
    QuantizedQK,
    mean_scores,
    offset_terms,
    quantize_qk,
    quantize_v_fp8,
    without_mean,
)

Q_GROUP = {
    "per_block": lambda n: n // 128,
    "per_warp": lambda n: n // 32,
    "per_thread": lambda n: (n // 32) * 8 + n % 8,
}
K_GROUP = {
    "per_block": lambda n: n // 64,
    "per_warp": lambda n: n // 64,
    "per_thread": lambda n: (n // 64) * 4 + (n % 8) // 2,
}


def amax_by_the_book(x: Tensor, group_of: Callable[[Tensor], Tensor]) -> Tensor:
    """For every token, the largest value of all tokens with the same published index."""
    group = group_of(torch.arange(x.shape[-2]))
    return torch.stack([x[..., group == g, :].amax(dim=(-2, -1)) for g in group], dim=-1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", LARGEST)
@pytest.mark.parametrize("seq", [1, 7, 64, 128, 200, 333])
def test_groups_are_the_published_ones(granularity: str, bits: int, seq: int) -> None:
    q, k = torch.randn(2, 4, seq, 24), torch.randn(2, 2, seq, 24)
    got = quantize_qk(q, k, granularity=granularity, smooth_k=False, bits=bits)
    assert torch.equal(got.q_scale, amax_by_the_book(q.abs(), Q_GROUP[granularity]) / LARGEST[bits])
    assert torch.equal(got.k_scale, amax_by_the_book(k.abs(), K_GROUP[granularity]) / LARGEST[bits])
    assert got.q.abs().max() == got.k.abs().max() == LARGEST[bits]
    assert got.q_scale.is_contiguous()
    assert got.k_scale.is_contiguous()
    assert (got.k_mean, got.q_offset, got.k_offset, got.q_mean_scores) == (None, None, None, None)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", LARGEST)
def test_offsets_are_the_middle_of_a_group(granularity: str, bits: int) -> None:
    q, k = torch.rand(2, 4, 200, 24) + 3, torch.randn(2, 2, 200, 24).exp()
    got = quantize_qk(q, k, granularity=granularity, smooth_k=False, bits=bits, asymmetric=True)
    for x, groups, integers, scale, offset in (
        (q, Q_GROUP, got.q, got.q_scale, got.q_offset),
        (k, K_GROUP, got.k, got.k_scale, got.k_offset),
    ):
        assert offset is not None
        high, low = amax_by_the_book(x, groups[granularity]), -amax_by_the_book(-x, groups[granularity])
        torch.testing.assert_close(offset, (high + low) / 2)
        torch.testing.assert_close(scale, (high - low) / 2 / LARGEST[bits], rtol=1e-5, atol=1e-7)
        assert (int(integers.min()), int(integers.max())) == (-LARGEST[bits], LARGEST[bits])
        back = integers * scale.unsqueeze(-1) + offset.unsqueeze(-1)
        assert ((back - x).abs() <= 0.501 * scale.unsqueeze(-1)).all()


@pytest.mark.parametrize("bits", LARGEST)
def test_offset_terms_complete_the_product(bits: int) -> None:
    q, k = torch.randn(1, 4, 70, 24) + 2, torch.randn(1, 4, 90, 24) - 1
    got = quantize_qk(q, k, granularity="per_warp", smooth_k=False, bits=bits, asymmetric=True)
    terms = offset_terms(got)
    assert terms is not None
    assert got.q_offset is not None
    assert got.k_offset is not None
    left, right = (term.double() for term in terms)
    steps = got.q_scale.double().unsqueeze(-1) * got.k_scale.double().unsqueeze(-2)
    integers = steps * (got.q.double() @ got.k.double().mT)
    numbers_q = got.q * got.q_scale.double().unsqueeze(-1) + got.q_offset.unsqueeze(-1)
    numbers_k = got.k * got.k_scale.double().unsqueeze(-1) + got.k_offset.unsqueeze(-1)
    torch.testing.assert_close(integers + left @ right, numbers_q @ numbers_k.mT, rtol=1e-6, atol=1e-4)
    assert offset_terms(quantize_qk(q, k, granularity="per_warp", smooth_k=False)) is None


@pytest.mark.parametrize("seq", [1, 100, 128, 300])
@pytest.mark.parametrize("smooth_k", [False, True])
def test_smooth_q_takes_the_mean_of_a_block_and_keeps_its_scores(seq: int, smooth_k: bool) -> None:
    q, k = torch.randn(2, 4, seq, 24) + 5, torch.randn(2, 2, 90, 24) + 5
    got = quantize_qk(q, k, granularity="per_thread", smooth_k=smooth_k, smooth_q=True)
    rest = q.clone()
    assert got.q_mean_scores is not None
    assert got.q_mean_scores.shape == (2, 4, -(-seq // 128), 90)
    centred = (k - k.mean(2, keepdim=True) if smooth_k else k).double().repeat_interleave(2, 1)
    for block, start in enumerate(range(0, seq, 128)):
        mean = q[:, :, start : start + 128].double().mean(2, keepdim=True)
        rest[:, :, start : start + 128] -= mean
        scores = got.q_mean_scores[:, :, block].double()
        torch.testing.assert_close(scores, (mean @ centred.mT).squeeze(2), rtol=1e-4, atol=1e-4)
    back = got.q * got.q_scale.unsqueeze(-1)
    assert ((back - rest).abs() <= 0.501 * got.q_scale.unsqueeze(-1) + 1e-6).all()


def test_without_mean() -> None:
    x = (torch.randn(2, 3, 50, 8) + 7).bfloat16()
    rest, mean = without_mean(x)
    assert (rest.dtype, mean.dtype, mean.shape) == (torch.float32, torch.float32, (2, 3, 1, 8))
    torch.testing.assert_close(rest + mean, x.float())
    assert rest.mean(2).abs().max() < 1e-5


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_integer_is_at_most_half_a_step_away(granularity: str, dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 2, 150, 40).to(dtype), (torch.randn(1, 2, 90, 40) + 5).to(dtype)
    before = q.clone(), k.clone()
    got = quantize_qk(q, k, granularity=granularity, smooth_k=True)
    assert (got.q.dtype, got.k.dtype) == (torch.int8, torch.int8)
    assert got.k_mean is not None
    torch.testing.assert_close(got.k_mean, k.float().mean(dim=2, keepdim=True), rtol=0, atol=0)
    for x, integers, scale in ((q.float(), got.q, got.q_scale), (k.float() - got.k_mean, got.k, got.k_scale)):
        steps = x / scale.unsqueeze(-1) - integers
        assert steps.abs().max() <= 0.5 + 1e-5
        assert integers.abs().max() == 127
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


def test_halves_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.0]).view(1, 1, 1, 6)
    got = quantize_qk(x, x, granularity="per_thread", smooth_k=False)
    assert got.q.flatten().tolist() == [0, 2, 2, 0, -2, 127]


def test_zeros_stay_zeros_with_a_scale() -> None:
    """Published kernels divide 0 by 0 here."""
    zeros = torch.zeros(1, 1, 70, 16)
    got = quantize_qk(zeros, zeros, granularity="per_block", smooth_k=True)
    assert not got.q.any()
    assert not got.k.any()
    assert (got.q_scale > 0).all()
    assert (got.k_scale > 0).all()


def test_tiny_values_keep_their_details() -> None:
    """An epsilon added to the scale, as published, would round all of this to 0."""
    x = torch.randn(1, 1, 32, 16) * 1e-12
    got = quantize_qk(x, x, granularity="per_warp", smooth_k=False)
    torch.testing.assert_close(got.q * got.q_scale.unsqueeze(-1), x, rtol=0, atol=float(x.abs().max()) / 250)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    q = torch.randn(1, 1, 64, 16)
    q[0, 0, 40, 3] = bad
    scale = quantize_qk(q, torch.randn(1, 1, 8, 16), granularity="per_warp", smooth_k=True).q_scale
    assert scale[..., :32].isfinite().all()
    assert not scale[..., 32:].isfinite().any()


def test_the_mean_is_taken_in_fp32() -> None:
    """A sum of 4096 halves of size 50 overflows fp16, and bf16 has lost its small parts by then."""
    k = torch.full((1, 1, 4096, 8), 50.0, dtype=torch.float16)
    got = quantize_qk(k, k, granularity="per_block", smooth_k=True)
    assert got.k_mean is not None
    assert torch.equal(got.k_mean, torch.full((1, 1, 1, 8), 50.0))


def test_an_unknown_granularity_or_number_of_bits_is_named() -> None:
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(
        ArgumentError, match="granularity must be one of per_block, per_warp, per_thread, got 'per_row'"
    ):
        quantize_qk(x, x, granularity="per_row", smooth_k=True)
    with pytest.raises(ArgumentError, match="bits must be 8 or 4, got 2"):
        quantize_qk(x, x, granularity="per_block", smooth_k=True, bits=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_v_has_a_scale_per_channel(dtype: torch.dtype) -> None:
    v = (torch.randn(2, 3, 77, 24) * torch.logspace(-3, 3, 24)).to(dtype)
    v[:, :, :, 5] = 0
    v8, scale = quantize_v_fp8(v)
    assert v8.dtype is torch.float8_e4m3fn
    assert (v8.shape, scale.shape) == (v.shape, (2, 3, 24))
    back = v8.float() * scale.unsqueeze(-2)
    assert (back - v.float()).abs().max() <= (v.float().abs().amax(2, keepdim=True) / 28).max()
    relative = (back - v.float()).norm(dim=2) / v.float().norm(dim=2).clamp_min(1e-9)
    assert relative.max() < 0.05
    assert not back[..., 5].any()
    assert (scale > 0).all()


def test_mean_scores_of_grouped_heads() -> None:
    q, k_mean = torch.randn(2, 6, 9, 16), torch.randn(2, 3, 1, 16)
    want = 0.3 * (q.double() @ k_mean.double().repeat_interleave(2, dim=1).mT).squeeze(-1)
    torch.testing.assert_close(mean_scores(q, k_mean, 0.3).double(), want, rtol=1e-5, atol=1e-5)


def test_compiles_in_one_graph_for_every_length() -> None:
    options = {"granularity": "per_thread", "smooth_k": True, "asymmetric": True}

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor) -> QuantizedQK:
        return quantize_qk(q, k, **options)

    torch._dynamo.utils.counters.clear()
    for seq in (40, 77, 192, 300, 61):
        q, k = torch.randn(1, 2, seq, 16), torch.randn(1, 1, seq + 3, 16)
        wanted = quantize_qk(q, k, **options)
        for got, want in zip(compiled(q, k), wanted, strict=True):
            assert (got is None) == (want is None)
            if got is not None and want is not None:
                # Means are summed in another order, so an integer at a half may move by one.
                atol = 1.01 if got.dtype is torch.int8 else 1e-5
                torch.testing.assert_close(got.float(), want.float(), rtol=1e-5, atol=atol)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
