"""Rounding in Triton: the integers and scales of the definition, two launches, one pair of kernels for every length."""

from __future__ import annotations

import pytest
import torch
from support.quantize_cases import summable
from support.triton_aot import gpu
from support.triton_interpreter import interpret, why_not_interpret
from support.triton_launches import launch_rounding
from torch import Tensor

from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.attn_ops.kernels.triton.quantize import Rounded, Rounding, round_operands, round_values
from sparseattn.attn_ops.numerics.block_rounding import round_qk, round_v_fp8
from sparseattn.attn_ops.numerics.quantize import GROUPS, LARGEST, Groups, quantize_qk, quantize_v_fp8, without_mean

interpreted = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
Operands = tuple[Tensor, Tensor, Tensor]


def operands(
    seq: tuple[int, int] = (200, 300), head_dim: int = 16, dtype: torch.dtype = FP32, heads: tuple[int, int] = (2, 1)
) -> Operands:
    """Tensors whose means are the same in whatever order tokens are added; keys and values have a large one."""
    q, k, v = (torch.randn(2, h, s, head_dim) for h, s in zip((*heads, heads[1]), (*seq, seq[1]), strict=True))
    return summable(q).to(dtype), summable(k + 3).to(dtype), summable(v - 2).to(dtype)


def rounded(given: Operands, how: Rounding) -> Rounded:
    with interpret():
        return round_operands(*given, how)


def check_equal(got: Rounded, **want: Tensor | None) -> None:
    for name, tensor in want.items():
        value = getattr(got, name)
        if tensor is None:
            assert value is None, name
            continue
        assert value.shape == tensor.shape, name
        assert value.dtype == tensor.dtype, name
        assert torch.equal(value.float(), tensor.float()), name


def check_as_sage(given: Operands, granularity: str, pv: str, smooth: bool, bits: int = 8) -> None:
    q, k, v = given
    how = Rounding(*GROUPS[granularity], pv, LARGEST[bits], smooth_q=smooth, smooth_k=smooth, smooth_v=smooth)
    got = rounded(given, how)
    want = quantize_qk(q, k, granularity=granularity, smooth_k=smooth, bits=bits, smooth_q=smooth)
    check_equal(got, q=want.q, q_scale=want.q_scale, k=want.k, k_scale=want.k_scale, k_mean=want.k_mean)
    if want.q_mean_scores is None:
        assert got.q_mean_scores is None
    else:
        torch.testing.assert_close(got.q_mean_scores, want.q_mean_scores)
    v, mean = without_mean(v) if smooth else (v, None)
    v8, scale = (v.half(), None) if pv == "fp16" else quantize_v_fp8(v)
    check_equal(got, v=v8, v_scale=None if scale is None else scale.unsqueeze(2), v_mean=mean)


@interpreted
@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("granularity", GROUPS)
def test_equals_the_definition_of_sage(granularity: str, pv: str, smooth: bool) -> None:
    check_as_sage(operands(), granularity, pv, smooth)


