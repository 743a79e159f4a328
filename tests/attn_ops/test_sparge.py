"""sparge_attention: the definition against the paper's equations, the CPU kernel against it, and the op contract."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparseattn.attn_ops.backends import sparge as backend
from sparseattn.attn_ops.backends.sparge import sparge_attention
from sparseattn.attn_ops.blocks.block_index import BlockIndex, mask_of
from sparseattn.attn_ops.blocks.sparge_map import sparge_block_map
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import ArgumentError, UnsupportedError
from sparseattn.attn_ops.kernels.sparge import on_map
from sparseattn.attn_ops.numerics.block_rounding import round_v_fp8
from sparseattn.attn_ops.op import same_defaults
from sparseattn.attn_ops.vendors import spas_sage_attn

OP = torch.ops.sparseattn.sparge_attention.default
MAP = torch.ops.sparseattn.sparge_block_map.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PROVIDERS = ["cpu", "reference"]
BOUND = {"fp16": 0.015, "fp8": 0.045}
SMALL = {"block_q": 32, "block_k": 16}
SHAPES = [(128, 128), (117, 117), (70, 130), (130, 70), (9, 9)]


def inputs(
    seq_q: int = 128, seq_k: int = 128, dtype: torch.dtype = torch.float32, dim: int = 32, strided: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads on two of keys; keys have a common offset, as models' keys have."""
    shapes = (4, seq_q), (2, seq_k), (2, seq_k)
    if strided:
        q, k, v = (torch.randn(1, tokens, heads, dim).transpose(1, 2) for heads, tokens in shapes)
    else:
        q, k, v = (torch.randn(1, heads, tokens, dim) for heads, tokens in shapes)
    return q.to(dtype), (k + 2 * torch.randn(2, 1, dim)).to(dtype), v.to(dtype)


