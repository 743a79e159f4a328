"""vmoba_attention: attention to the chosen chunks, regrouped or not, and the contract of the op."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.attention_model import Blocks, tokens
from support.graphs import fresh_dynamo  # noqa: F401  (a fixture)
from support.video_chunks import CHOICES, CHUNKS, arguments, inputs, rule_of, tiling_of
from torch._dynamo.testing import CompileCounterWithBackend

import sparseattn
from sparseattn import Policy, Rule, VideoLayout
from sparseattn.attn_ops.backends import vmoba as backend
from sparseattn.attn_ops.blocks.tiles import Tiling
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.attn_ops.kernels import chunk_rows
from sparseattn.attn_ops.op import same_defaults
from sparseattn.attn_ops.reference import vmoba as reference

OP = torch.ops.sparseattn.vmoba_attention


@pytest.mark.parametrize("choice", CHOICES)
def test_videos_of_a_batch_do_not_see_each_other(choice: str) -> None:
    given = inputs("both")
    out, _ = OP(*given, **arguments("both", choice))
    for item in range(2):
        alone, _ = OP(*(x[item : item + 1] for x in given), **arguments("both", choice))
        torch.testing.assert_close(out[item : item + 1], alone)


def test_more_chunks_than_a_video_has_leak_nothing() -> None:
    q, k, v = inputs("temporal")
    wanted = arguments("temporal", "topk head_global", compat=True) | {"topk": 5}
    out, _ = OP(q, k, v, **wanted)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_topk_1_is_dense_attention_upstream() -> None:
    q, k, v = inputs("spatial")
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(OP(q, k, v, **arguments("spatial", "topk 1", compat=True))[0], dense)
    assert not torch.allclose(OP(q, k, v, **arguments("spatial", "topk 1"))[0], dense, atol=1e-2)


@pytest.mark.parametrize("kind", ["query_head", "block", "overall", "head_global"])
def test_a_threshold_of_1_is_dense_attention(kind: str) -> None:
    q, k, v = inputs("both")
    out, _ = OP(q, k, v, **arguments("both", f"0.3 {kind}") | {"threshold": 1.0})
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_tokens_per_chunk_that_are_no_whole_frames() -> None:
    given = inputs("temporal")
    out, _ = OP(*given, grid=(6, 4, 5), chunk_tokens=50, topk=2)
    tiling = Tiling(VideoLayout((120, 1, 1)), (50, 1, 1))
    exact, _ = reference.vmoba_attention(*given, tiling=tiling, rule=rule_of("topk"), scale=0.25)
    torch.testing.assert_close(out, exact)
    whole, _ = OP(*given, grid=(6, 4, 5), chunk_tokens=40, topk=2)
    torch.testing.assert_close(whole, OP(*given, **arguments("temporal", "topk"))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("chunks", "choice"),
    [
        *itertools.product(CHUNKS, ["topk", "0.3 query_head"]),
        *itertools.product(["short last chunk", "clipped"], ["topk 1", "topk overall", "0.3 block", "0.3 head_global"]),
    ],
)
@pytest.mark.parametrize("strided", [False, True])
def test_forward_and_backward(chunks: str, choice: str, dtype: torch.dtype, strided: bool) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    given = inputs(chunks, dtype, strided, heads=(4, 2))
    leaves = [x.detach().requires_grad_() for x in given]
    out, lse = OP(*leaves, **arguments(chunks, choice), scale=0.4)
    definition = {"tiling": tiling_of(chunks), "rule": rule_of(choice), "scale": 0.4}
    exact, exact_lse = reference.vmoba_attention(*(x.double() for x in given), **definition)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    exact_grads = reference.vmoba_attention_backward(
        *(x.double() for x in (grad_out, grad_lse, exact, exact_lse, *given)), **definition
    )
    assert out.stride() == torch.empty_like(given[0]).stride()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    for value, wanted in zip((out.detach(), *grads), (exact, *exact_grads), strict=True):
        assert value.dtype is dtype
        assert float((value.double() - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(("choice", "compat"), [("topk", False), ("topk 1", False), ("topk 1", True)])
def test_regrouped_queries(chunks: str, choice: str, compat: bool, strided: bool, dtype: torch.dtype) -> None:
    """The form that the Triton provider takes, over the CPU provider of block_sparse_attention."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    q, k, v = inputs(chunks, dtype, strided, heads=(4, 2))
    definition = {"tiling": tiling_of(chunks), "rule": rule_of(choice, compat), "scale": 0.4}
    out, lse = chunk_rows.attention(q, k, v, **definition, provider="cpu")
    exact, exact_lse = reference.vmoba_attention(q.double(), k.double(), v.double(), **definition)
    assert out.stride() == torch.empty_like(q).stride()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    for with_lse in (grad_lse, None):
        given = (grad_out, with_lse, out, lse, q, k, v)
        grads = chunk_rows.attention_backward(*given, **definition, provider="cpu")
        doubles = [None if x is None else x.double() for x in (grad_out, with_lse, exact, exact_lse, q, k, v)]
        exact_grads = reference.vmoba_attention_backward(*doubles, **definition)
        for value, wanted in zip((out, *grads), (exact, *exact_grads), strict=True):
            assert value.dtype is dtype
            assert float((value.double() - wanted).norm() / wanted.norm()) < tolerance


