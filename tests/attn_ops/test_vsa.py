"""video_sparse_attention: the chosen tiles, the two branches, and the contract of the op."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from support.attention_model import SelfAttention, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import sparseattn
from sparseattn.attn_ops.backends import vsa as backend
from sparseattn.attn_ops.blocks.tile_selection import TilePlan
from sparseattn.attn_ops.blocks.tiles import Tiling
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import ArgumentError, UnsupportedError
from sparseattn.attn_ops.op import same_defaults
from sparseattn.attn_ops.reference import vsa as reference
from sparseattn.attn_ops.video_layout import VideoLayout

OP = torch.ops.sparseattn.video_sparse_attention
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one call."""

    grid: tuple[int, int, int] = (4, 6, 8)
    tile: tuple[int, int, int] = (2, 2, 4)
    heads: tuple[int, int] = (2, 2)
    text: int = 0
    text_first: bool = False
    kv_grid: tuple[int, int, int] | None = None
    batch: int = 1
    dim: int = 16
    sparsity: float = 0.7

    @property
    def plan(self) -> TilePlan:
        queries, keys = (
            Tiling(VideoLayout(grid, self.text, self.text_first), self.tile)
            for grid in (self.grid, self.kv_grid or self.grid)
        )
        return TilePlan(queries, keys, False, self.sparsity, 0.4)

    @property
    def settings(self) -> dict[str, Any]:
        text = {"text_tokens": self.text, "text_first": self.text_first}
        grids = {"grid": self.grid, "kv_grid": self.kv_grid}
        return {**grids, **text, "tile": self.tile, "sparsity": self.sparsity, "scale": 0.4}

    def inputs(self, dtype: torch.dtype = torch.float32, *, strided: bool = False, factor: float = 1.0) -> list[Tensor]:
        """q, k, v and gate."""
        seq_q, seq_k = self.plan.queries.layout.tokens, self.plan.keys.layout.tokens
        shapes = [(self.heads[0], seq_q), *[(self.heads[1], seq_k)] * 2, (self.heads[0], seq_q)]
        if strided:
            return [(factor * torch.randn(self.batch, s, h, self.dim)).to(dtype).transpose(1, 2) for h, s in shapes]
        return [(factor * torch.randn(self.batch, h, s, self.dim)).to(dtype) for h, s in shapes]


CASES = {
    "full tiles": Case(),
    "short tiles": Case(grid=(5, 6, 7)),
    "grouped heads": Case(grid=(5, 6, 7), heads=(4, 2)),
    "batch of three": Case(grid=(3, 4, 5), batch=3),
    "text last": Case(grid=(5, 6, 7), text=9),
    "text first": Case(grid=(3, 5, 8), text=21, text_first=True, heads=(4, 2)),
    "image": Case(grid=(1, 9, 12), tile=(1, 4, 4)),
    "cross": Case(grid=(2, 4, 6), kv_grid=(5, 4, 6)),
    "cross with text": Case(grid=(4, 4, 7), kv_grid=(2, 3, 4), text=5, text_first=True),
    "one tile": Case(grid=(2, 2, 3), tile=(4, 4, 4)),
}


