"""quantize: groups exactly as published, rounding, and what must not become 0 / 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.attn_ops.quantize import GRANULARITIES, QuantizedQK, mean_scores, quantize_qk, quantize_v_fp8

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


def scales_by_the_book(x: Tensor, group_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The scale of every token from the published index map: amax of all tokens with the same index, / 127."""
    group = group_of(torch.arange(x.shape[-2]))
    return torch.stack([x[..., group == g, :].abs().amax(dim=(-2, -1)) for g in group], dim=-1) / 127


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("seq", [1, 7, 64, 128, 200, 333])
def test_groups_are_the_published_ones(granularity: str, seq: int) -> None:
    q, k = torch.randn(2, 4, seq, 24), torch.randn(2, 2, seq, 24)
    got = quantize_qk(q, k, granularity=granularity, smooth_k=False)
    assert torch.equal(got.q_scale, scales_by_the_book(q, Q_GROUP[granularity]))
    assert torch.equal(got.k_scale, scales_by_the_book(k, K_GROUP[granularity]))
    assert got.q_scale.is_contiguous()
    assert got.k_scale.is_contiguous()
    assert got.k_mean is None


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


def test_an_unknown_granularity_is_named() -> None:
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(
        ArgumentError, match="granularity must be one of per_block, per_warp, per_thread, got 'per_row'"
    ):
        quantize_qk(x, x, granularity="per_row", smooth_k=True)


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
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor) -> QuantizedQK:
        return quantize_qk(q, k, granularity="per_thread", smooth_k=True)

    torch._dynamo.utils.counters.clear()
    for seq in (40, 77, 192, 300, 61):
        q, k = torch.randn(1, 2, seq, 16), torch.randn(1, 1, seq + 3, 16)
        for got, want in zip(compiled(q, k), quantize_qk(q, k, granularity="per_thread", smooth_k=True), strict=True):
            assert got is not None
            assert want is not None
            # The mean is summed in another order, so an integer at a half may move by one.
            torch.testing.assert_close(
                got.float(), want.float(), rtol=1e-5, atol=1.01 if got.dtype is torch.int8 else 1e-6
            )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
