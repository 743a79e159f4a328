"""sage_attention: errors within the published bounds, the CPU kernel equal to the definition, and the op contract.

Bounds are those measured for the published kernels (mean absolute error relative to the mean absolute value).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import sparseattn
from sparseattn.attn_ops.backends import sage
from sparseattn.attn_ops.backends.sage import sage_attention
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import ArgumentError, UnsupportedError
from sparseattn.attn_ops.kernels.cpu import sage as cpu
from sparseattn.attn_ops.numerics.quantize import GRANULARITIES, quantize_qk
from sparseattn.attn_ops.op import same_defaults
from sparseattn.attn_ops.reference import sage as reference

OP = torch.ops.sparseattn.sage_attention.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOUND = {"fp16": (0.015, 0.9998), "fp8": (0.045, 0.999)}
PROVIDERS = ["cpu", "reference"]


def inputs(
    heads: int = 2,
    kv_heads: int = 2,
    seq_q: int = 96,
    seq_k: int = 96,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, heads, seq_q, dim)
    k = torch.randn(1, kv_heads, seq_k, dim) + offset * torch.randn(1, kv_heads, 1, dim).sign()
    v = torch.randn(1, kv_heads, seq_k, dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def exact(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Out and lse in fp64."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return functional.softmax(scores, dim=-1) @ v, scores.logsumexp(dim=-1)


def errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """(relative L1, cosine similarity)."""
    got = got.double()
    cosine = functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
    return float((got - want).abs().sum() / want.abs().sum()), float(cosine)


def within(got: Tensor, want: Tensor, pv: str) -> bool:
    error, cosine = errors(got, want)
    return error <= BOUND[pv][0] and cosine >= BOUND[pv][1]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", sage.PV)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1)])
def test_error_to_exact_attention(
    provider: str, pv: str, granularity: str, causal: bool, heads: int, kv_heads: int
) -> None:
    for seq, dim in itertools.product((64, 100, 128, 192, 256), (64, 128)):
        q, k, v = inputs(heads, kv_heads, seq, seq, dim)
        out, lse = sage_attention(q, k, v, granularity=granularity, pv=pv, causal=causal, provider=provider)
        want, want_lse = exact(q, k, v, causal=causal)
        assert within(out, want, pv), (seq, dim, errors(out, want))
        assert (lse - want_lse).abs().mean() <= 5e-3, (seq, dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pv", sage.PV)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("dim", [1, 40, 80, 96, 160, 256])
def test_cpu_kernel_is_the_definition(dtype: torch.dtype, pv: str, causal: bool, smooth_k: bool, dim: int) -> None:
    """The integers are the same, so the rest is a rare weight that rounds the other way, and bf16's product with V."""
    limit = 6e-3 if dtype is torch.bfloat16 else 1e-3
    for granularity, (seq_q, seq_k) in itertools.product(GRANULARITIES, [(1, 1), (130, 130), (70, 301), (300, 77)]):
        q, k, v = inputs(4, 2, seq_q, seq_k, dim, dtype, offset=2.0)
        arguments: dict[str, Any] = {
            "causal": causal,
            "scale": 0.3,
            "granularity": granularity,
            "pv": pv,
            "smooth_k": smooth_k,
        }
        out, lse = cpu.attention(q, k, v, **arguments)
        want, want_lse = reference.sage_attention(q, k, v, **arguments)
        assert out.dtype is dtype
        assert (out.double() - want.double()).norm() <= limit * want.double().norm(), (granularity, seq_q, seq_k)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)