def numbers_of_tiles(grid: tuple[int, int, int], tile: tuple[int, int, int], text: int, first: bool) -> Tensor:
    """The number of every token's tile, token by token; text comes last in the numbering whatever its place."""
    counts = [-(-n // size) for n, size in zip(grid, tile, strict=True)]
    video = []
    for position in product(*map(range, grid)):
        t, h, w = (p // size for p, size in zip(position, tile, strict=True))
        video.append((t * counts[1] + h) * counts[2] + w)
    volume, videos = tile[0] * tile[1] * tile[2], counts[0] * counts[1] * counts[2]
    of_text = [videos + i // volume for i in range(text)]
    return torch.tensor([*of_text, *video] if first else [*video, *of_text])


def by_the_paper(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, case: Case) -> tuple[Tensor, Tensor]:
    """Equations of 2505.13389 in fp64 with a dense mask, one head at a time, differentiable by autograd.

    Text as an extension: all of its tiles are kept, and its queries see everything.
    """
    number_q = numbers_of_tiles(case.grid, case.tile, case.text, case.text_first)
    number_k = numbers_of_tiles(case.kv_grid or case.grid, case.tile, case.text, case.text_first)
    videos = int(numbers_of_tiles(case.kv_grid or case.grid, case.tile, 0, False).max()) + 1
    videos_q = int(numbers_of_tiles(case.grid, case.tile, 0, False).max()) + 1
    keep = max(1, math.ceil((1 - case.sparsity) * videos))
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for b, h in product(range(q.shape[0]), range(q.shape[1])):
        query, key, value = q[b, h], k[b, h // group], v[b, h // group]
        means = [
            torch.stack([x[number == i].mean(dim=0) for i in range(int(number.max()) + 1)])
            for x, number in ((query, number_q), (key, number_k), (value, number_k))
        ]
        scores = means[0] @ means[1].T * 0.4
        mask = torch.ones_like(scores, dtype=torch.bool)
        for row in range(videos_q):
            order = sorted(range(videos), key=lambda i: (-scores[row, i].item(), i))
            mask[row, order[keep:]] = False
        logits = (query @ key.T * 0.4).masked_fill(~mask[number_q][:, number_k], -torch.inf)
        lses.append(logits.logsumexp(dim=-1))
        result = logits.softmax(dim=-1) @ value
        if gate is not None:
            result = result + gate[b, h] * (scores.softmax(dim=-1) @ means[2])[number_q]
        outs.append(result)
    return torch.stack(outs).view_as(q), torch.stack(lses).view(q.shape[:-1])


def relative(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gated", [False, True])
def test_reference_is_the_paper(name: str, gated: bool) -> None:
    case = CASES[name]
    given = [x.double() for x in case.inputs()]
    gate = given.pop()
    leaves = [x.requires_grad_() for x in ([*given, gate] if gated else given)]
    out, lse = reference.video_sparse_attention(*given, gate if gated else None, None, plan=case.plan)
    exact, exact_lse = by_the_paper(*given, gate if gated else None, case)
    torch.testing.assert_close(out, exact, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-11, atol=1e-11)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    wanted = torch.autograd.grad((exact, exact_lse), leaves, (grad_out, grad_lse))
    grads = reference.video_sparse_attention_backward(
        *(grad_out, grad_lse, out, lse, *given, gate if gated else None, None), plan=case.plan
    )
    for grad, want in zip(grads, wanted, strict=False):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-10)
    assert grads[3].numel() == (gate.numel() if gated else 0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_forward_and_backward(name: str, dtype: torch.dtype, gated: bool, strided: bool) -> None:
    check(CASES[name], CASES[name].inputs(dtype, strided=strided), gated)


@pytest.mark.parametrize("factor", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("gated", [False, True])
def test_input_scales(factor: float, gated: bool) -> None:
    check(CASES["short tiles"], CASES["short tiles"].inputs(factor=factor), gated)


def test_means_and_scores_of_tiles_are_fp32() -> None:
    """Published ones are halves: most rows then have equals at the edge of what is kept."""
    case = Case(grid=(8, 8, 8), tile=(2, 2, 2), sparsity=0.5)
    q, k, v, _ = case.inputs(torch.bfloat16)
    _, lse = OP(q, k, v, **case.settings)
    wanted = by_the_paper(q.double(), k.double(), v.double(), None, case)[1]
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-5, atol=1e-4)
    queries, keys = case.plan.queries, case.plan.keys
    means = [t.to_tiles(x).unflatten(2, (-1, 8)).mean(3) for t, x in ((queries, q), (keys, k))]
    edge = (means[0] @ means[1].mT).sort(dim=-1, descending=True).values[..., 31:33]
    assert (edge[..., 0] == edge[..., 1]).any()


def check(case: Case, inputs: list[Tensor], gated: bool) -> None:
    """The op with its default provider against the reference in fp64, forward and all gradients."""
    given = inputs if gated else inputs[:3]
    leaves = [x.detach().requires_grad_() for x in given]
    out, lse = OP(*leaves, **case.settings)
    doubles = [x.double() for x in given] + [None] * (5 - len(given))
    exact, exact_lse = reference.video_sparse_attention(*doubles, plan=case.plan)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    exact_grads = reference.video_sparse_attention_backward(
        grad_out.double(), grad_lse.double(), exact, exact_lse, *doubles, plan=case.plan
    )
    assert out.stride() == torch.empty_like(given[0]).stride()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    for value, wanted, like in zip((out.detach(), *grads), (exact, *exact_grads), (given[0], *given), strict=False):
        assert value.dtype is like.dtype
        assert value.stride() == torch.empty_like(like).stride()
        assert relative(value, wanted) < TOLERANCE[value.dtype]


@pytest.mark.parametrize("name", CASES)
def test_nothing_left_out_is_dense_attention(name: str) -> None:
    case = dataclasses.replace(CASES[name], sparsity=0.0)
    q, k, v, _ = case.inputs()
    out, _ = OP(q, k, v, **case.settings)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(out, exact)


def test_equal_scores_attend_to_the_number_of_tiles() -> None:
    case = Case()
    q, k, v, _ = case.inputs()
    _, lse = OP(torch.zeros_like(q), k, v, **case.settings)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(4 * 16)))


def test_gates() -> None:
    case = CASES["short tiles"]
    q, k, v, gate = case.inputs()
    none, zero, one, two = (OP(q, k, v, g, **case.settings)[0] for g in (None, gate * 0, gate * 0 + 1, gate * 0 + 2))
    assert torch.equal(none, zero)
    torch.testing.assert_close(two - one, one - none)
    assert (one - none).abs().max() > 0.01
    gates = gate.requires_grad_()
    out, _ = OP(q, k, v, gates, **case.settings)
    (grad,) = torch.autograd.grad(out, gates, torch.ones_like(out))
    torch.testing.assert_close(grad, one - none)


def test_text_is_always_seen_and_sees_everything() -> None:
    case = dataclasses.replace(CASES["text first"], sparsity=1.0)
    q, k, v, _ = case.inputs()
    out, lse = OP(q, k, v, **case.settings)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(out[:, :, :21], dense[:, :, :21])
    of_text = (0.4 * q @ k[:, :, :21].repeat_interleave(2, dim=1).mT).logsumexp(dim=-1)
    assert (lse[:, :, 21:] > of_text[:, :, 21:]).all()
    keys = k.clone()
    keys[:, :, 0] += 1
    assert (OP(q, keys, v, **case.settings)[1] != lse).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("provider", ["cpu", "reference"])
def test_tile_order_in_and_out(name: str, gated: bool, provider: str) -> None:
    """The same numbers, whatever the padding holds; 0 in the padding of out and of the gradients."""
    case = CASES[name]
    settings = {**case.settings, "provider": provider}
    queries, keys = case.plan.queries, case.plan.keys
    tilings = (queries, keys, keys, queries)[: 3 + gated]
    given = [x.requires_grad_() for x in case.inputs()[: 3 + gated]]
    out, lse = OP(*given, **settings)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), given, (grad_out, grad_lse))
    tiled = [
        tiling.fill_padding(tiling.to_tiles(x), torch.nan).detach().requires_grad_()
        for tiling, x in zip(tilings, given, strict=True)
    ]
    tiled_out, tiled_lse = OP(*tiled, **settings, tiled=True)
    tiled_grads = torch.autograd.grad(
        (tiled_out, tiled_lse),
        tiled,
        (queries.fill_padding(queries.to_tiles(grad_out), torch.nan), queries.to_tiles(grad_lse, -1)),
    )
    assert torch.equal(tiled_lse, queries.fill_padding(queries.to_tiles(lse, -1), -torch.inf, -1))
    for value, wanted, tiling in zip((tiled_out, *tiled_grads), (out, *grads), (queries, *tilings), strict=True):
        assert torch.equal(value, tiling.to_tiles(wanted))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["full tiles", "text first"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(name: str, dtype: torch.dtype, requires_grad: bool, strided: bool) -> None:
    case = dataclasses.replace(CASES[name], dim=8)
    given = [x.requires_grad_(requires_grad) for x in case.inputs(dtype, strided=strided)]
    extra = [torch.tensor(0.5)] if dtype is torch.float32 else []
    tolerance = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.library.opcheck(OP.default, (*given, *extra), case.settings, **tolerance)


def test_opcheck_without_a_gate_and_in_tile_order() -> None:
    case = CASES["short tiles"]
    given = [x.requires_grad_() for x in case.inputs(strided=True)[:3]]
    torch.library.opcheck(OP.default, tuple(given), case.settings)
    tiled = [case.plan.keys.to_tiles(x).detach().requires_grad_() for x in given]
    torch.library.opcheck(OP.default, tuple(tiled), {**case.settings, "tiled": True})


def test_defaults_are_those_of_the_schema_and_the_spec() -> None:
    for function in (backend._forward, backend._check, backend.video_sparse_attention):
        assert same_defaults(OP.default, function) == []


def test_a_schedule_does_not_compile_again() -> None:
    case = CASES["short tiles"]
    given = [x.requires_grad_() for x in case.inputs()[:3]]
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, sparsities: Tensor) -> Tensor:
        return OP(q, k, v, None, sparsities, **case.settings)[0]

    for sparsity in (0.9, 0.7, 0.3, 0.0):
        out = attend(*given, torch.tensor(sparsity))
        settings = {**case.settings, "sparsity": sparsity}
        eager = OP(*given, **settings)[0]
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), given), torch.autograd.grad(eager.sum(), given), rtol=1e-5, atol=1e-5
        )
    assert counter.frame_count == 1


