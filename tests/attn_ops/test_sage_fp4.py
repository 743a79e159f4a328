"""sage_fp4_attention: the numbers NVFP4 has, where they round, and the op contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import sparseattn
from sparseattn import Capability, Policy
from sparseattn.attn_ops.backends import sage_fp4
from sparseattn.attn_ops.backends.sage_fp4 import sage_fp4_attention
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.attn_ops.reference.sage_fp4 import round_e2m1, round_nvfp4, round_weights
from sparseattn.lowering.decide import decide

OP = torch.ops.sparseattn.sage_fp4_attention.default
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SWITCHES = ("smooth_q", "smooth_k", "two_level")


def inputs(seq_q: int = 200, seq_k: int = 200, dim: int = 64, heads: int = 2, kv_heads: int = 2) -> list[Tensor]:
    return [torch.randn(1, h, s, dim) for h, s in ((heads, seq_q), (kv_heads, seq_k), (kv_heads, seq_k))]


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """(relative L1, cosine similarity)."""
    got = got.double()
    cosine = functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
    return float((got - want).abs().sum() / want.abs().sum()), float(cosine)


def test_e2m1_is_the_nearest_of_its_numbers() -> None:
    x = torch.linspace(-8, 8, 6400)
    got = round_e2m1(x)
    assert torch.isin(got.abs(), E2M1).all()
    distance = (x.unsqueeze(-1) - torch.cat([E2M1, -E2M1])).abs().amin(-1)
    torch.testing.assert_close((got - x).abs(), distance)


def test_e2m1_ties_go_to_the_even_code_and_what_is_large_saturates() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.1, 1e9, torch.inf])
    want = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0])
    assert torch.equal(round_e2m1(x), want)
    assert torch.equal(round_e2m1(-x), -want)
    assert round_e2m1(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.parametrize("size", [16, 40, 7])
def test_nvfp4_has_a_scale_for_every_16(size: int) -> None:
    x = torch.randn(3, size) * torch.logspace(0, 2, 3).unsqueeze(-1)
    got = round_nvfp4(x)
    for start in range(0, size, 16):
        group, back = x[:, start : start + 16], got[:, start : start + 16]
        scale = (group.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).float()
        assert torch.isin((back / scale).abs(), E2M1).all()
        # Half of the widest step, and what the rounding of the scale (by up to 1 / 16) takes from the largest number.
        assert ((back - group).abs() <= 1.0 * scale + group.abs().amax(-1, keepdim=True) / 16).all()


def test_nvfp4_at_the_ends_of_its_range() -> None:
    assert torch.equal(round_nvfp4(torch.zeros(16)), torch.zeros(16))
    assert torch.equal(round_nvfp4(torch.full((16,), 1e-3)), torch.zeros(16))
    assert torch.equal(round_nvfp4(torch.full((16,), 1e6)), torch.full((16,), 2688.0))
    assert round_nvfp4(torch.tensor([1.0, torch.nan])).isnan().all()


def test_two_levels_keep_small_weights() -> None:
    """A group of weights below 6 * 2 ** -10 has a scale of 0 in one level."""
    p = torch.full((32,), 1e-3)
    p[0] = 1.0
    assert not round_nvfp4(p)[16:].any()
    torch.testing.assert_close(round_weights(p)[16:], p[16:], rtol=1 / 16, atol=0)
    assert round_weights(p)[0] == 1.0
    assert not round_weights(torch.zeros(20)).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(256, 256), (100, 203), (203, 100)])
def test_error_to_exact_attention(causal: bool, heads: int, kv_heads: int, seq_q: int, seq_k: int) -> None:
    """An e2m1 number is off by up to a quarter of itself; the rounding errors of 64 products average out."""
    q, k, v = inputs(seq_q, seq_k, 64, heads, kv_heads)
    for scale in (None, 0.05):
        out, lse = sage_fp4_attention(q, k, v, causal=causal, scale=scale)
        want, want_lse = exact(q, k, v, causal, scale)
        error, cosine = errors(out, want)
        assert error <= 0.25
        assert cosine >= 0.97
        assert (lse - want_lse).abs().mean() <= 0.1


def test_nothing_is_lost_where_fp4_has_the_numbers() -> None:
    """Scales are exactly 1 in q, k and v: what is left is the rounding of weights."""
    q, k, v = (6 * torch.randn_like(x).sign() for x in inputs(40, 64, 32))
    out, lse = sage_fp4_attention(q, k, v, smooth_q=False, smooth_k=False, scale=0.005)
    want_lse = exact(q, k, v, scale=0.005)[1]
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    scores = 0.005 * (q @ k.mT)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    torch.testing.assert_close(out, round_weights(weights) @ v / weights.sum(-1, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("switch", ["smooth_q", "smooth_k"])
def test_smoothing_removes_an_offset(switch: str) -> None:
    """Seen in the lse, which v's rounding does not touch; the scale keeps the softmax as flat as without the offset."""
    q, k, v = inputs(256, 256)
    offset = 10 * torch.randn(1, 2, 1, 64).sign()
    q, k, scale = (q + offset, k, 0.0125) if switch == "smooth_q" else (q, k + offset, 0.125)
    want, want_lse = exact(q, k, v, scale=scale)
    out, lse = sage_fp4_attention(q, k, v, scale=scale)
    rough, rough_lse = sage_fp4_attention(q, k, v, scale=scale, **{switch: False})
    assert errors(out, want)[0] <= 0.25
    assert errors(rough, want)[0] > errors(out, want)[0]
    assert (rough_lse - want_lse).abs().mean() > 3 * (lse - want_lse).abs().mean()


