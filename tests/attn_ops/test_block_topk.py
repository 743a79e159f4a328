"""block_topk_attention: the chosen blocks, the attention to them, and the contract of the op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparseattn.attn_ops.backends import block_topk as backend
from sparseattn.attn_ops.blocks.block_index import mask_of
from sparseattn.attn_ops.blocks.pooled import choose_blocks
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import ArgumentError, PolicyError
from sparseattn.attn_ops.op import same_defaults
from sparseattn.attn_ops.reference import block_topk as reference

OP = torch.ops.sparseattn.block_topk_attention
# heads, kv heads, query tokens, key tokens, block_q, block_k
SHAPES = {
    "plain": (2, 2, 128, 128, 16, 16),
    "grouped heads": (4, 2, 128, 128, 16, 16),
    "tails": (2, 1, 117, 117, 16, 16),
    "wide query blocks": (2, 2, 100, 100, 32, 8),
    "wide key blocks": (2, 2, 100, 100, 8, 32),
    "more keys": (2, 2, 70, 130, 16, 16),
    "more queries": (2, 2, 130, 70, 16, 16),
    "one block": (2, 2, 9, 9, 16, 16),
}


def inputs(name: str, dtype: torch.dtype = torch.float32, strided: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, seq_q, seq_k, *_ = SHAPES[name]
    shapes = (heads, seq_q), (kv_heads, seq_k), (kv_heads, seq_k)
    if strided:
        q, k, v = (torch.randn(2, tokens, h, 16).to(dtype).transpose(1, 2) for h, tokens in shapes)
    else:
        q, k, v = (torch.randn(2, h, tokens, 16).to(dtype) for h, tokens in shapes)
    return q, k, v


def settings(name: str, causal: bool, keep_ratio: float = 0.3) -> dict[str, Any]:
    return {"keep_ratio": keep_ratio, "block_q": SHAPES[name][4], "block_k": SHAPES[name][5], "causal": causal}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keep_ratio", [0.0, 0.3, 0.8, 1.0])
def test_chosen_blocks_are_those_of_the_definition(name: str, causal: bool, keep_ratio: float) -> None:
    q, k, _ = inputs(name)
    # Integers: block sums are exact in fp32, and many scores are equal.
    q, k = q.round(), k.round()
    chosen = settings(name, causal, keep_ratio)
    index, count = choose_blocks(q, k, **chosen)
    exact = reference.chosen_blocks(q, k, **chosen)
    assert torch.equal(mask_of(index, count, exact.shape[-1]), exact)


@pytest.mark.parametrize("keep_ratio", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_number_of_kept_blocks(keep_ratio: float) -> None:
    q, k, _ = inputs("plain")
    _, count = choose_blocks(q, k, **settings("plain", False, keep_ratio))
    assert (count == {0.0: 1, 0.1: 1, 0.25: 2, 0.5: 4, 1.0: 8}[keep_ratio]).all()
    _, count = choose_blocks(q, k, **settings("plain", True, keep_ratio))
    expected = [max(1, int(keep_ratio * candidates + 0.5)) for candidates in range(1, 9)]
    assert (count == torch.tensor(expected)).all()


def test_own_block_is_always_kept() -> None:
    q, k, v = inputs("plain")
    index, count = choose_blocks(q, -q, **settings("plain", True, 0.0))
    assert torch.equal(mask_of(index, count, 8)[0, 0], torch.eye(8, dtype=torch.bool))
    _, lse = OP(q, k, v, **settings("plain", True, 0.0))
    assert lse.isfinite().all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_everything_kept_is_dense_attention(name: str, causal: bool) -> None:
    q, k, v = inputs(name)
    out, _ = OP(q, k, v, **settings(name, causal, 1.0))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_forward_and_backward(name: str, dtype: torch.dtype, causal: bool, strided: bool) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    given, chosen = inputs(name, dtype, strided), settings(name, causal)
    leaves = [x.detach().requires_grad_() for x in given]
    out, lse = OP(*leaves, **chosen, scale=0.4)
    exact, exact_lse = reference.block_topk_attention(*(x.double() for x in given), **chosen, scale=0.4)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    exact_grads = reference.block_topk_attention_backward(
        *(x.double() for x in (grad_out, grad_lse, exact, exact_lse, *given)), **chosen, scale=0.4
    )
    assert out.stride() == torch.empty_like(given[0]).stride()
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    for value, wanted in zip((out.detach(), *grads), (exact, *exact_grads), strict=True):
        assert value.dtype is dtype
        assert float((value.double() - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(requires_grad: bool, causal: bool) -> None:
    given = [x.requires_grad_(requires_grad) for x in inputs("tails", strided=True)]
    torch.library.opcheck(OP.default, tuple(given), settings("tails", causal))


def test_defaults_are_those_of_the_schema_and_the_spec() -> None:
    for function in (backend._forward, backend._check, backend.block_topk_attention):
        assert same_defaults(OP.default, function) == []
    defaults = {argument.name: argument.default_value for argument in OP.default._schema.arguments}
    for param in backend.BACKEND.params:
        assert defaults[param.name] == param.default


def test_one_graph_serves_all_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(lambda q, k, v: OP(q, k, v, causal=True)[0], backend=counter, fullgraph=True, dynamic=True)
    for tokens in (256, 300, 500):
        given = [torch.randn(1, 2, tokens, 16, requires_grad=True) for _ in range(3)]
        out, eager = attend(*given), OP(*given, causal=True)[0]
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), given), torch.autograd.grad(eager.sum(), given), rtol=1e-5, atol=1e-5
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ratios", [0.7, [0.7, 0.1]])
def test_ratios_as_a_tensor(causal: bool, ratios: Any) -> None:
    """fp32 has no 0.7: 0.7 of ten blocks are seven all the same."""
    given = [torch.randn(2, 2, 160, 16, requires_grad=True) for _ in range(3)]
    blocks = {"block_q": 16, "block_k": 16, "causal": causal}
    tensor = torch.tensor(ratios)
    torch.library.opcheck(OP.default, tuple(given), {**blocks, "keep_ratios": tensor})
    out, lse = OP(*given, **blocks, keep_ratios=tensor)
    exact = OP(*given, **blocks, keep_ratios=tensor, provider="reference")
    torch.testing.assert_close((out, lse), exact)
    both = [OP(*given, **blocks, keep_ratio=ratio) for ratio in ([ratios] * 2 if isinstance(ratios, float) else ratios)]
    for head, (alone, _) in enumerate(both):
        assert torch.equal(out[:, head], alone[:, head])
    got = torch.autograd.grad(out.sum(), given)
    torch.testing.assert_close(got, torch.autograd.grad(exact[0].sum(), given), rtol=1e-4, atol=1e-5)


def test_autocast_chooses_as_the_cast_inputs_would() -> None:
    given = inputs("tails")
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = OP(*given, **settings("tails", True))
    assert torch.equal(out, OP(*(x.bfloat16() for x in given), **settings("tails", True))[0])


def test_inputs_are_not_modified() -> None:
    given = [x.requires_grad_() for x in inputs("grouped heads")]
    before = [x.detach().clone() for x in given]
    OP(*given, **settings("grouped heads", True))[0].sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_nan_reaches_the_output() -> None:
    q, k, v = inputs("plain")
    k[0, 0, 40, 0] = torch.nan
    out, _ = OP(q, k, v, **settings("plain", False, 0.1))
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()


def test_typed_wrapper_and_reference_provider() -> None:
    given, chosen = inputs("tails"), settings("tails", True)
    out, lse = backend.block_topk_attention(*given, **chosen)
    exact, exact_lse = OP(*given, **chosen, provider="reference")
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)


def test_mistakes_are_named() -> None:
    q, k, v = inputs("plain")
    with pytest.raises(ArgumentError, match=r"keep_ratio must be in 0 ... 1, got 1.5"):
        OP(q, k, v, keep_ratio=1.5)
    with pytest.raises(ArgumentError, match="block_q must be at least 1, got 0"):
        OP(q, k, v, block_q=0)
    with pytest.raises(ArgumentError, match="v must have k's shape"):
        OP(q, k, v[:, :, 1:])
    with pytest.raises(
        ArgumentError, match=r"keep_ratios must have shape \(\) or \(2,\), one per head of q, got \(3,\)"
    ):
        OP(q, k, v, keep_ratios=torch.ones(3))
    with pytest.raises(ArgumentError, match="keep_ratios must be float32, whatever q is, got float64"):
        OP(q, k, v, keep_ratios=torch.ones((), dtype=torch.float64))
    with pytest.raises(PolicyError, match="block_k must be one of"):
        backend.BACKEND.check_params({"block_k": 48}, "rule 1")


def test_short_sequences_do_not_pay() -> None:
    cpu, gpu = Capability.of("cpu"), Capability.of("sm90")
    ask = backend.BACKEND.break_even
    assert ask is not None
    short = AttentionCall(1, 4, 4, 256, 256, 64)
    assert ask(short, cpu) == "256 tokens: on CPU choosing and gathering blocks pays from 512 tokens (measured)"
    assert ask(short, gpu) is None
    assert ask(AttentionCall(1, 4, 4, 512, 512, 64), cpu) is None
    assert ask(AttentionCall(1, 4, 4, 512, 512, 64, causal=True), cpu) is not None


def test_cross_attention_is_left_dense() -> None:
    call = AttentionCall(1, 4, 4, 4096, 77, 64, kind="cross")
    assert backend.BACKEND.reasons(call, Capability.of("cpu")) == ["cross-attention: 4096 queries, 77 keys"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 64), (64, 0), (0, 0)])
def test_no_queries_or_no_keys(seq_q: int, seq_k: int, causal: bool) -> None:
    q, k = torch.randn(1, 2, seq_q, 16), torch.randn(1, 2, seq_k, 16)
    out, lse = torch.ops.sparseattn.block_topk_attention(q, k, k, causal=causal)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((1, 2, seq_q), -torch.inf))
