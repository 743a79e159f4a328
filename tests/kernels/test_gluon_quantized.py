"""The Hopper kernels with integers, SageAttention and SpargeAttention, against their definitions, in the emulator."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.block_sparse_cases import Case, inputs, lists
from support.gluon_emulator import emulate
from support.triton_interpreter import interpret, why_not_interpret
from torch import Tensor

from sparseattn import Capability
from sparseattn.attn_ops.backends import sage as sage_backend
from sparseattn.attn_ops.backends import sparge as sparge_backend
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.kernels.gluon import sage, sparge
from sparseattn.attn_ops.reference.block_sparse import block_sparse_attention
from sparseattn.attn_ops.reference.sage import sage_attention

pytestmark = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())

SCHEDULES = pytest.mark.parametrize("overlapped", [False, True], ids=["one_buffer", "overlapped"])
PV = pytest.mark.parametrize("pv", ["fp16", "fp8"])
WEIGHTS = {"fp16": 5e-4, "fp8": 3e-2}
"""Relative L2 distance to the definition by the rounding of weights, against another largest score."""

OUTPUT = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
CASE = Case(dtype=torch.bfloat16, head_dim=64, heads=(4, 2), blocks=(128, 64), seq=(150, 200), scale=0.125)
CASES = {
    "plain": dataclasses.replace(CASE, seq=(128, 128)),
    "short_tails": CASE,
    "one_short_block": dataclasses.replace(CASE, seq=(5, 3)),
    "fp16_batch": dataclasses.replace(CASE, dtype=torch.float16, batch=2),
    "head_dim_128": dataclasses.replace(CASE, head_dim=128, heads=(2, 1)),
    "negative_scale": dataclasses.replace(CASE, scale=-0.2),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def with_mean(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Keys have a large mean, which is what smoothing is for."""
    q, k, v = inputs(case)
    return q, k + 2 * torch.randn(case.batch, case.heads[1], 1, case.head_dim).to(k.dtype), v


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check_sage(case: Case, overlapped: bool, pv: str, granularity: str = "per_thread", bits: int = 8) -> None:
    given = with_mean(case)
    options = {"scale": case.scale, "causal": False, "pv": pv, "granularity": granularity, "bits": bits}
    options |= {"smooth_k": True, "smooth_q": False, "smooth_v": False, "asymmetric": False}
    with interpret(), emulate():
        out, lse = sage.attention(*given, **options, overlapped=overlapped)
    want, want_lse = sage_attention(*given, **options)
    assert (out.dtype, out.stride()) == (given[0].dtype, torch.empty_like(given[0]).stride())
    assert error(out, want) < OUTPUT[case.dtype] + WEIGHTS[pv]
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=1e-6)


@SCHEDULES
@PV
@EVERY_CASE
def test_sage(case: Case, pv: str, overlapped: bool) -> None:
    check_sage(case, overlapped, pv)


@PV
@pytest.mark.parametrize(("granularity", "bits"), [("per_block", 8), ("per_warp", 8), ("per_thread", 4)])
def test_scales_of_every_granularity(granularity: str, bits: int, pv: str) -> None:
    check_sage(CASE, True, pv, granularity, bits)


def test_scales_far_apart() -> None:
    """Groups of keys whose scales differ a thousandfold: one scale in place of four would be far off."""
    q, k, v = inputs(dataclasses.replace(CASE, dtype=torch.float16, heads=(1, 1)))
    k[:, :, 2::8] *= 1000
    k[:, :, 3::8] *= 1000
    options = {"scale": 1e-3, "causal": False, "pv": "fp16", "granularity": "per_thread", "bits": 8}
    options |= {"smooth_k": False, "smooth_q": False, "smooth_v": False, "asymmetric": False}
    with interpret(), emulate():
        out, _ = sage.attention(q, k, v, **options)
    assert error(out, sage_attention(q, k, v, **options)[0]) < 1e-3


@SCHEDULES
@PV
@EVERY_CASE
def test_sparge(case: Case, pv: str, overlapped: bool) -> None:
    q, k, v = with_mean(case)
    index, count = lists(dataclasses.replace(case, density=0.7), 1, case.heads[0])
    blocks = {"block_q": case.blocks[0], "block_k": case.blocks[1], "causal": False, "scale": case.scale}
    rounding = {"pv": pv, "smooth_k": True, "pv_threshold": None}
    with interpret(), emulate():
        out, lse = sparge.attention(q, k, v, index, count, **blocks, **rounding, overlapped=overlapped)
    exact = (x.float() for x in (q, k, v))
    want, want_lse = block_sparse_attention(*exact, index.clamp(max=index.shape[-1] - 1), count, None, **blocks)
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    assert torch.equal(out[lse == -torch.inf], torch.zeros_like(out[lse == -torch.inf]))
    integers = 2e-2  # what INT8 costs here; sage_attention above is compared with the same integers
    if bool((want_lse > -torch.inf).any()):
        assert error(out, want) < integers + WEIGHTS[pv]
    torch.testing.assert_close(lse, want_lse, atol=0.1, rtol=0)


@pytest.mark.parametrize("name", ["gluon", "gluon_overlapped"])
@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"pv": "fp8", "granularity": "per_warp"}, None),
        ({"smooth_q": True}, "smooth_q=True is not in its kernel"),
        ({"smooth_v": True}, "smooth_v=True is not in its kernel"),
        ({"asymmetric": True}, "asymmetric=True is not in its kernel"),
    ],
)
def test_what_sage_needs(name: str, params: dict[str, str | bool], reason: str | None) -> None:
    call = AttentionCall(1, 4, 2, 256, 256, 64, torch.bfloat16, "cuda", params=tuple(params.items()))
    reasons = sage_backend.BACKEND.provider(name).reasons(call, Capability.of("sm90"))
    assert reasons == ([] if reason is None else [reason])


@pytest.mark.parametrize("name", ["gluon", "gluon_overlapped"])
def test_what_sparge_needs(name: str) -> None:
    call = AttentionCall(1, 4, 2, 256, 256, 64, torch.bfloat16, "cuda", needs_grad=True)
    call = dataclasses.replace(call, params=(("pv_threshold", 5.0), ("block_q", 32), ("block_k", 64)))
    assert sparge_backend.BACKEND.provider(name).reasons(call, Capability.of("sm90")) == [
        "a gradient is needed and it has none",
        "blocks of 32 queries, it has multiples of 64",
        "pv_threshold is not in its kernel",
    ]
