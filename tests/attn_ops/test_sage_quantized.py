"""sage_attention_quantized: with quantization before it, sage_attention; and the op contract."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.triton_interpreter import interpret, why_not_interpret
from torch import Tensor

from sparseattn.attn_ops.backends.sage_quantized import quantize_and_attend, sage_attention_quantized
from sparseattn.attn_ops.errors import ArgumentError, GradientError
from sparseattn.attn_ops.kernels.cpu import sage as cpu
from sparseattn.attn_ops.numerics.quantize import GRANULARITIES, QuantizedQK, quantize_qk
from sparseattn.attn_ops.op import same_defaults
from sparseattn.attn_ops.reference.sage import sage_attention_quantized as definition

OP = torch.ops.sparseattn.sage_attention_quantized.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(
    seq_q: int = 70, seq_k: int = 90, dim: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in (B, S, H, D) order; keys with a large mean."""
    q = torch.randn(2, seq_q, 4, dim).transpose(1, 2)
    k = torch.randn(2, 2, seq_k, dim) + 2 * torch.randn(2, 2, 1, dim)
    return q.to(dtype), k.to(dtype), torch.randn(2, 2, seq_k, dim).to(dtype)


def operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    qk = quantize_qk(q, k, granularity="per_thread", smooth_k=True)
    return qk.q, qk.k, v, qk.q_scale, qk.k_scale


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"smooth_k": False, "scale": -0.3}, {"bits": 4}, {"pv": "fp8", "smooth_v": True}]
)
def test_with_quantization_before_it_is_sage_attention(
    dtype: torch.dtype, granularity: str, options: dict[str, Any]
) -> None:
    q, k, v = inputs(dtype=dtype)
    arguments = {**options, "granularity": granularity, "provider": "reference"}
    out, lse = quantize_and_attend(q, k, v, **arguments)
    want, want_lse = torch.ops.sparseattn.sage_attention(q, k, v, **arguments)
    assert out.stride() == want.stride()
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)  # the mean's product, summed in another order


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True, "scale": -0.3}, {"pv": "fp8", "smooth_v": True}])
def test_cpu_kernels_are_the_definition(
    native: bool, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(cpu, "library_for", lambda _: None)
    limit = 6e-3 if dtype is torch.bfloat16 else 1e-3
    if options.get("pv") == "fp8":
        limit = 3e-2  # FP8 weights, rounded against the largest score of some keys or of all
    for dim, (seq_q, seq_k) in itertools.product((16, 40, 128), [(1, 1), (70, 301), (300, 77)]):
        given = operands(*inputs(seq_q, seq_k, dim, dtype))
        out, lse = sage_attention_quantized(*given, provider="cpu", **options)
        want, want_lse = sage_attention_quantized(*given, provider="reference", **options)
        assert out.dtype is dtype
        assert out.stride() == want.stride()
        assert relative_error(out, want) <= limit, (dim, seq_q, seq_k)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"scale": 0.2}, {"causal": True, "scale": -0.3}])
def test_triton_kernel_is_the_definition(dtype: torch.dtype, options: dict[str, Any]) -> None:
    from sparseattn.attn_ops.kernels.triton import sage as triton

    given, arguments = operands(*inputs(70, 90, 64, dtype)), {"causal": False, "pv": "fp16", **options}
    with interpret(arch=90):
        out, lse = triton.quantized_attention(*given, **arguments)
    want, want_lse = definition(*given, **arguments)
    assert out.dtype is dtype
    assert out.stride() == want.stride()
    assert relative_error(out, want) < (5.5e-3 if dtype is torch.bfloat16 else 1e-3)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=2e-5)


def test_no_keys_and_no_queries() -> None:
    for seq_q, seq_k in ((3, 0), (0, 3)):
        q, k, v = inputs(seq_q, seq_k, dtype=torch.bfloat16)
        scales = torch.ones(2, 4, seq_q), torch.ones(2, 2, seq_k)
        for provider in ("cpu", "reference"):
            out, lse = sage_attention_quantized(q.to(torch.int8), k.to(torch.int8), v, *scales, provider=provider)
            assert (out.dtype, out.shape, lse.shape) == (torch.bfloat16, q.shape, q.shape[:-1])
            assert (out == 0).all()
            assert (lse == -torch.inf).all()


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = operands(*inputs(dtype=dtype))
        torch.library.opcheck(OP, given, {"causal": True, "pv": "fp8"})


def test_defaults_are_those_of_the_schema() -> None:
    from sparseattn.attn_ops.op import FORWARDS

    assert same_defaults(OP, FORWARDS["sage_attention_quantized"]) == []
    assert same_defaults(torch.ops.sparseattn.sage_attention.default, quantize_and_attend) == []


def test_a_gradient_is_refused() -> None:
    q, k, v, q_scale, k_scale = operands(*inputs())
    with pytest.raises(GradientError, match="sage_attention_quantized: it has no gradient"):
        sage_attention_quantized(q, k, v.requires_grad_(), q_scale, k_scale)
    with pytest.raises(ArgumentError, match=r"q_scale must not require a gradient"):
        sage_attention_quantized(q, k, v.detach(), q_scale.requires_grad_(), k_scale)
    with torch.no_grad():
        sage_attention_quantized(q, k, v, q_scale, k_scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"q": x.q.float()}, "q must be int8, got float32"),
        (lambda x: {"k": x.k.short()}, "k must be int8, got int16"),
        (lambda x: {"v": x.k}, "v must be float32 or float16 or bfloat16, got int8"),
        (lambda x: {"q_scale": x.q_scale.half()}, "q_scale must be float32, whatever v is, got float16"),
        (lambda x: {"k_scale": x.q_scale}, r"k_scale must have shape \(2, 2, 90\), one per token, got \(2, 4, 70\)"),
        (lambda x: {"k": x.k[..., :16].contiguous()}, "v must have k's shape"),
        (lambda x: {"pv": "int8"}, "pv must be one of fp16, fp8"),
    ],
)
def test_mistakes_are_named(change: Any, message: str) -> None:
    q, k, v, q_scale, k_scale = operands(*inputs())
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "q_scale": q_scale, "k_scale": k_scale}
    given |= change(QuantizedQK(q, q_scale, k, k_scale, None))
    with pytest.raises(ArgumentError, match=f"sage_attention_quantized: {message}"):
        sage_attention_quantized(**given)