def test_regrouped_queries_have_one_shape_whatever_is_chosen() -> None:
    _, k, _ = inputs("both")
    tiling, rule = tiling_of("both"), rule_of("topk")
    spread, crowd = torch.randn_like(k), torch.ones_like(k) * 9 * k[:, :, :1]
    rows = [chunk_rows._regroup(q, tiling.to_tiles(k), tiling, rule) for q in (spread, crowd)]
    assert rows[0].query.shape == rows[1].query.shape
    for made in rows:
        assert (made.used.sum(dim=-1) == 2 * k.shape[2]).all()
        held = made.query.gather(2, made.places.flatten(2))
        assert torch.equal(held, torch.arange(k.shape[2]).repeat_interleave(2).expand_as(held))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("chunks", "choice"), [("clipped", "topk"), ("short last chunk", "0.3 overall")])
def test_opcheck(chunks: str, choice: str, dtype: torch.dtype, strided: bool) -> None:
    given = [x.requires_grad_(dtype is torch.float32) for x in inputs(chunks, dtype, strided)]
    torch.library.opcheck(OP.default, tuple(given), arguments(chunks, choice))


def test_defaults_are_those_of_the_schema_and_the_spec() -> None:
    defaults = {argument.name: argument.default_value for argument in OP.default._schema.arguments}
    for param in backend.BACKEND.params:
        wanted = list(param.default) if isinstance(param.default, tuple) else param.default
        assert defaults[param.name] == wanted
    for function in (backend._forward, backend._check, backend.vmoba_attention):
        assert set(same_defaults(OP.default, function)) <= {"chunk"}  # a tuple is not a list
        assert list(function.__kwdefaults__["chunk"]) == defaults["chunk"]


def test_one_graph_serves_all_batches_and_has_gradients() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    given_arguments = arguments("clipped")
    attend = torch.compile(lambda *qkv: OP(*qkv, **given_arguments)[0], backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 5, 7):  # not 2, the heads: equal sizes would share a symbol
        given = [torch.randn(batch, 2, 175, 16, requires_grad=True) for _ in range(3)]
        out, eager = attend(*given), OP(*given, **given_arguments)[0]
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), given), torch.autograd.grad(eager.sum(), given), rtol=1e-5, atol=1e-5
        )
    assert counter.frame_count == 1