def test_every_head_may_have_its_own_sparsity() -> None:
    case = CASES["grouped heads"]
    q, k, v, _ = case.inputs()
    out, _ = OP(q, k, v, None, torch.tensor([0.9, 0.7, 0.3, 0.0]), **case.settings)
    for head, sparsity in enumerate((0.9, 0.7, 0.3, 0.0)):
        alone, _ = OP(q, k, v, **{**case.settings, "sparsity": sparsity})
        torch.testing.assert_close(out[:, head], alone[:, head])


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_in_one_graph(dynamic: bool | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=dynamic)
    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return OP(q, k, v, gate, grid=(3, 4, 4), tile=(2, 2, 2), sparsity=0.5)[0]

    for batch in (3, 5):
        given = [torch.randn(batch, 2, 48, 8, requires_grad=True) for _ in range(4)]
        out, eager = attend(*given), OP(*given, grid=(3, 4, 4), tile=(2, 2, 2), sparsity=0.5)[0]
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), given), torch.autograd.grad(eager.sum(), given))
    if dynamic:
        assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("text", [0, 16])
def test_rewritten_by_a_rule(dynamic: bool, text: int) -> None:
    layout = {"grid": [3, 4, 4], "text_tokens": text}
    rule = {"use": "vsa", "layout": layout, "mode": "require", "params": {"tile": [2, 2, 2], "keep_ratio": 0.5}}
    model, x = SelfAttention(scale=0.3), tokens(length=48 + text)
    options = {"policy": {"rules": [rule]}, "inner_backend": "aot_eager"}
    compiled = torch.compile(model, backend="sparseattn", fullgraph=True, dynamic=dynamic, options=options)
    out = compiled(x)
    assert dict(sparseattn.last_report().chosen) == {"vsa": 1}

    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in model.qkv(x).chunk(3, dim=-1))
    direct, _ = OP(q, k, v, grid=(3, 4, 4), text_tokens=text, tile=(2, 2, 2), sparsity=0.5, scale=0.3)
    torch.testing.assert_close(out, direct.transpose(1, 2).flatten(2))
    grads = torch.autograd.grad(out.square().sum(), tuple(model.parameters()))
    wanted = torch.autograd.grad(direct.square().sum(), tuple(model.parameters()))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match=rf"3x4x4.* makes {48 + text} tokens, the sequence has 40"):
        compiled(tokens(length=40))


