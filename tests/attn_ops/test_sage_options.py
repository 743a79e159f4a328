"""sage_attention with bits, smoothing of q, k and v, and offsets: what each does to the error, and all together.

Bounds come from the step of the quantization, not from what came out: a value rounded to a grid of step s is off by
noise of variance s ** 2 / 12, and the error of the output follows from that to first order.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparseattn.attn_ops.backends import sage
from sparseattn.attn_ops.backends.sage import sage_attention
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.kernels.cpu import sage as cpu
from sparseattn.attn_ops.numerics.quantize import GRANULARITIES, QuantizedQK, quantize_qk
from sparseattn.attn_ops.reference import sage as reference

OP = torch.ops.sparseattn.sage_attention.default
PROVIDERS = ["cpu", "reference"]
SWITCHES = ("smooth_q", "smooth_k", "smooth_v", "asymmetric")


def inputs(seq_q: int = 200, seq_k: int = 200, dim: int = 64, heads: int = 2, kv_heads: int = 2) -> list[Tensor]:
    return [torch.randn(1, h, s, dim) for h, s in ((heads, seq_q), (kv_heads, seq_k), (kv_heads, seq_k))]


def scores_of(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """Scaled scores in fp64."""
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf) if causal else scores


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    scores = scores_of(q, k, causal)
    return scores.softmax(-1) @ v.double().repeat_interleave(q.shape[1] // k.shape[1], 1), scores.logsumexp(-1)


def error(got: Tensor, want: Tensor) -> float:
    """Relative L1 error."""
    return float((got.double() - want).abs().sum() / want.abs().sum())


def noise_of_scores(qk: QuantizedQK) -> Tensor:
    """Variance of every scaled score: q . (noise of k) + (noise of q) . k + noise . noise."""
    dim = qk.q.shape[-1]
    q, k = qk.q * qk.q_scale.unsqueeze(-1), qk.k * qk.k_scale.unsqueeze(-1)
    noise_q, noise_k = (qk.q_scale**2 / 12).unsqueeze(-1), (qk.k_scale**2 / 12).unsqueeze(-2)
    size_q, size_k = q.square().sum(-1).unsqueeze(-1), k.square().sum(-1).unsqueeze(-2)
    # |rounded|^2 is |given|^2 plus the noise's own share; what is rounded to is not less noisy than what was given.
    return ((size_q - dim * noise_q) * noise_k + (size_k - dim * noise_k) * noise_q + dim * noise_q * noise_k) / dim


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("smooth_q", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("causal", [False, True])
def test_the_error_of_int4_is_that_of_its_step(provider: str, smooth_q: bool, granularity: str, causal: bool) -> None:
    """d out = sum_j p_j (v_j - out) d s_j, with independent d s_j."""
    q, k, v = inputs(seq_q=384, seq_k=384, dim=128)
    options: dict[str, Any] = {"bits": 4, "granularity": granularity, "smooth_q": smooth_q}
    out, lse = sage_attention(q, k, v, causal=causal, provider=provider, **options)
    want, want_lse = exact(q, k, v, causal)
    noise = noise_of_scores(quantize_qk(q, k, smooth_k=True, **options)).double()
    share = scores_of(q, k, causal).softmax(-1).square() * noise
    values = v.double()
    variance = share @ values.square() - 2 * want * (share @ values) + want.square() * share.sum(-1, keepdim=True)
    predicted = math.sqrt(2 / math.pi) * variance.clamp_min(0).sqrt().mean()
    measured = (out.double() - want).abs().mean()
    assert 0.9 <= measured / predicted <= 1.1, (float(measured), float(predicted))
    # A sum of exponentials of noisy scores is too large by half their variance; sqrt(share) is what remains of them.
    spread = share.sum(-1).sqrt() + noise.mean(-1) / 2
    assert ((lse - want_lse).abs() <= 6 * spread).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_noise_of_scores_is_that_of_the_step(bits: int, granularity: str) -> None:
    q, k, _ = inputs(seq_q=384, seq_k=384, dim=128)
    qk = quantize_qk(q, k, granularity=granularity, smooth_k=False, bits=bits)
    rounded = scores_of(qk.q * qk.q_scale.unsqueeze(-1), qk.k * qk.k_scale.unsqueeze(-1))
    ratio = (rounded - scores_of(q, k)).square().mean() / noise_of_scores(qk).mean()
    assert 0.95 <= ratio <= 1.05


@pytest.mark.parametrize("pv", sage.PV)
@pytest.mark.parametrize("bits", sage.BITS)
@pytest.mark.parametrize("causal", [False, True])
def test_cpu_kernel_is_the_definition_with_every_option(pv: str, bits: int, causal: bool) -> None:
    """The integers are the same, so the rest is a rare weight that rounds the other way."""
    for seq_q, seq_k, dim in [(1, 1, 8), (130, 70, 40), (300, 200, 64)]:
        q, k, v = inputs(seq_q, seq_k, dim, heads=4)
        for switches, granularity in itertools.product(itertools.product((False, True), repeat=4), GRANULARITIES):
            options: dict[str, Any] = dict(zip(SWITCHES, switches, strict=True))
            options |= {"bits": bits, "granularity": granularity, "pv": pv, "causal": causal, "scale": 0.2}
            out, lse = cpu.attention(q + 1, k + 1, v + 1, **options)
            want, want_lse = reference.sage_attention(q + 1, k + 1, v + 1, **options)
            assert (out - want).norm() <= 1e-3 * want.norm(), options
            torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("pv", sage.PV)
def test_chunks_of_rows_may_cross_the_blocks_of_smooth_q(pv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(seq_q=300)
    options: dict[str, Any] = {"granularity": "per_warp", "smooth_q": True, "smooth_k": True, "pv": pv, "scale": 0.2}
    want, want_lse = cpu.attention(q, k, v, causal=True, **options)
    monkeypatch.setattr(cpu, "_CHUNK", (48, 48))
    out, lse = cpu.attention(q, k, v, causal=True, **options)
    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("bits", sage.BITS)
@pytest.mark.parametrize("offset", [4.0, 20.0])
def test_smoothing_removes_a_large_offset_of_q(provider: str, bits: int, offset: float) -> None:
    """The offset's scores are exact, so the noise is that of the rest; the scale keeps the softmax as flat as usual."""
    q, k, v = inputs(seq_q=300, seq_k=300)
    q = q + offset * torch.randn(1, 2, 1, 64).sign()
    want, want_lse = exact(q / offset, k, v)
    options: dict[str, Any] = {"bits": bits, "scale": 64**-0.5 / offset, "provider": provider}
    out, lse = sage_attention(q, k, v, smooth_q=True, **options)
    rough, _ = sage_attention(q, k, v, **options)
    assert error(rough, want) > 2 * error(out, want)
    if bits == 8:
        assert error(out, want) <= 0.015
        assert (lse - want_lse).abs().max() <= 5e-3


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", sage.PV)
def test_smoothing_removes_a_large_offset_of_v(provider: str, pv: str) -> None:
    """Measured against what v has beside its mean, the error is that of a v without one."""
    q, k, v = inputs(seq_q=256, seq_k=256)
    offset = 200 * torch.randn(1, 2, 1, 64).sign()
    want = exact(q, k, v)[0]
    out, _ = sage_attention(q, k, v + offset, pv=pv, smooth_v=True, provider=provider)
    assert error(out - offset, want) <= {"fp16": 0.015, "fp8": 0.045}[pv]
    rough, _ = sage_attention(q, k, v + offset, pv=pv, provider=provider)
    assert error(rough - offset, want) > 2 * error(out - offset, want)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_offsets_serve_values_of_one_sign(provider: str) -> None:
    """Integers of -amax ... amax leave half of themselves unused there, so the step is twice as large."""
    q, k, v = (tensor.abs() for tensor in inputs(seq_q=256, seq_k=256))
    want = exact(q, k, v)[0]
    options: dict[str, Any] = {"smooth_k": False, "bits": 4, "provider": provider}
    centred = error(sage_attention(q, k, v, asymmetric=True, **options)[0], want)
    assert centred <= 0.6 * error(sage_attention(q, k, v, **options)[0], want)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", sage.PV)
