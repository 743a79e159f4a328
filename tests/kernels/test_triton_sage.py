"""The Triton kernel of SageAttention against its definition, in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from support.quantize_cases import summable
from support.triton_interpreter import interpret, why_not_interpret
from torch import Tensor

from sparseattn.attn_ops.errors import UnsupportedError
from sparseattn.attn_ops.kernels.triton import sage
from sparseattn.attn_ops.reference.flash import flash_attention
from sparseattn.attn_ops.reference.sage import sage_attention

pytestmark = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())

ONE_TILE = 32
"""With no more keys than this, the kernel rounds the same weights as the definition, which rounds them all at once."""


@dataclass(frozen=True)
class Case:
    """Shapes and modes of one call."""

    heads: tuple[int, int] = (2, 2)
    seq: tuple[int, int] = (70, 150)
    batch: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    causal: bool = False
    scale: float = 0.125
    granularity: str = "per_thread"
    pv: str = "fp16"
    smooth_k: bool = True
    bits: int = 8
    smooth_q: bool = False
    smooth_v: bool = False

    @property
    def options(self) -> dict[str, object]:
        shapes = ("heads", "seq", "batch", "head_dim", "dtype")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in shapes}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Keys have a large mean, which is what smoothing is for. It is the same in whatever order they are added."""
    shapes = [(case.batch, h, s, case.head_dim) for h, s in zip(case.heads, case.seq, strict=True)]
    q, k, v = torch.randn(shapes[0]), torch.randn(shapes[1]), torch.randn(shapes[1])
    k = k + 2 * torch.randn(case.batch, case.heads[1], 1, case.head_dim)
    return summable(q).to(case.dtype), summable(k).to(case.dtype), summable(v).to(case.dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def rounding(case: Case) -> float:
    """Bound on the relative L2 distance to the definition: the output's rounding, and that of the weights."""
    output = 5e-3 if case.dtype == torch.bfloat16 else 5e-4
    # Within one tile, sums of the same FP8 numbers; across tiles, numbers rounded against another largest score.
    weights = 5e-4 if case.pv == "fp16" or case.seq[1] <= ONE_TILE else 3e-2
    return output + weights


def check(case: Case, q: Tensor, k: Tensor, v: Tensor) -> None:
    with interpret(arch=90):
        out, lse = sage.attention(q, k, v, **case.options)
    want, want_lse = sage_attention(q, k, v, **case.options)
    assert out.dtype == q.dtype
    assert out.stride() == torch.empty_like(q).stride()
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert relative_error(out, want) < rounding(case)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=1e-6)
    exact, _ = flash_attention(q.float(), k.float(), v.float(), causal=case.causal, scale=case.scale)
    assert relative_error(out, exact) < 1.05 * relative_error(want, exact) + 1e-4


MODES = {
    "plain": Case(),
    "gqa_batch": Case(heads=(4, 2), batch=2, seq=(40, 70), head_dim=32),
    "causal": Case(causal=True, seq=(150, 150)),
    "causal_cross": Case(causal=True, seq=(70, 150)),
    "causal_more_queries": Case(causal=True, seq=(150, 70)),
    "whole_tiles": Case(seq=(64, 128)),
    "one_key": Case(seq=(10, 1), smooth_k=False),
    "not_smoothed": Case(smooth_k=False),
    "per_block": Case(granularity="per_block", seq=(140, 140)),
    "per_warp": Case(granularity="per_warp"),
    "int4": Case(bits=4),
    "int4_smooth_q": Case(bits=4, smooth_q=True, heads=(4, 2), batch=2, seq=(40, 70), head_dim=32),
    "smooth_q": Case(smooth_q=True, seq=(300, 100)),
    "smooth_q_causal": Case(smooth_q=True, causal=True, seq=(150, 150)),
    "smooth_q_causal_cross": Case(smooth_q=True, causal=True, seq=(150, 70), smooth_k=False),
    "smooth_q_whole_tiles": Case(smooth_q=True, seq=(128, 128)),
    "smooth_q_small_tiles": Case(smooth_q=True, seq=(200, 40), head_dim=160),
    "smooth_q_negative_scale": Case(smooth_q=True, scale=-0.1, causal=True),
    "smooth_q_zero_scale": Case(smooth_q=True, scale=0.0, causal=True),
    "smooth_v": Case(smooth_v=True, heads=(4, 2), batch=2),
    "fp8_smooth_v": Case(smooth_v=True, pv="fp8", seq=(40, 32)),
    "all": Case(bits=4, smooth_q=True, smooth_v=True, pv="fp8", causal=True, seq=(150, 150), granularity="per_warp"),
    "negative_scale": Case(scale=-0.1, causal=True),
    "zero_scale": Case(scale=0.0, causal=True),
    "fp8_one_tile": Case(pv="fp8", seq=(40, 32)),
    "fp8_one_short_tile": Case(pv="fp8", seq=(40, 30), causal=True),
    "fp8": Case(pv="fp8"),
    "fp8_causal": Case(pv="fp8", causal=True, seq=(150, 150), heads=(4, 2), granularity="per_warp"),
}