def test_cpu_kernel_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CHUNK_SCORES", 1)
    for causal, (seq_q, seq_k) in itertools.product((False, True), [(100, 100), (100, 40), (40, 100)]):
        q, k, v = inputs(2, 1, seq_q, seq_k)
        arguments: dict[str, Any] = {
            "causal": causal,
            "scale": 0.2,
            "granularity": "per_warp",
            "pv": "fp16",
            "smooth_k": True,
        }
        want, want_lse = reference.sage_attention(q, k, v, **arguments)
        out, lse = cpu.in_chunks(q, k, v, **arguments)
        torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_cpu_kernel_without_an_exact_int8_product(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without VNNI, oneDNN's INT8 product saturates; the product of the integers in fp32 does not."""
    if int8 and not cpu._int8_matmul_is_exact():
        pytest.skip("this CPU has no exact INT8 product")
    monkeypatch.setattr(cpu, "_int8_matmul_is_exact", lambda: int8)
    q = k = torch.ones(1, 1, 64, 256)
    v = torch.randn(1, 1, 64, 256)
    out, lse = cpu.in_chunks(q, k, v, scale=1.0, granularity="per_block", pv="fp16", smooth_k=False)
    torch.testing.assert_close(lse, torch.full((1, 1, 64), 256.0 + math.log(64)))
    torch.testing.assert_close(out, v.half().float().mean(dim=2, keepdim=True).expand_as(out), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("native", [False, True])
def test_bf16_product_is_within_bounds_either_way(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_multiplies_bf16", lambda: native)
    q, k, v = inputs(2, 2, 256, 256, 64, torch.bfloat16)
    assert within(sage_attention(q, k, v, provider="cpu")[0], exact(q, k, v)[0], "fp16")


def test_e4m3_rounding_is_that_of_torch() -> None:
    x = torch.cat([torch.linspace(0, 448, 4001), torch.logspace(-12, 2.6, 4001), torch.tensor([0.0, 2**-10, 448.0])])
    assert torch.equal(cpu._rounded_to_e4m3(x), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("offset", [8.0, 30.0, 100.0])
def test_smoothing_removes_a_large_offset_of_k(provider: str, offset: float) -> None:
    q, k, v = inputs(seq_q=256, seq_k=256, offset=offset)
    want, want_lse = exact(q, k, v)
    out, lse = sage_attention(q, k, v, provider=provider)
    assert within(out, want, "fp16")
    assert (lse - want_lse).abs().mean() <= 5e-3
    rough, _ = sage_attention(q, k, v, smooth_k=False, provider=provider)
    assert not within(rough, want, "fp16")
    assert errors(rough, want)[0] > 2 * errors(out, want)[0]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_all_but_the_integers_is_exact(provider: str, dtype: torch.dtype, granularity: str, offset: float) -> None:
    """Against fp64 attention of the rounded q and k: published kernels correct the lse in half precision, 0.02 off."""
    q, k, v = inputs(seq_q=200, seq_k=200, dtype=dtype, offset=offset)
    out, lse = sage_attention(q, k, v, granularity=granularity, provider=provider)
    got = quantize_qk(q, k, granularity=granularity, smooth_k=True)
    assert got.k_mean is not None
    rounded_q, rounded_k = got.q * got.q_scale.unsqueeze(-1), got.k * got.k_scale.unsqueeze(-1)
    want, want_lse = exact(rounded_q, rounded_k, v)
    want_lse = want_lse + 64**-0.5 * (q.double() @ got.k_mean.double().mT).squeeze(-1)
    assert errors(out, want)[0] <= (6e-3 if dtype is torch.bfloat16 else 2e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=2e-5 * (1 + offset))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", sage.PV)
def test_zeros_do_no_harm(provider: str, pv: str) -> None:
    q, k, v = inputs(seq_q=256, seq_k=256)
    q[:, :, 128:] = 0
    v[..., 7] = 0
    out, lse = sage_attention(q, k, v, pv=pv, provider=provider)
    assert out.isfinite().all()
    assert not out[..., 7].any()
    assert within(out, exact(q, k, v)[0], pv)
    for nothing in (torch.zeros_like(q), torch.zeros_like(k)):
        out, lse = sage_attention(nothing, nothing, v, pv=pv, provider=provider)
        assert within(out, exact(nothing, nothing, v)[0], pv)
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(256)))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_v_beyond_fp16_needs_fp8(provider: str) -> None:
    q, k, v = inputs(dtype=torch.bfloat16)
    v = v * 1e6
    assert within(sage_attention(q, k, v, pv="fp8", provider=provider)[0], exact(q, k, v)[0], "fp8")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nan_stays_visible(provider: str) -> None:
    for pv in sage.PV:
        q, k, v = inputs()
        q[0, 0, 5, 0] = torch.nan
        out, lse = sage_attention(q, k, v, pv=pv, provider=provider)
        assert out[0, 0, 5].isnan().all()
        assert lse[0, 0, 5].isnan()
        assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("seq_k", [1, 63, 65, 100, 191])
def test_keys_end_where_they_end(provider: str, seq_k: int) -> None:
    """A published kernel attends to what lies past the end when Sk is not a multiple of 64."""
    q, k, v = inputs(seq_q=64, seq_k=256)
    out, _ = sage_attention(q, k[:, :, :seq_k], v[:, :, :seq_k], provider=provider)
    assert within(out, exact(q, k[:, :, :seq_k], v[:, :, :seq_k])[0], "fp16")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", sage.PV)
def test_what_lies_behind_the_last_token_is_never_read(provider: str, pv: str) -> None:
    """Published kernels round padding together with the tokens of the last group."""
    given = inputs(seq_q=100, seq_k=100)
    longer = [torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[:, :, :100] for x in given]
    for got, want in zip(
        sage_attention(*longer, pv=pv, provider=provider),
        sage_attention(*given, pv=pv, provider=provider),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", sage.PV)
def test_sums_are_wider_than_fp16(provider: str, pv: str) -> None:
    """256 weights near 1 times 30000 overflow the FP16 sums of a published kernel, which paints black images."""
    q, k, v = inputs(seq_q=256, seq_k=256)
    v = v + 30000
    out, _ = sage_attention(0.1 * q, k, v, pv=pv, provider=provider)
    torch.testing.assert_close(out, exact(0.1 * q, k, v)[0].float(), rtol=1e-3 if pv == "fp16" else 0.07, atol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("causal", [False, True])
def test_scores_far_below_zero_are_scores(provider: str, causal: bool) -> None:
    """Published kernels add -1e6 to what is masked, or begin a maximum at -5e6: here all that is visible is below."""
    q, k, v = torch.full((1, 2, 100, 64), 1e3), torch.full((1, 2, 100, 64), -1e3), torch.randn(1, 2, 100, 64)
    out, lse = sage_attention(q, k, v, scale=1.0, smooth_k=False, causal=causal, provider=provider)
    seen = torch.arange(1.0, 101.0) if causal else torch.full((100,), 100.0)
    mean = (v.cumsum(2) if causal else v.sum(2, keepdim=True).expand_as(v)) / seen[:, None]
    torch.testing.assert_close(out, mean, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(lse, (seen.log() - 6.4e7).expand_as(lse), rtol=1e-6, atol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_causal_is_top_left(provider: str) -> None:
    for seq_q, seq_k in ((64, 200), (200, 64)):
        q, k, v = inputs(seq_q=seq_q, seq_k=seq_k)
        out, _ = sage_attention(q, k, v, causal=True, provider=provider)
        assert within(out, exact(q, k, v, causal=True)[0], "fp16")
        # Without smoothing, which sees all keys, a row depends only on keys up to its own, and those of their groups.
        before, _ = sage_attention(q, k, v, causal=True, smooth_k=False, provider=provider)
        k, v = k.clone(), v.clone()
        k[:, :, 64:] *= -3
        v[:, :, 64:] += 1
        after, _ = sage_attention(q, k, v, causal=True, smooth_k=False, provider=provider)
        torch.testing.assert_close(after[:, :, :64], before[:, :, :64], rtol=0, atol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_out_has_the_strides_of_q_and_inputs_stay(provider: str) -> None:
    for dtype in DTYPES:
        q, k, v = (torch.randn(2, 70, 3, 40).to(dtype).transpose(1, 2) for _ in range(3))
        before = [tensor.clone() for tensor in (q, k, v)]
        out, lse = sage_attention(q, k, v, provider=provider)
        assert (out.shape, out.dtype, out.stride()) == (q.shape, dtype, q.stride())
        assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 3, 70), torch.float32, True)
        assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_keys_and_no_queries(provider: str) -> None:
    q, k, v = inputs(seq_q=5, seq_k=0)
    out, lse = sage_attention(q, k, v, provider=provider)
    assert not out.any()
    assert (lse == -torch.inf).all()
    out, lse = sage_attention(k, q, q, provider=provider)
    assert (out.shape, lse.shape) == ((1, 2, 0, 64), (1, 2, 0))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(provider: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 33, 2, 16).to(dtype).transpose(1, 2) for _ in range(3))
    for arguments in ({}, {"causal": True, "pv": "fp8", "granularity": "per_block", "smooth_k": False, "scale": 0.5}):
        torch.library.opcheck(OP, (q, k, v), {**arguments, "provider": provider})


def test_kernels_repeat_the_defaults_of_the_schema() -> None:
    for function in (sage._forward, sage._check, sage_attention):
        assert same_defaults(OP, function) == []


def test_scale_and_defaults() -> None:
    q, k, v = inputs()
    given = sage_attention(q, k, v, granularity="per_thread", pv="fp16", smooth_k=True, causal=False, scale=64**-0.5)
    for a, b in zip(OP(q, k, v), given, strict=True):
        assert torch.equal(a, b)
    assert within(sage_attention(q, k, v, scale=0.7)[0], exact(q, k, v, scale=0.7)[0], "fp8")


def test_a_gradient_is_refused_under_compile() -> None:
    q, k, v = inputs(seq_q=16, seq_k=16, dim=16)
    compiled = torch.compile(sage_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="sage_attention: it has no gradient"):
        compiled(q.requires_grad_(), k, v)


def test_autocast_casts_q_k_and_v() -> None:
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = sage_attention(q, k.bfloat16(), v)
    want, want_lse = sage_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_compiles_in_one_graph_for_every_length() -> None:
    compiled = torch.compile(sage_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for seq in (40, 77, 192):
        q, k, v = inputs(seq_q=seq, seq_k=seq + 3, dim=16)
        for got, want in zip(compiled(q, k, v), sage_attention(q, k, v), strict=True):
            assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_exports() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sage_attention(q, k, v)[0]

    arguments = inputs(dim=16)
    program = torch.export.export(Model(), arguments)
    assert torch.equal(program.module()(*arguments), Model()(*arguments))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"bits": 2}, "bits must be 8 or 4, got 2"),
        ({"granularity": "per_row"}, "granularity must be one of per_block, per_warp, per_thread, got 'per_row'"),
        ({"pv": "int8"}, "pv must be one of fp16, fp8, got 'int8'"),
    ],
)
def test_wrong_choices_are_named(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        sage_attention(*inputs(), **arguments)


def test_head_dim_beyond_256_is_a_reason() -> None:
    with pytest.raises(UnsupportedError, match="head_dim 257, not 1 to 256"):
        sage_attention(*inputs(dim=257))


def test_fp8_needs_a_gpu_that_has_it() -> None:
    call = AttentionCall(1, 8, 8, 4096, 4096, 64, dtype=torch.bfloat16, device="cuda", params=(("pv", "fp8"),))
    provider = sage.BACKEND.provider("triton")
    assert provider.reasons(call, Capability.of("sm80")) == ['pv="fp8" needs sm89 or newer, this is sm80 (A100)']
    assert provider.reasons(call, Capability.of("sm89")) == []


@pytest.mark.parametrize(
    ("dtype", "machine", "seq", "causal", "pays"),
    [
        (torch.float32, "cpu", 8192, False, False),
        (torch.float32, "cpu-avx512", 512, False, True),
        (torch.bfloat16, "cpu-avx512", 256, True, False),
        (torch.float32, "cpu-avx2", 2048, False, False),
        (torch.float32, "cpu-avx2", 4096, False, True),
        (torch.bfloat16, "sm90", 4096, False, True),
    ],
)
def test_break_even(dtype: torch.dtype, machine: str, seq: int, causal: bool, pays: bool) -> None:
    capability = Capability.of(machine)
    backend = sparseattn.backends()["sage"]
    params = tuple((param.name, param.default) for param in backend.params)
    call = AttentionCall(1, 8, 8, seq, seq, 64, dtype=dtype, device=capability.device, causal=causal, params=params)
    assert backend.break_even is not None
    assert (backend.break_even(call, capability) is None) == pays