def test_a_rule_with_a_layout_rewrites_a_model() -> None:
    model, x = Blocks(), tokens(2, 4 * 4 * 3)
    params = {"chunk": [1, 2, 3], "topk": 2}
    policy = Policy([Rule("vmoba", layout=[4, 4, 3], mode="require", params=params)])
    options = {"policy": policy, "inner_backend": "aot_eager"}
    out = torch.compile(model, backend="sparseattn", fullgraph=True, dynamic=True, options=options)(x)
    assert [row.decision.backend for row in sparseattn.last_report().rows] == ["vmoba", "vmoba"]
    exact = x
    for block in model.blocks:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in block.qkv(exact).chunk(3, dim=-1))
        exact = exact + OP(q, k, v, grid=[4, 4, 3], **params)[0].transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, exact)
    assert not torch.allclose(out, model(x), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": (6, 4, 6)}, r"grid must make the 120 tokens of the sequence, got 6 \* 4 \* 6 = 144"),
        ({"grid": (6, 4)}, r"grid must be three positive ints"),
        ({"chunk": (2, 0)}, r"chunk must be three ints \(t, h, w\) of at least 0, got \[2, 0\]"),
        ({"chunk": (2, -1, 0)}, r"chunk must be three ints"),
        ({"text_tokens": 4}, r"text_tokens must be 0, got 4. Use sta or vsa"),
        ({"select": "best"}, r"select must be one of topk, threshold, got 'best'"),
        ({"threshold_type": "row"}, r"threshold_type must be one of query_head, block"),
        ({"threshold_type": "block"}, r'threshold_type must not be "block" with select="topk"'),
        ({"topk": 0}, r"topk must be at least 1, got 0"),
        ({"threshold": 1.5}, r"threshold must be in 0 ... 1, got 1.5"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        OP(*inputs("temporal"), **arguments("temporal") | change)


def test_nan_reaches_the_output() -> None:
    q, k, v = inputs("both")
    k[0, 0, 40, 0] = torch.nan
    for choice in ("topk", "0.3 query_head"):
        out, _ = OP(q, k, v, **arguments("both", choice))
        assert out[0, 0].isnan().all()
        assert out[1].isfinite().all()


def test_reasons() -> None:
    cpu, spec = Capability.of("cpu"), backend.BACKEND

    def ask(layout: VideoLayout, **params: Any) -> list[str]:
        given = spec.complete(tuple(params.items()))
        return spec.reasons(AttentionCall(1, 4, 4, 4096, 4096, 64, layout=layout, params=given), cpu)

    assert ask(VideoLayout((16, 16, 16))) == []
    assert ask(VideoLayout((16, 16, 15), 256)) == [
        "256 text tokens share the sequence, and they have no chunk of their own"
    ]
    assert "may leave a query without one" in ask(VideoLayout((16, 16, 16)), threshold_type="block")[0]


def test_short_videos_small_chunks_and_many_of_them_do_not_pay() -> None:
    cpu, ask = Capability.of("cpu"), backend.BACKEND.break_even
    assert ask is not None

    def why(grid: tuple[int, int, int], **params: Any) -> str | None:
        layout, given = VideoLayout(grid), backend.BACKEND.complete(tuple(params.items()))
        return ask(AttentionCall(1, 4, 4, layout.tokens, layout.tokens, 64, layout=layout, params=given), cpu)

    assert why((8, 16, 16), chunk=(2, 8, 8), topk=4) is None
    assert why((8, 16, 16), chunk=(2, 8, 8), select="threshold") is None
    assert why((4, 16, 16), chunk=(2, 8, 8), topk=2) is not None
    assert why((8, 16, 16), chunk=(2, 4, 4), topk=4) is not None
    says = (
        "31% of chunks of 128 at 2048 tokens: on CPU it pays up to 25% of chunks of 64 tokens, from 2048 on (measured)"
    )
    assert str(why((8, 16, 16), chunk=(2, 8, 8), topk=5)).startswith(says)


def test_triton_needs_a_fixed_number_of_chunks() -> None:
    gpu, spec = Capability.of("sm90"), backend.BACKEND
    for params, fits in (((), True), ((("select", "threshold"),), False), ((("threshold_type", "overall"),), False)):
        call = AttentionCall(1, 4, 4, 4096, 4096, 64, device="cuda", params=spec.complete(params))
        assert (spec.provider("triton").reasons(call, gpu) == []) is fits