def test_autocast_casts_the_gate_too() -> None:
    case = CASES["short tiles"]
    given = case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = OP(*given, **case.settings)
    assert torch.equal(out, OP(*(x.bfloat16() for x in given), **case.settings)[0])


def test_inputs_are_not_modified() -> None:
    case = CASES["text last"]
    given = [x.requires_grad_() for x in case.inputs()]
    before = [x.detach().clone() for x in given]
    out, lse = OP(*given, **case.settings)
    torch.autograd.grad(out.square().sum() + lse.sum(), given)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_a_nan_reaches_the_output_of_its_sequence_only() -> None:
    case = CASES["batch of three"]
    q, k, v, _ = case.inputs()
    k[0, 0, 7] = torch.nan
    out, _ = OP(q, k, v, **case.settings)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()
    assert out[1:].isfinite().all()


def test_reasons_of_the_vendor_kernel() -> None:
    provider = backend.BACKEND.provider("fastvideo_kernel")
    machine = Capability.of("sm90", {"fastvideo_kernel": "0.3.2"})

    def reasons(tile: tuple[int, int, int] = (4, 4, 4), batch: int = 1, **changes: Any) -> str:
        call = AttentionCall(batch, 4, 4, 4096, 4096, 128, torch.bfloat16, "cuda", params=(("tile", tile),))
        return "; ".join(provider.reasons(dataclasses.replace(call, **changes), machine))

    assert reasons() == reasons((2, 8, 8)) == reasons((4, 8, 8)) == ""
    assert "tiles of 48 tokens, its kernel takes multiples of 64" in reasons((3, 4, 4))
    assert "batch 2" in reasons(batch=2)
    assert "head_dim 80" in reasons(head_dim=80)
    assert "gradient" in reasons(needs_grad=True)
    assert "float32" in reasons(dtype=torch.float32)