@pytest.mark.parametrize("dim", [16, 40, 128, 256])
def test_head_dims(dim: int) -> None:
    """The published function takes 64 and 128, and from 256 on prints a line and returns plain SDPA."""
    q, k, v = inputs(100, 100, dim)
    out, lse = sage_fp4_attention(q, k, v, scale=0.05)
    want, want_lse = exact(q, k, v, scale=0.05)
    error, cosine = errors(out, want)
    assert 1e-3 < error <= 0.25
    assert cosine >= 0.97
    assert (lse - want_lse).abs().mean() <= 0.1


def test_the_mean_of_a_short_block_is_that_of_its_tokens() -> None:
    """Equal queries are their mean, whose scores are fp32. Published: padding counts, and the scores are halves."""
    q, k, v = inputs(seq_q=200)
    q = (30 * torch.randn(1, 2, 1, 64)).expand_as(q)
    _, lse = sage_fp4_attention(q, k, v)
    torch.testing.assert_close(lse.double(), exact(q, k, v)[1], rtol=1e-6, atol=1e-5)


def test_causal_is_top_left_for_every_token() -> None:
    """The published kernel aligns padded lengths, and loses a tile of values."""
    q, k, v = inputs(130, 200)
    v[:, :, 1:] = 0
    out, _ = sage_fp4_attention(q, k, v, causal=True)
    torch.testing.assert_close(out[:, :, 0], round_nvfp4(v.mT).mT[:, :, 0])
    assert errors(out, exact(q, k, v, True)[0])[0] <= 0.25


def test_layout_inputs_and_edges() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q, k, v = (torch.randn(2, 70, 3, 40).to(dtype).transpose(1, 2) for _ in range(3))
        before = [tensor.clone() for tensor in (q, k, v)]
        out, lse = sage_fp4_attention(q, k, v)
        assert (out.shape, out.dtype, out.stride()) == (q.shape, dtype, q.stride())
        assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 3, 70), torch.float32, True)
        assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    out, lse = sage_fp4_attention(q, k[:, :, :0], v[:, :, :0])
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 33, 2, 16).to(dtype).transpose(1, 2) for _ in range(3))
    torch.library.opcheck(OP, (q, k, v))
    switched: dict[str, Any] = {**dict.fromkeys(SWITCHES, False), "causal": True, "scale": 0.5}
    torch.library.opcheck(OP, (q.contiguous(), k.contiguous(), v.contiguous()), switched)


def test_compiles_in_one_graph_for_every_length() -> None:
    compiled = torch.compile(sage_fp4_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for seq in (40, 128, 192):
        q, k, v = inputs(seq, seq + 3, 16)
        for got, want in zip(compiled(q, k, v), sage_fp4_attention(q, k, v), strict=True):
            assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_wrong_shape_is_refused() -> None:
    _, k, v = inputs()
    with pytest.raises(ArgumentError, match="sage_fp4_attention: v must have k's shape"):
        sage_fp4_attention(k, k, v[:, :, 1:])


def test_a_policy_takes_it_only_if_the_reference_is_asked_for() -> None:
    call = AttentionCall(1, 8, 8, 4096, 4096, 64, dtype=torch.bfloat16, device="cuda")
    machine = Capability.of("sm120")
    assert decide(call, machine, Policy([sparseattn.Rule("sage_fp4")])).is_dense
    decision = decide(call, machine, Policy([sparseattn.Rule("sage_fp4", provider="reference")]))
    assert (decision.backend, decision.provider) == (sage_fp4.NAME, "reference")