def test_equal_tokens_are_exact(provider: str, pv: str) -> None:
    """Groups of one value have no range at all, blocks of equal tokens no rest after their mean."""
    q, k = torch.full((1, 2, 200, 32), 3.0), torch.full((1, 2, 150, 32), -2.0)
    v = torch.full((1, 2, 150, 32), 5.0)
    for switch in ("smooth_q", "asymmetric"):
        out, lse = sage_attention(q, k, v, pv=pv, smooth_k=False, smooth_v=True, provider=provider, **{switch: True})
        torch.testing.assert_close(out, torch.full_like(out, 5.0))
        torch.testing.assert_close(lse, torch.full_like(lse, -6 * 32**0.5 + math.log(150)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_nan_stays_visible_and_inputs_stay(provider: str, switch: str) -> None:
    q, k, v = inputs()
    q[0, 0, 5, 0] = torch.nan
    before = [tensor.clone() for tensor in (q, k, v)]
    out, lse = sage_attention(q, k, v, provider=provider, **{switch: True})
    assert out[0, 0, 5].isnan().all()
    assert lse[0, 0, 5].isnan()
    assert out[0, 1].isfinite().all()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(provider: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"bits": 4, "granularity": "per_warp", **dict.fromkeys(SWITCHES, True)}
    for transposed in (False, True):
        q, k, v = (torch.randn(1, 33, 2, 16).to(dtype).transpose(1, 2) for _ in range(3))
        if not transposed:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        torch.library.opcheck(OP, (q, k, v), {**options, "provider": provider})


def test_compiles_in_one_graph_for_every_length() -> None:
    options: dict[str, Any] = {"bits": 4, **dict.fromkeys(SWITCHES, True)}
    compiled = torch.compile(sage_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for seq in (40, 128, 192):
        q, k, v = inputs(seq, seq + 3, 16)
        for got, want in zip(compiled(q, k, v, **options), sage_attention(q, k, v, **options), strict=True):
            assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("params", "reasons"),
    [
        ({"bits": 4, "smooth_q": True, "smooth_v": True}, 0),
        ({"asymmetric": True}, 1),
        ({"asymmetric": True, "pv": "fp8"}, 2),
    ],
)
def test_triton_says_what_it_cannot(params: dict[str, Any], reasons: int) -> None:
    call = AttentionCall(1, 8, 8, 4096, 4096, 64, dtype=torch.float16, device="cuda", params=tuple(params.items()))
    found = sage.BACKEND.provider("triton").reasons(call, Capability.of("sm80"))
    assert len(found) == reasons
    assert any("asymmetric=True" in reason for reason in found) == bool(reasons)


@pytest.mark.parametrize(
    ("param", "pays"),
    [
        (("bits", 4), True),
        (("asymmetric", True), True),
        (("smooth_q", True), False),
        (("smooth_v", True), False),
        (("pv", "fp8"), False),
    ],
)
def test_break_even_on_a_cpu(param: tuple[str, Any], pays: bool) -> None:
    call = AttentionCall(1, 8, 8, 4096, 4096, 64, dtype=torch.bfloat16, params=(param,))
    assert sage.BACKEND.break_even is not None
    assert (sage.BACKEND.break_even(call, Capability.of("cpu-avx512")) is None) == pays


def test_smoothing_of_q_and_v_changes_nothing_but_rounding() -> None:
    """Against fp64, for grouped heads and more keys than queries, with a block of queries that is not full."""
    q, k, v = inputs(150, 333, 64, heads=4, kv_heads=1)
    want, want_lse = exact(q, k, v, causal=True)
    for provider in PROVIDERS:
        out, lse = sage_attention(q, k, v, smooth_q=True, smooth_v=True, causal=True, provider=provider)
        assert error(out, want) <= 0.015
        assert functional.cosine_similarity(out.flatten().double(), want.flatten(), dim=0) >= 0.9998
        assert (lse - want_lse).abs().mean() <= 5e-3