def test_what_a_policy_is_told() -> None:
    cpu = Capability.of("cpu")
    video = AttentionCall(1, 4, 4, 64, 64, 64, layout=VideoLayout((4, 4, 4)))
    assert backend.BACKEND.reasons(video, cpu) == []
    assert "the token grid is not known" in backend.BACKEND.reasons(dataclasses.replace(video, layout=None), cpu)[0]
    assert "makes 64 tokens, the sequence has 65" in " ".join(
        backend.BACKEND.reasons(dataclasses.replace(video, seq_q=65, seq_k=65), cpu)
    )
    assert backend.BACKEND.reasons(dataclasses.replace(video, causal=True), cpu) == [
        "causal attention is not supported"
    ]
    cross = dataclasses.replace(video, seq_k=77, kind="cross")
    assert "cross-attention: 64 queries, 77 keys" in backend.BACKEND.reasons(cross, cpu)


@pytest.mark.parametrize(
    ("grid", "sparsity", "pays"),
    [
        ((4, 8, 8), 0.9, False),
        ((4, 8, 16), 0.9, False),
        ((4, 16, 16), 0.5, True),
        ((5, 17, 18), 0.8, True),
        ((5, 17, 18), 0.7, False),
    ],
)
def test_where_it_pays(grid: tuple[int, int, int], sparsity: float, pays: bool) -> None:
    ask, seq = backend.BACKEND.break_even, math.prod(grid)
    assert ask is not None
    params = (("sparsity", sparsity), ("tile", (4, 4, 4)))
    call = AttentionCall(1, 4, 4, seq, seq, 64, layout=VideoLayout(grid), params=params)
    answer = ask(call, Capability.of("cpu"))
    assert answer is None if pays else f"{seq} tokens" in answer
    assert ask(call, Capability.of("sm90")) is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"grid": (4, 6, 9)}, r"grid must make the 192 tokens of the sequence, got 4 \* 6 \* 9 = 216"),
        ({"text_tokens": 8}, r"got 4 \* 6 \* 8 \+ 8 of text = 200"),
        ({"tiled": True, "grid": (5, 6, 8)}, r"240 tokens in 18 tiles of 16 = 288 places"),
        ({"kv_grid": (4, 6, 7)}, r"kv_grid must make the 192 tokens of the sequence, got 4 \* 6 \* 7 = 168"),
        ({"tile": (4, 4)}, "tile must be three positive ints"),
        ({"sparsity": 1.5}, "sparsity must be in 0 ... 1, got 1.5"),
        ({"sparsities": torch.zeros(3)}, r"sparsities must be floating point of shape \(\) or \(2,\)"),
        ({"sparsities": torch.tensor(1)}, "sparsities must be floating point"),
        ({"gate": torch.zeros(1, 2, 192, 8)}, "gate must be like q"),
        ({"gate": torch.zeros(1, 2, 192, 16).half()}, "gate must be like q"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], says: str) -> None:
    case = Case()
    q, k, v, _ = case.inputs()
    with pytest.raises(ArgumentError, match=says):
        OP(q, k, v, **{**case.settings, **wrong})


def test_more_mistakes() -> None:
    case = Case()
    q, k, v, _ = case.inputs()
    with pytest.raises(ArgumentError, match=r"kv_grid must make the 100 tokens of the sequence, got 4 \* 6 \* 8 = 192"):
        OP(q, k[:, :, :100], v[:, :, :100], **case.settings)
    with pytest.raises(UnsupportedError, match="needs a cuda device"):
        OP(q, k, v, **case.settings, provider="triton")


def test_typed_wrapper_and_empty_batch() -> None:
    case = CASES["text last"]
    given = case.inputs()
    for provider in ("auto", "reference"):
        torch.testing.assert_close(
            backend.video_sparse_attention(*given, **case.settings, provider=provider), OP(*given, **case.settings)
        )
    out, lse = OP(*(x[:0] for x in given), **case.settings)
    assert out.shape == (0, *given[0].shape[1:])
    assert lse.shape == out.shape[:-1]
