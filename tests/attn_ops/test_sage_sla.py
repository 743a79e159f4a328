"""sage_sparse_linear_attention: errors within the published bounds, the CPU path equal to the definition, the contract.

Bounds are those of the published quantized kernels (mean absolute error relative to the mean absolute value).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.attention_model import SelfAttention, tokens
from support.sla_paper import paper_sla
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

import sparseattn
from sparseattn.attn_ops.backends import sage_sla as backend
from sparseattn.attn_ops.blocks.sla_method import VARIANTS
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.attn_ops.numerics.linear_attention import FEATURE_MAPS

OP = torch.ops.sparseattn.sage_sparse_linear_attention
EXACT = torch.ops.sparseattn.sparse_linear_attention
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOUND = {"fp16": (0.015, 0.9998), "fp8": (0.045, 0.999)}
PROVIDERS = ["cpu", "reference"]


def inputs(
    heads: int = 2,
    kv_heads: int = 2,
    length: int = 200,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Q, k, v, weight and bias; the last two always fp32, and so small that they hide no error of the sparse part."""
    q, k, v = (torch.randn(2, length, h, dim).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    k = k + offset * torch.randn(2, kv_heads, 1, dim).sign()
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.randn(dim, dim) / dim**0.5, 0.02 * torch.randn(dim)


def errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """(relative L1, cosine similarity)."""
    got = got.double()
    cosine = functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
    return float((got - want).abs().sum() / want.abs().sum()), float(cosine)


def within(got: Tensor, want: Tensor, pv: str) -> bool:
    error, cosine = errors(got, want)
    return error <= BOUND[pv][0] and cosine >= BOUND[pv][1]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", backend.PV)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_error_to_the_paper(provider: str, pv: str, variant: str, heads: int, kv_heads: int) -> None:
    for length, dim, keep in ((64, 64, 1), (200, 64, 2), (256, 128, 3)):
        given = inputs(heads, kv_heads, length, dim)
        arguments: dict[str, Any] = {"keep_ratio": keep / -(-length // 64), "variant": variant, "pv": pv}
        how: dict[str, Any] = {"keep": keep, "variant": variant, "block_q": 128}
        exact, exact_lse = paper_sla(*(x.double() for x in given), **how)
        out, lse = OP(*given, **arguments, provider=provider)
        assert within(out, exact, pv), (length, errors(out, exact))
        assert (lse - exact_lse).abs().mean() <= 5e-3
        exact, _ = paper_sla(*given[:3], **how)
        out, _ = OP(*given[:3], **arguments, provider=provider)
        assert within(out, exact, pv), (length, errors(out, exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pv", backend.PV)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("smooth_k", [False, True])
def test_cpu_path_is_the_definition(
    dtype: torch.dtype, pv: str, variant: str, feature_map: str, smooth_k: bool
) -> None:
    """The integers are the same; what is left is the rounding of out and of weights, which the CPU keeps in fp32."""
    limit = {torch.float32: 5e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    given = inputs(4, 2, 117, 40, dtype, offset=2.0)
    how = {"variant": variant, "feature_map": feature_map, "pv": pv, "smooth_k": smooth_k, "scale": 0.3}
    for block_q, block_k in ((16, 32), (128, 64)):
        arguments = {**how, "keep_ratio": 0.6, "block_q": block_q, "block_k": block_k}
        out, lse = OP(*given, **arguments, provider="cpu")
        want, want_lse = OP(*given, **arguments, provider="reference")
        assert out.dtype is dtype
        assert (out.double() - want.double()).norm() <= limit * want.double().norm()
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_smoothing_saves_a_k_with_an_offset(provider: str) -> None:
    given = inputs(offset=50.0)
    exact, exact_lse = paper_sla(*(x.double() for x in given), keep=2, block_q=128)
    out, lse = OP(*given, keep_ratio=0.5, provider=provider)
    assert within(out, exact, "fp16")
    assert (lse - exact_lse).abs().mean() <= 2e-2
    out, _ = OP(*given, keep_ratio=0.5, smooth_k=False, provider=provider)
    assert errors(out, exact)[0] > 0.05


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_channel_of_zeros_stays_0_in_fp8(provider: str) -> None:
    """The published kernels divide 0 by 0 there."""
    q, k, v, *_ = inputs()
    v[..., 5] = 0
    out, _ = OP(q, k, v, pv="fp8", provider=provider)
    assert out.isfinite().all()
    assert not out[..., 5].any()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ratios_from_0_to_1(provider: str, variant: str) -> None:
    given = inputs()
    for ratio, keep in ((0.0, 1), (0.1, 1), (0.5, 2), (1.0, 4)):
        exact, _ = paper_sla(*(x.double() for x in given), keep=keep, variant=variant, block_q=128)
        out, _ = OP(*given, keep_ratio=ratio, variant=variant, provider=provider)
        assert within(out, exact, "fp16"), ratio
        again, _ = OP(*given, keep_ratios=torch.tensor(ratio), variant=variant, provider=provider)
        assert torch.equal(again, out)
    sparse, _ = OP(*given[:3], keep_ratio=1.0, provider=provider)
    assert torch.equal(OP(*given[:4], keep_ratio=1.0, variant="complement", provider=provider)[0], sparse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_projection_is_exactly_the_sparse_part(dtype: torch.dtype) -> None:
    q, k, v, weight, bias = inputs(dtype=dtype)
    sparse, lse = OP(q, k, v)
    projected, projected_lse = OP(q, k, v, 0 * weight, 0 * bias)
    assert torch.equal(projected, sparse)
    assert torch.equal(projected_lse, lse)


def test_weights_trained_with_sla_serve_as_they_are() -> None:
    """Both add the same linear branch to nearly the same sparse part."""
    given = inputs()
    branch = OP(*given, keep_ratio=0.5)[0] - OP(*given[:3], keep_ratio=0.5)[0]
    exact = EXACT(*given, keep_ratio=0.5, block_q=128)[0] - EXACT(*given[:3], keep_ratio=0.5, block_q=128)[0]
    torch.testing.assert_close(branch, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(provider: str, dtype: torch.dtype) -> None:
    options = {"variant": "complement", "pv": "fp8", "keep_ratios": torch.tensor(0.5), "scale": 0.5, "block_q": 16}
    for strided, count, arguments in ((True, 3, {}), (False, 5, options)):
        given = [x if strided else x.contiguous() for x in inputs(length=33, dim=16, dtype=dtype)[:count]]
        torch.library.opcheck(OP.default, tuple(given), {**arguments, "provider": provider})


def test_one_graph_serves_all_lengths() -> None:
    def attend(*given: Tensor) -> Tensor:
        return OP(*given, keep_ratio=0.4, variant="complement")[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for length in (128, 200, 333):
        given = inputs(length=length)
        torch.testing.assert_close(compiled(*given), attend(*given))
    assert counter.frame_count == 1


def test_a_rule_runs_it_training_free() -> None:
    params = {"keep_ratio": 0.5, "block_q": 16, "block_k": 16}
    policy = sparseattn.Policy((sparseattn.Rule("sage_sla", params=params),))
    model, x = SelfAttention(), tokens()
    options = {"policy": policy, "inner_backend": "aot_eager"}
    compiled = torch.compile(model, backend="sparseattn", fullgraph=True, dynamic=True, options=options)
    with torch.no_grad():
        out = compiled(x)
        assert dict(sparseattn.last_report().chosen) == {"sage_sla": 1}
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in model.qkv(x).chunk(3, dim=-1))
        torch.testing.assert_close(out, OP(q, k, v, **params)[0].transpose(1, 2).flatten(2))
    (decision,) = sparseattn.explain(SelfAttention(), tokens().requires_grad_(), policy=policy).decisions
    assert decision.is_dense
    assert "gradient" in str(decision.rejected)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_out_has_the_strides_of_q_and_inputs_stay(provider: str) -> None:
    for dtype in DTYPES:
        given = inputs(dtype=dtype)
        before = [x.clone() for x in given]
        out, lse = OP(*given, provider=provider)
        assert (out.shape, out.dtype, out.stride()) == (given[0].shape, dtype, given[0].stride())
        assert (lse.dtype, lse.is_contiguous()) == (torch.float32, True)
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_tokens(provider: str) -> None:
    q = torch.randn(2, 2, 0, 64)
    out, lse = OP(q, q, q, *inputs()[3:], provider=provider)
    assert (out.shape, lse.shape) == ((2, 2, 0, 64), (2, 2, 0))


def test_typed_wrapper_and_autocast() -> None:
    given = inputs(dim=16)
    for got, want in zip(backend.sage_sparse_linear_attention(*given), OP(*given), strict=True):
        assert torch.equal(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = OP(*given)
    assert torch.equal(out, OP(*(x.bfloat16() for x in given))[0])


def test_mistakes_are_named() -> None:
    q, k, v, weight, _ = inputs()
    with pytest.raises(ArgumentError, match=r"^sage_sparse_linear_attention: pv must be one of fp16, fp8, got 'int8'"):
        OP(q, k, v, pv="int8")
    with pytest.raises(ArgumentError, match=r"^sage_sparse_linear_attention: weight must have shape"):
        OP(q, k, v, weight[1:])


def test_what_the_providers_need() -> None:
    def call(**params: Any) -> AttentionCall:
        defaults = {"pv": "fp16", "smooth_k": True, "block_q": 128, "block_k": 64}
        given = tuple((defaults | params).items())
        return AttentionCall(1, 8, 8, 4096, 4096, 64, dtype=torch.bfloat16, device="cuda", params=given)

    triton, published = (backend.BACKEND.provider(name) for name in ("triton", "spas_sage_attn"))
    assert triton.reasons(call(pv="fp8"), Capability.of("sm80")) == [
        'pv="fp8" needs sm89 or newer, this is sm80 (A100)'
    ]
    assert triton.reasons(call(pv="fp8"), Capability.of("sm89")) == []
    machine = Capability.of("sm90", {"spas_sage_attn": "0.1.0"})
    assert published.reasons(call(pv="fp8", block_q=64, block_k=128), machine) == []
    assert published.reasons(call(pv="fp8"), machine) == ["blocks of 128 x 64, on sm90 it has 64 x 128"]
    assert published.reasons(call(block_q=64, block_k=128), machine) == ['has kernels for pv="fp8" only on sm90']


def test_short_sequences_do_not_pay() -> None:
    pays = backend.BACKEND.break_even
    assert pays is not None
    assert pays(AttentionCall(1, 4, 4, 512, 512, 64), Capability.of("cpu")) is None
    assert "256 tokens" in str(pays(AttentionCall(1, 4, 4, 256, 256, 64), Capability.of("cpu")))
    assert pays(AttentionCall(1, 4, 4, 256, 256, 64), Capability.of("sm90")) is None