def over_blocks(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_q: int, block_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Out and lse of unrounded fp64 attention to the blocks (B, Hq, nq, nk)."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    allowed = blocks.repeat_interleave(block_q, 2)[:, :, : q.shape[2]].repeat_interleave(block_k, 3)[..., : k.shape[2]]
    if causal:
        allowed = allowed & torch.ones(allowed.shape[-2:], dtype=torch.bool).tril()
    scores = (scale * (q @ k.mT)).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def relative_l1(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().sum() / want.abs().sum())


def paper_blocks(q: Tensor, k: Tensor, theta: float, tau: float, block_q: int, block_k: int) -> Tensor:
    """SpargeAttn's equations (1) to (5) for one head without a batch, in fp64: (nq, nk) bool."""
    q, k = q.double(), k.double() - k.double().mean(0)
    means, similar = [], []
    for x, block in ((q, block_q), (k, block_k)):
        means.append(torch.stack([part.mean(0) for part in x.split(block)]))
        cosines = [torch.nn.functional.cosine_similarity(p[:, None], p[None], dim=-1).mean() for p in x.split(block)]
        similar.append(torch.stack(cosines) >= theta)
    scores = means[0] @ means[1].T / math.sqrt(q.shape[-1])
    scores[:, ~similar[1]] = -torch.inf
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    for i, row in enumerate(scores.softmax(-1)):
        held = 0.0
        for j in sorted(range(len(row)), key=lambda j: (-row[j].item(), j)):
            if held < tau and row[j] > 0:
                chosen[i, j] = True
                held += row[j].item()
    chosen[:, ~similar[1]] = True
    chosen[~similar[0]] = True
    return chosen


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", backend.PV)
@pytest.mark.parametrize(("theta", "tau"), [(-1.0, 0.4), (-1.0, 0.8), (0.09, 0.6)])
@pytest.mark.parametrize(("seq_q", "seq_k"), SHAPES)
def test_is_what_the_paper_says(provider: str, pv: str, theta: float, tau: float, seq_q: int, seq_k: int) -> None:
    q, k, v = inputs(seq_q, seq_k, dim=64)
    blocks = torch.stack([paper_blocks(q[0, h], k[0, h // 2], theta, tau, 32, 16) for h in range(4)]).unsqueeze(0)
    out, lse = sparge_attention(q, k, v, mass=tau, similarity=theta, pv=pv, provider=provider, **SMALL)
    want, want_lse = over_blocks(q, k, v, blocks, 32, 16, False, 64**-0.5)
    assert relative_l1(out, want) <= BOUND[pv]
    assert (lse - want_lse).abs().max() <= 5e-2
    assert (lse - want_lse).abs().mean() <= 5e-3


MODES: dict[str, dict[str, Any]] = {
    "ratio": {"keep_ratio": 0.4},
    "mass": {"mass": 0.7},
    "similarity": {"similarity": 0.12, "sink": True, "keep_ratio": 0.3},
    "second stage": {"pv_threshold": 1.5, "keep_ratio": 0.8},
    "per head": {
        "masses": torch.tensor([0.2, 0.5, 0.9, 1.0]),
        "similarities": torch.tensor([-1.0, 0.0, 0.1, 1.0]),
        "pv_thresholds": torch.tensor([0.5, 1.0, 2.0, 50.0]),
    },
    "0-d": {"keep_ratios": torch.tensor(0.6), "pv_thresholds": torch.tensor(2.0)},
    "not smoothed": {"smooth_k": False},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pv", backend.PV)
@pytest.mark.parametrize("causal", [False, True])
def test_cpu_kernel_is_the_definition(dtype: torch.dtype, mode: str, pv: str, causal: bool) -> None:
    """The integers and the blocks are the same, so the rest is the rounding of weights, and of the output.

    In FP8 a score that differs in its last bit may round a weight of a row the other way, by a sixteenth of it.
    """
    limit = 4e-3 if dtype is torch.bfloat16 else 2e-3 if pv == "fp8" else 1e-3
    for (seq_q, seq_k), scale in itertools.product(SHAPES, (0.3, -0.3)):
        q, k, v = inputs(seq_q, seq_k, dtype, strided=True)
        arguments = MODES[mode] | SMALL | {"pv": pv, "causal": causal, "scale": scale}
        out, lse = sparge_attention(q, k, v, provider="cpu", **arguments)
        want, want_lse = sparge_attention(q, k, v, provider="reference", **arguments)
        assert (out.dtype, out.stride()) == (dtype, torch.empty_like(q).stride())
        assert (out.double() - want.double()).norm() <= limit * want.double().norm(), (seq_q, seq_k)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", backend.PV)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_to_exact_attention_on_the_kept_blocks(provider: str, pv: str, causal: bool, dtype: torch.dtype) -> None:
    for seq, dim in itertools.product((64, 100, 256, 300), (64, 128)):
        q, k, v = inputs(seq, seq, dtype, dim)
        out, lse = sparge_attention(q, k, v, pv=pv, causal=causal, provider=provider)
        lists = sparge_block_map(q, k, causal=causal)
        want, want_lse = over_blocks(q, k, v, mask_of(*lists, -(-seq // 64)), 128, 64, causal, dim**-0.5)
        assert relative_l1(out, want) <= BOUND[pv], (seq, dim)
        assert (lse - want_lse).abs().mean() <= 5e-3


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("causal", [False, True])
def test_everything_kept_is_dense_attention(provider: str, causal: bool) -> None:
    q, k, v = inputs(200, 200, dim=64)
    for arguments in ({"keep_ratio": 1.0}, {"mass": 1.0}, {"similarity": 1.0, "keep_ratio": 0.1}):
        out, _ = sparge_attention(q, k, v, causal=causal, provider=provider, **arguments)
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        assert relative_l1(out, exact.double()) <= BOUND["fp16"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_smoothing_removes_a_large_offset_of_k(provider: str) -> None:
    q, k, v = inputs(256, 256, dim=64)
    k = k + 30 * torch.randn(2, 1, 64).sign()
    blocks = mask_of(*sparge_block_map(q, k), 4)
    for causal in (False, True):
        lists = mask_of(*sparge_block_map(q, k, causal=causal), 4)
        want, _ = over_blocks(q, k, v, lists, 128, 64, causal, 64**-0.5)
        assert relative_l1(sparge_attention(q, k, v, causal=causal, provider=provider)[0], want) <= BOUND["fp16"]
    want, _ = over_blocks(q, k, v, blocks, 128, 64, False, 64**-0.5)
    assert relative_l1(sparge_attention(q, k, v, smooth_k=False, provider=provider)[0], want) > 2 * BOUND["fp16"]


def by_loops(q: Tensor, k: Tensor, v: Tensor, threshold: float, block_q: int, block_k: int) -> tuple[Tensor, int]:
    """The second stage on all blocks, unrounded, one block after the other: one head; also how many were skipped."""
    out, skipped, number = torch.zeros_like(q), 0, -(-len(k) // block_k)
    for rows in range(0, len(q), block_q):
        query = q[rows : rows + block_q]
        top = torch.full((len(query),), -torch.inf, dtype=q.dtype)
        total, acc = torch.zeros_like(top), torch.zeros_like(query)
        for j, (keys, values) in enumerate(zip(k.split(block_k), v.split(block_k), strict=True)):
            scores = query @ keys.T * q.shape[-1] ** -0.5 / math.log(2)
            if j < number - 2 and (scores.amax(1) - top).max() + threshold <= 0:
                skipped += 1
                continue
            new = torch.maximum(top, scores.amax(1))
            weights = torch.exp2(scores - new[:, None])
            decay = torch.exp2(top - new)
            total, acc, top = total * decay + weights.sum(1), acc * decay[:, None] + weights @ values, new
        out[rows : rows + block_q] = acc / total[:, None]
    return out, skipped


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(128, 128), (100, 90)])
def test_second_stage_skips_what_can_add_little(provider: str, seq_q: int, seq_k: int) -> None:
    q, k, v = inputs(seq_q, seq_k)
    direction = torch.randn(32)
    q = q + 2 * direction
    k[:, :, :16] += direction / 2  # the highest scores of every row come first
    numbers = []
    for threshold in (1.0, 5.0, 20.0):
        arguments: dict[str, Any] = {"keep_ratio": 1.0, "provider": provider, **SMALL}
        out, _ = sparge_attention(q, k, v, pv_threshold=threshold, **arguments)
        want, skipped = zip(
            *(
                by_loops(*(x.double() for x in (q[0, h], k[0, h // 2], v[0, h // 2])), threshold, 32, 16)
                for h in range(4)
            ),
            strict=True,
        )
        numbers.append(sum(skipped))
        # A block next to the threshold may fall on the other side of it once q and k are rounded.
        assert relative_l1(out, torch.stack(want).unsqueeze(0)) <= 0.03
        by_head, _ = sparge_attention(q, k, v, pv_thresholds=torch.full((4,), threshold), **arguments)
        assert torch.equal(out, by_head)
    assert numbers[0] > numbers[1] > 0
    plain, _ = sparge_attention(q, k, v, keep_ratio=1.0, provider=provider, **SMALL)
    never, _ = sparge_attention(q, k, v, keep_ratio=1.0, provider=provider, pv_threshold=1e6, **SMALL)
    assert relative_l1(never, plain.double()) < 1e-3


@pytest.mark.parametrize("provider", PROVIDERS)
def test_second_stage_spares_the_last_two_blocks(provider: str) -> None:
    """Only the first block matters; without the last two, the lse would not have their keys."""
    q, k, v = torch.ones(1, 1, 16, 8), torch.zeros(1, 1, 64, 8), torch.randn(1, 1, 64, 8)
    k[:, :, :16] = 1
    arguments: dict[str, Any] = {"keep_ratio": 1.0, "smooth_k": False, "provider": provider}
    _, lse = sparge_attention(q, k, v, pv_threshold=0.0, scale=0.5, block_q=16, block_k=16, **arguments)
    first, rest = 16 * math.exp(4.0), 16.0
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(first + 2 * rest)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", backend.PV)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("position", [32, 40, 63, 64, 100])
def test_a_later_token_changes_no_earlier_block_of_queries(provider: str, pv: str, mode: str, position: int) -> None:
    """Bit for bit: q, k and v from `position` on, against smoothing, scales, selection and the order of sums."""
    q, k, v = inputs(128, 128)
    arguments = MODES[mode] | {"block_q": 32, "block_k": 16, "pv": pv, "causal": True, "provider": provider}
    before = sparge_attention(q, k, v, **arguments)
    q, k, v = (x.clone() for x in (q, k, v))
    q[:, :, position:] += 1
    k[:, :, position:] *= -5
    v[:, :, position:] *= 30
    earlier = position // 32 * 32
    for old, new in zip(before, sparge_attention(q, k, v, **arguments), strict=True):
        assert torch.equal(old[:, :, :earlier], new[:, :, :earlier])
        assert not torch.equal(old, new)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_later_keys_change_no_earlier_row_of_their_block(provider: str) -> None:
    """Beyond the first block of queries, later k and v in FP16 change nothing, token by token."""
    q, k, v = inputs(128, 128)
    arguments: dict[str, Any] = {"causal": True, "provider": provider, "keep_ratio": 0.3, **SMALL}
    before = sparge_attention(q, k, v, **arguments)
    for position in (41, 50, 90, 127):
        later_k, later_v = k.clone(), v.clone()
        later_k[:, :, position:] *= -5
        later_v[:, :, position:] *= 30
        for old, new in zip(before, sparge_attention(q, later_k, later_v, **arguments), strict=True):
            assert torch.equal(old[:, :, :position], new[:, :, :position])


def test_fp8_scales_of_v_grow_only_under_causal() -> None:
    v = torch.arange(1.0, 65.0).view(1, 1, 64, 1)
    _, growing = round_v_fp8(v, block_k=16, causal=True)
    torch.testing.assert_close(growing.flatten() * 448, torch.tensor([16.0, 32.0, 48.0, 64.0]))
    _, one = round_v_fp8(v, block_k=16, causal=False)
    torch.testing.assert_close(one.flatten() * 448, torch.full((4,), 64.0))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_without_a_key(provider: str) -> None:
    q, k, v = inputs(5, 0)
    out, lse = sparge_attention(q, k, v, provider=provider)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert sparge_attention(k, q[:, :2], q[:, :2], provider=provider)[0].shape == (1, 2, 0, 32)
    index, count = sparge_block_map(q, k)
    assert (index.shape, count.tolist()) == ((1, 4, 1, 0), [[[0]] * 4])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", backend.PV)
def test_zeros_do_no_harm(provider: str, pv: str) -> None:
    q, k, v = inputs()
    v[..., 7] = 0
    q[:, :, :32] = 0
    arguments: dict[str, Any] = {"pv": pv, "provider": provider, **SMALL}
    for keys in (k, torch.zeros_like(k)):
        out, lse = sparge_attention(q, keys, v, mass=0.9, similarity=0.1, **arguments)
        assert out.isfinite().all()
        assert lse.isfinite().all()
        assert not out[..., 7].any()
    # Blocks of zeros are similar to nothing, so that all are kept.
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(128)))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nan_reaches_the_output(provider: str) -> None:
    q, k, v = inputs()
    k[0, 0, 40, 0] = torch.nan
    for arguments in ({"keep_ratio": 0.2}, {"mass": 0.1}):
        out, _ = sparge_attention(q, k, v, smooth_k=False, provider=provider, **arguments, **SMALL)
        assert out[0, :2].isnan().all()
        assert out[0, 2:].isfinite().all()


def test_the_map_has_the_density_and_the_blocks() -> None:
    q, k, _ = inputs(256, 256)
    index, count = sparge_block_map(q, k, keep_ratios=torch.tensor([0.25, 0.5, 0.5, 0.75]), **SMALL)
    assert index.dtype is count.dtype is torch.int32
    lists = BlockIndex(index, count, 32, 16, 256, 256)
    assert lists.density == pytest.approx(0.5)
    assert float(count.sum() / (count.numel() * lists.nk)) == pytest.approx(0.5)


def test_thresholds_are_not_rounded_to_the_dtype_of_q() -> None:
    """0.501 is 0.5 in bf16: of 500 blocks 250 would be kept, not 251."""
    q, k = (torch.randn(1, 2, tokens, 8).bfloat16() for tokens in (16, 4000))
    _, count = sparge_block_map(q, k, keep_ratios=torch.tensor(0.502), block_k=8)
    assert (count == 251).all()
    with torch.autocast("cpu", torch.bfloat16):
        _, count = sparge_block_map(q.float(), k.float(), keep_ratios=torch.tensor(0.502), block_k=8)
    assert (count == 251).all()


def test_autocast_is_that_of_the_cast_inputs() -> None:
    q, k, v = inputs(seq_q=117, seq_k=117)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = sparge_attention(q, k, v, mass=0.5, **SMALL)
        lists = sparge_block_map(q, k, mass=0.5, **SMALL)
    assert torch.equal(out, sparge_attention(*(x.bfloat16() for x in (q, k, v)), mass=0.5, **SMALL)[0])
    for got, want in zip(lists, sparge_block_map(q.bfloat16(), k.bfloat16(), mass=0.5, **SMALL), strict=True):
        assert torch.equal(got, want)


def test_inputs_stay_as_they_were() -> None:
    for dtype, pv in itertools.product(DTYPES, backend.PV):
        given = inputs(dtype=dtype)
        before = [x.clone() for x in given]
        sparge_attention(*given, scale=-0.2, pv=pv, pv_threshold=1.0, **SMALL)
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(provider: str, dtype: torch.dtype, strided: bool) -> None:
    given = inputs(33, 33, dtype, 16, strided)
    full = {
        **MODES["per head"],
        "keep_ratios": torch.tensor(0.5),
        "sink": True,
        "causal": True,
        "pv": "fp8",
        "scale": 0.5,
        "block_q": 16,
        "block_k": 16,
        "smooth_k": False,
    }
    for arguments in ({}, full):
        torch.library.opcheck(OP, given, {**arguments, "provider": provider})
    del full["pv_thresholds"], full["pv"]
    torch.library.opcheck(MAP, given[:2], full)


def test_defaults_are_those_of_the_schema() -> None:
    for function in (backend._forward, backend._check, sparge_attention):
        assert same_defaults(OP, function) == []
    assert same_defaults(MAP, sparge_block_map) == []


def test_one_graph_serves_all_lengths_and_thresholds() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, k: Tensor, v: Tensor, mass: Tensor) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = {"masses": mass, "causal": True, **SMALL}
        return *OP(q, k, v, **arguments), MAP(q, k, **arguments)[1]

    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for tokens, mass in itertools.product((100, 128, 200), (0.3, 0.9)):
        given = *inputs(tokens, tokens), torch.tensor(mass)
        for got, want in zip(compiled(*given), attend(*given), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"keep_ratio": 1.5}, "keep_ratio must be in 0 ... 1, got 1.5"),
        ({"mass": -0.1}, "mass must be in 0 ... 1, got -0.1"),
        ({"similarity": 2.0}, "similarity must be in -1 ... 1, got 2.0"),
        ({"pv_threshold": -1.0}, "pv_threshold must be in 0 ... 1e[+]06, got -1.0"),
        ({"block_q": 0}, "block_q must be at least 1, got 0"),
        ({"pv": "int8"}, "pv must be one of fp16, fp8, got 'int8'"),
        ({"masses": torch.ones(4).bfloat16()}, "masses must be float32, whatever q is, got bfloat16"),
        ({"masses": torch.ones(2)}, r"masses must have shape \(\) or \(4,\), one per head of q, got \(2,\)"),
        ({"keep_ratios": torch.ones((), requires_grad=True)}, "keep_ratios must not require a gradient"),
        ({"similarities": torch.ones((), device="meta")}, "similarities must be on q's device cpu, got meta"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        sparge_attention(*inputs(), **arguments)


def a_call(**changes: Any) -> AttentionCall:
    params = dict(backend.BACKEND.complete(())) | changes.pop("params", {})
    call = {"batch": 1, "heads": 8, "kv_heads": 8, "seq_q": 4096, "seq_k": 4096, "head_dim": 128}
    return AttentionCall(**{**call, "dtype": torch.bfloat16, "device": "cuda", **changes}, params=tuple(params.items()))


@pytest.mark.parametrize(
    ("machine", "params", "changes", "sentence"),
    [
        ("sm80", {}, {}, None),
        ("sm80", {"pv": "fp8"}, {}, 'pv="fp8" needs sm89 or newer'),
        ("sm90", {"pv_threshold": 5.0}, {}, None),
        ("sm90", {"pv_threshold": 5.0}, {"head_dim": 160}, "head_dim up to 128"),
        ("sm100", {"pv_threshold": 5.0}, {}, "head_dim up to 64"),
        ("sm90", {"pv_threshold": 5.0, "block_k": 128}, {}, "pv_threshold with blocks of 128 x 128"),
        ("sm90", {"block_k": 128}, {}, None),
    ],
)
def test_what_triton_cannot(
    machine: str, params: dict[str, Any], changes: dict[str, Any], sentence: str | None
) -> None:
    reasons = backend.BACKEND.provider("triton").reasons(a_call(params=params, **changes), Capability.of(machine))
    assert reasons == [] if sentence is None else any(sentence in reason for reason in reasons)


@pytest.mark.parametrize(
    ("machine", "params", "changes", "sentence"),
    [
        ("sm89", {"pv": "fp8"}, {}, None),
        ("sm80", {}, {}, None),
        ("sm89", {}, {}, 'has kernels for pv="fp8" only on sm89'),
        ("sm90", {"pv": "fp8"}, {}, "blocks of 128 x 64, on sm90 it has 64 x 128"),
        ("sm90", {"pv": "fp8", "block_q": 64, "block_k": 128}, {}, None),
        ("sm80", {"smooth_k": False}, {}, "smooth_k=False fails in the package"),
        ("sm80", {}, {"causal": True}, "causal attention is not supported"),
    ],
)
def test_what_the_package_cannot(
    machine: str, params: dict[str, Any], changes: dict[str, Any], sentence: str | None
) -> None:
    provider = backend.BACKEND.provider("spas_sage_attn")
    reasons = provider.reasons(a_call(params=params, **changes), Capability.of(machine, {"spas_sage_attn": "0.1.0"}))
    assert reasons == [] if sentence is None else any(sentence in reason for reason in reasons)


def test_the_package_gets_our_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        given.update(arguments, block_map=block_map)
        return q, q[..., 0]

    q, k, v = inputs(300, 300)
    monkeypatch.setattr(spas_sage_attn, "load", lambda: attend)
    how, threshold, pv, scale, _ = backend._check(q, k, v, mass=0.5, pv_threshold=3.0)
    on_map(spas_sage_attn.load())(q, k, v, how=how, pv_threshold=threshold, pv=pv, scale=scale)
    assert torch.equal(given["block_map"], mask_of(*sparge_block_map(q, k, mass=0.5), 5))
    assert (given["scale"], given["pv_threshold"]) == (32**-0.5, 3.0)


def test_reasons_reach_a_direct_call() -> None:
    q, k, v = inputs(dim=257)
    with pytest.raises(UnsupportedError, match="head_dim 257, not 1 to 256"):
        sparge_attention(q, k, v)
    call = AttentionCall(1, 4, 4, 4096, 77, 64, kind="cross")
    assert backend.BACKEND.reasons(call, Capability.of("cpu")) == ["cross-attention: 4096 queries, 77 keys"]


@pytest.mark.parametrize(
    ("machine", "seq", "params", "pays"),
    [
        ("cpu", 2048, {}, False),
        ("cpu", 4096, {}, True),
        ("cpu-avx2", 512, {}, False),
        ("cpu-avx2", 1024, {}, True),
        ("cpu-avx512", 256, {}, False),
        ("cpu-avx512", 512, {}, True),
        ("cpu-avx512", 4096, {"pv": "fp8"}, False),
        ("cpu-avx512", 4096, {"pv_threshold": 10.0}, False),
        ("sm90", 512, {"pv": "fp8"}, True),
    ],
)
def test_break_even(machine: str, seq: int, params: dict[str, Any], pays: bool) -> None:
    capability, ask = Capability.of(machine), backend.BACKEND.break_even
    assert ask is not None
    call = a_call(seq_q=seq, seq_k=seq, device=capability.device, params=params)
    assert (ask(call, capability) is None) == pays