@interpreted
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(("seq", "head_dim"), [((1, 1), 1), ((128, 64), 40), ((129, 600), 160)], ids=str)
def test_other_sizes(seq: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    check_as_sage(operands(seq, head_dim, dtype), "per_thread", "fp8", seq[1] > 1, bits=4)


@interpreted
def test_any_strides() -> None:
    q, k, v = (summable(x)[..., :24].transpose(1, 2) for x in torch.randn(1, 70, 3, 2, 40).unbind(2))
    check_as_sage((q, k, v), "per_thread", "fp8", smooth=True)


@interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("blocks", [(128, 64), (16, 16), (48, 20), (300, 144)], ids=str)
def test_equals_the_definition_of_sparge(blocks: tuple[int, int], pv: str, causal: bool) -> None:
    given, (block_q, block_k) = operands((310, 300)), blocks
    growing = {"mean_keys": block_q, "growing_block": block_k if pv == "fp8" else None} if causal else {}
    got = rounded(given, Rounding(Groups(block_q), Groups(1 if causal else block_k), pv, **growing))
    want = round_qk(*given[:2], block_q=block_q, block_k=block_k, smooth_k=True, causal=causal)
    check_equal(got, q=want.q, q_scale=want.q_scale, k=want.k, k_scale=want.k_scale, k_mean=want.k_mean)
    if pv == "fp8":
        v8, scale = round_v_fp8(given[2], block_k=block_k, causal=causal)
        check_equal(got, v=v8, v_scale=scale if causal else scale[:, :, :1])


@interpreted
@pytest.mark.parametrize("smooth_v", [False, True])
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
def test_values_alone_are_rounded_alike(pv: str, smooth_v: bool) -> None:
    given = operands()
    want = rounded(given, Rounding(*GROUPS["per_block"], pv, smooth_v=smooth_v))
    with interpret():
        got = round_values(given[2], pv=pv, smooth_v=smooth_v)
    check_equal(want, **got._asdict())


@interpreted
def test_a_mean_of_all_tokens_and_scales_of_some_are_refused() -> None:
    how = Rounding(Groups(32), Groups(32), "fp8", smooth_v=True, growing_block=32)
    with pytest.raises(ArgumentError, match=r"growing_block must be None with smooth_v, .*got 32"):
        round_operands(*operands(), how)


def test_of_any_numbers_few_integers_differ_and_by_one() -> None:
    """A mean adds in another order here: its last bits, and what lies next to a half, may differ."""
    q, k, v = torch.randn(1, 2, 500, 64), torch.randn(1, 2, 500, 64) + 3, torch.randn(1, 2, 500, 64)
    got = rounded((q, k, v), Rounding(*GROUPS["per_thread"], "fp16"))
    want = quantize_qk(q, k, granularity="per_thread", smooth_k=True)
    assert want.k_mean is not None
    assert got.k_mean is not None
    torch.testing.assert_close(got.k_mean, want.k_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.k_scale, want.k_scale, rtol=1e-6, atol=0)
    difference = (got.k.int() - want.k.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
    check_equal(got, q=want.q, q_scale=want.q_scale)


@interpreted
def test_what_lies_between_two_integers_goes_to_the_even_one() -> None:
    x = torch.tensor([-127.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5]).expand(1, 1, 8, 8)
    got = rounded((x, x, x), Rounding(Groups(1), Groups(1), "fp16", smooth_k=False))
    assert got.q[0, 0, 0].tolist() == [-127, -2, -2, 0, 0, 2, 2, 126]


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_zeros_stay_zeros_and_nan_and_infinity_stay_visible() -> None:
    q, k, v = (x.clone() for x in operands((64, 64)))
    q[0, 0, :32], k[0, 0, 3, 4], v[0, 0, 5, 6], v[0, 0, 5, 7], v[0, 0, :, 8] = 0, torch.nan, -torch.nan, torch.inf, 0
    got = rounded((q, k, v), Rounding(Groups(32), Groups(16), "fp8", smooth_k=False))
    assert got.q_scale[0, 0, :32].unique().tolist() == [torch.tensor(1e-30).div(127).item()]
    assert not got.q[0, 0, :32].any()
    assert got.k_scale[0, 0].isnan().tolist() == [token < 16 for token in range(64)]
    assert got.v_scale is not None
    assert got.v_scale[0, 0, 0, 6:8].tolist()[1] == torch.inf
    assert got.v_scale[0, 0, 0].isnan().nonzero().flatten().tolist() == [6]
    assert not got.v[0, 0, :, 8].float().any()


@interpreted
def test_rows_of_results_are_aligned_and_their_padding_is_zero() -> None:
    got = rounded(operands((70, 70), 40), Rounding(*GROUPS["per_thread"], "fp8"))
    assert got.q.stride() == (2 * 70 * 48, 70 * 48, 48, 1)
    assert got.v.stride() == (40 * 80, 40 * 80, 1, 80)
    stored = got.v.mT.as_strided((2, 1, 40, 80), (40 * 80, 40 * 80, 80, 1))
    assert not stored[..., 70:].float().any()


@interpreted
def test_fp16_values_are_not_copied() -> None:
    given = operands(dtype=FP16)
    assert rounded(given, Rounding(*GROUPS["per_block"], "fp16")).v is given[2]


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim", "smooth"),
    [
        *((arch, BF16, 128, False) for arch in (80, 90, 100)),
        (90, FP32, 256, False),
        (120, BF16, 64, True),
    ],
    ids=str,
)
def test_two_launches_without_spills(arch: int, dtype: torch.dtype, head_dim: int, smooth: bool) -> None:
    with gpu(arch) as kernels:
        launch_rounding(dtype, head_dim, "fp16" if arch == 80 else "fp8", smooth)
    assert [kernel.name for kernel in kernels] == ["sum_parts_kernel", "round_kernel"]
    assert [len(kernel.launches) for kernel in kernels] == [1, 1]
    assert [kernel.spilled for kernel in kernels] == [0, 0]
    # Copies of 16 bytes, of integers and of transposed values too.
    assert all("LDG.E.128" in kernel.sass for kernel in kernels)
    assert kernels[1].sass.count("STG.E.128") >= 8


def test_one_pair_of_kernels_for_every_length_and_number_of_heads() -> None:
    with gpu(90) as kernels:
        for heads in (2, 4):
            for seq in (1, 2, 16, 17, 64, 100, 128, 1000, 1024, 5000):
                launch_rounding(BF16, 64, "fp8", smooth=False, heads=heads, seq=seq)
    assert [kernel.name for kernel in kernels] == ["sum_parts_kernel", "round_kernel"]
    assert {len(kernel.launches) for kernel in kernels} == {20}
    # Parts of 256 tokens or more, up to 16 of k and of v; tiles of 128 tokens, of q, and of k and v.
    assert kernels[0].launches[-1] == ((16 + 16) * 2, 1, 1)
    assert kernels[1].launches[-1] == (40 * (4 + 2), 1, 1)