@pytest.mark.parametrize("case", MODES.values(), ids=MODES.keys())
def test_equals_the_definition(case: Case) -> None:
    check(case, *inputs(case))


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype: torch.dtype, pv: str) -> None:
    case = Case(dtype=dtype, pv=pv, seq=(140, 100), heads=(2, 1), causal=True)
    check(case, *inputs(case))


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("head_dim", [1, 16, 40, 80, 256])
def test_head_dims(head_dim: int, pv: str) -> None:
    case = Case(head_dim=head_dim, seq=(70, 32), pv=pv, heads=(2, 1))
    check(case, *inputs(case))


def test_strided_inputs_give_the_querys_strides() -> None:
    case = Case(batch=2, seq=(50, 50), head_dim=32)
    q, k, v = (tensor[..., :32].transpose(1, 2) for tensor in torch.randn(2, 50, 3, 2, 40).unbind(2))
    check(case, q, k, v)
    check(case, torch.randn(2, 50, 2, 32).transpose(1, 2), k, v)


def test_zero_keys_values_and_channels_stay_finite() -> None:
    case = Case(pv="fp8", seq=(20, 32))
    q, k, v = inputs(case)
    v[..., 3] = 0
    k.zero_()
    with interpret(arch=90):
        out, lse = sage.attention(q, k, v, **case.options)
    assert torch.equal(out[..., 3], torch.zeros_like(out[..., 3]))
    assert relative_error(out, v.mean(dim=2, keepdim=True).expand_as(out)) < 0.05
    torch.testing.assert_close(lse, torch.full_like(lse, 32.0).log())


def test_a_nan_stays_visible() -> None:
    case = Case(seq=(20, 32))
    q, k, v = inputs(case)
    q[0, 0, 3, 5] = torch.nan
    with interpret(arch=90):
        out, lse = sage.attention(q, k, v, **case.options)
    assert out[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("causal", [False, True])
def test_what_lies_behind_the_last_token_is_never_read(pv: str, causal: bool) -> None:
    case = Case(pv=pv, causal=causal, seq=(70, 70), smooth_k=False)
    given = inputs(case)
    longer = [torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[:, :, :70] for x in given]
    with interpret(arch=90):
        got, want = sage.attention(*longer, **case.options), sage.attention(*given, **case.options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
def test_sums_are_wider_than_fp16(pv: str) -> None:
    """64 weights near 1 times 30000 overflow the FP16 sum of a tile."""
    case = Case(pv=pv, scale=0.01)
    q, k, v = inputs(case)
    v = v + 30000
    with interpret(arch=90):
        out, _ = sage.attention(q, k, v, **case.options)
    exact, _ = flash_attention(q, k, v, scale=case.scale)
    torch.testing.assert_close(out, exact, rtol=1e-3 if pv == "fp16" else 0.07, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_scores_far_below_zero_are_scores(causal: bool) -> None:
    """Below every finite number that published kernels put in the place of -infinity."""
    case = Case(scale=1.0, smooth_k=False, causal=causal, seq=(70, 70))
    q, k, v = inputs(case)
    q, k = torch.full_like(q, 1e3), torch.full_like(k, -1e3)
    with interpret(arch=90):
        out, lse = sage.attention(q, k, v, **case.options)
    exact, _ = flash_attention(torch.zeros_like(q), k, v, causal=causal, scale=1.0)
    torch.testing.assert_close(out, exact, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(lse, torch.full_like(lse, -6.4e7), rtol=1e-6, atol=0)


def test_inputs_stay_as_they_were() -> None:
    case = Case(scale=-0.5, seq=(20, 20))
    args = inputs(case)
    before = [tensor.clone() for tensor in args]
    check(case, *args)
    for tensor, copy in zip(args, before, strict=True):
        assert torch.equal(tensor, copy)


def test_equal_queries_leave_no_scale_to_divide_by() -> None:
    """Without their mean they are 0, so that the largest integer stands for next to nothing."""
    case = Case(smooth_q=True, seq=(150, 100))
    q, k, v = inputs(case)
    check(case, torch.full_like(q, 3.0), k, v)


def test_offsets_are_refused() -> None:
    case = Case(seq=(16, 16))
    with interpret(), pytest.raises(UnsupportedError, match="has no offsets, got asymmetric=True"):
        sage.attention(*inputs(case), **case.options, asymmetric=True)


def test_fp8_needs_sm89() -> None:
    case = Case(pv="fp8", seq=(16, 16))
    with interpret(arch=80), pytest.raises(UnsupportedError, match=r'needs sm_89 or newer, got sm_80\. Use pv="fp16"'):
        sage.attention(*inputs(case), **case.options)


@pytest.mark.parametrize("seq", [(0, 8), (8, 0)])
def test_nothing_to_compute(seq: tuple[int, int]) -> None:
    case = Case(seq=seq)
    q, k, v = inputs(case)
    out, lse = sage.attention(q, k, v, **case.options)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full(q.shape[:-1], -torch.inf))
