"""sparse_linear_attention: the paper's equations in fp64, the published code's traps, the contract of the op."""

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
from sparseattn.attn_ops.backends import sla as backend
from sparseattn.attn_ops.blocks.block_index import mask_of
from sparseattn.attn_ops.blocks.sla_method import VARIANTS, SlaMethod
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import ArgumentError, PolicyError, UnsupportedError
from sparseattn.attn_ops.numerics import linear_attention as branch
from sparseattn.attn_ops.numerics.linear_attention import FEATURE_MAPS
from sparseattn.attn_ops.reference import sla as reference

OP = torch.ops.sparseattn.sparse_linear_attention
DIM = 16
# heads, kv heads, tokens, block_q, block_k, kept blocks
SHAPES = {
    "plain": (2, 2, 128, 16, 16, 3),
    "grouped heads": (4, 2, 96, 16, 16, 2),
    "tails": (2, 1, 117, 16, 16, 3),
    "wide query blocks": (2, 2, 100, 32, 8, 5),
    "wide key blocks": (2, 2, 100, 8, 32, 2),
    "one block": (2, 2, 9, 16, 16, 1),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def inputs(name: str, dtype: torch.dtype = torch.float32, strided: bool = False) -> list[Tensor]:
    """Q, k, v, weight and bias; the last two always fp32."""
    heads, kv_heads, length, *_ = SHAPES[name]
    shape = (length, heads), (length, kv_heads), (length, kv_heads)
    given = [torch.randn(2, *s, DIM).to(dtype).transpose(1, 2) for s in shape]
    given = given if strided else [x.contiguous() for x in given]
    return [*given, torch.randn(DIM, DIM) / DIM**0.5, torch.randn(DIM)]


def sizes(name: str) -> dict[str, int]:
    return {"block_q": SHAPES[name][3], "block_k": SHAPES[name][4]}


def settings(name: str, **more: Any) -> dict[str, Any]:
    """Arguments of the op that keep the shape's number of blocks."""
    _, _, length, _, block_k, keep = SHAPES[name]
    return {"keep_ratio": (keep + 0.5) / -(-length // block_k) if keep > 1 else 0.0, **sizes(name), **more}


def method(**options: Any) -> SlaMethod:
    defaults = {"keep_ratio": 0.1, "variant": "all", "feature_map": "softmax", "block_q": 64, "block_k": 64}
    return SlaMethod(**{**defaults, "compat": False, "keep_ratios": None, **options})


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("provider", ["cpu", "reference"])
def test_forward_and_gradients_are_those_of_the_paper(name: str, variant: str, feature_map: str, provider: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(name, strided=True)]
    how = {"variant": variant, "feature_map": feature_map, "scale": 0.4}
    out, lse = OP(*leaves, **settings(name, **how), provider=provider)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact, exact_lse = paper_sla(*exact_leaves, keep=SHAPES[name][5], **sizes(name), **how)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    wanted = torch.autograd.grad((exact, exact_lse), exact_leaves, (grad_out.double(), grad_lse.double()))
    assert distance(out.detach(), exact.detach()) < 1e-5
    torch.testing.assert_close(lse.detach().double(), exact_lse.detach(), rtol=1e-5, atol=1e-5)
    for grad, want, leaf in zip(grads, wanted, leaves, strict=True):
        assert grad.stride() == torch.empty_like(leaf).stride()
        if want.norm() == 0:  # in "one block", no block is left to the linear branch of the complement
            assert not grad.any()
        else:
            assert distance(grad, want) < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_formulas_of_the_reference_in_fp64(name: str, variant: str, feature_map: str) -> None:
    leaves = [x.double().requires_grad_() for x in inputs(name)]
    how = method(**settings(name, variant=variant, feature_map=feature_map))
    out, lse = (x.detach() for x in reference.sparse_linear_attention(*leaves, how, scale=0.4))
    exact, exact_lse = paper_sla(
        *leaves, keep=SHAPES[name][5], **sizes(name), variant=variant, feature_map=feature_map, scale=0.4
    )
    torch.testing.assert_close((out, lse), (exact, exact_lse), rtol=1e-12, atol=1e-12)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    with torch.no_grad():
        grads = reference.sparse_linear_attention_backward(grad_out, grad_lse, out, lse, *leaves, how, scale=0.4)
    wanted = torch.autograd.grad((exact, exact_lse), leaves, (grad_out, grad_lse))
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad - want).norm() <= 1e-9 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["grouped heads", "tails"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision(dtype: torch.dtype, name: str, variant: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(name, dtype)]
    out, lse = OP(*leaves, **settings(name, variant=variant))
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact, _ = paper_sla(*exact_leaves, keep=SHAPES[name][5], **sizes(name), variant=variant)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad_out)
    wanted = torch.autograd.grad(exact, exact_leaves, grad_out.double())
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    for got, want in zip((out.detach(), *grads), (exact.detach(), *wanted), strict=True):
        assert distance(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dim", [24, 80])
@pytest.mark.parametrize("variant", VARIANTS)
def test_head_dims_and_blocks_that_are_no_powers_of_two(dim: int, variant: str) -> None:
    given = [*(torch.randn(1, 2, 117, dim) for _ in range(3)), torch.randn(dim, dim) / dim**0.5]
    out, _ = OP(*given, keep_ratio=0.4, variant=variant, block_q=24, block_k=20)
    exact, _ = paper_sla(*(x.double() for x in given), keep=2, variant=variant, block_q=24, block_k=20)
    assert distance(out, exact) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_ratio_below_one_block_keeps_one(variant: str) -> None:
    """The published code keeps int(0.1 * 2) = 0 blocks here, and all its outputs are NaN."""
    given = [torch.randn(1, 2, 128, DIM) for _ in range(3)]
    _, count = method().critical_blocks(*given[:2])
    assert (count == 1).all()
    out, lse = OP(*given, torch.eye(DIM), variant=variant)
    exact, exact_lse = paper_sla(*given, torch.eye(DIM).double(), keep=1, variant=variant)
    assert distance(out, exact) < 1e-5
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_ratio_1_is_dense_and_leaves_the_complement_exactly_0(name: str, feature_map: str) -> None:
    q, k, v, weight, _ = inputs(name)
    sparse, _ = OP(q, k, v, keep_ratio=1.0, **sizes(name))
    torch.testing.assert_close(sparse, functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    leaves = [x.requires_grad_() for x in (q, k, v, weight)]
    out, _ = OP(*leaves, keep_ratio=1.0, variant="complement", feature_map=feature_map, **sizes(name))
    assert torch.equal(out, sparse)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert not grads[3].any()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_ratio_1_leaves_all_tokens_to_the_linear_branch_of_all(feature_map: str) -> None:
    given = inputs("tails")
    out, _ = OP(*given, keep_ratio=1.0, feature_map=feature_map, **sizes("tails"))
    exact, _ = paper_sla(*(x.double() for x in given), keep=8, feature_map=feature_map, **sizes("tails"))
    assert distance(out, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_zero_projection_is_exactly_the_sparse_part(dtype: torch.dtype, variant: str) -> None:
    q, k, v, weight, bias = inputs("tails", dtype)
    sparse, lse = OP(q, k, v, **settings("tails"))
    projected, projected_lse = OP(q, k, v, 0 * weight, 0 * bias, **settings("tails", variant=variant))
    assert torch.equal(projected, sparse)
    assert torch.equal(projected_lse, lse)
    exact, _ = paper_sla(q, k, v, keep=3, **sizes("tails"))
    assert distance(sparse, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_features_at_all_give_0(variant: str) -> None:
    """relu(k) = 0 everywhere: 0 / 1e-5 over all tokens; 0 / 0, NaN in the published code, over the complement."""
    q, k, v, weight, _ = inputs("plain")
    leaves = [x.requires_grad_() for x in (q, -k.abs(), v, weight)]
    out, _ = OP(*leaves, **settings("plain", variant=variant, feature_map="relu"))
    assert torch.equal(out, OP(*leaves[:3], **settings("plain"))[0])
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_epsilon_is_that_of_the_published_code() -> None:
    q, k, v, weight, _ = inputs("plain")
    q = 1e-7 * q  # the denominator is of the order of 1e-5
    arguments = settings("plain", feature_map="relu")
    part = OP(q, k, v, weight, **arguments)[0] - OP(q, k, v, **arguments)[0]
    exact = [paper_sla(q, k, v, w, keep=3, feature_map="relu", **sizes("plain"))[0] for w in (weight.double(), None)]
    assert distance(part, exact[0] - exact[1]) < 1e-5
    features = functional.relu(q).double() @ functional.relu(k).double().mT
    without = features / features.sum(dim=-1, keepdim=True) @ v.double() @ weight.double().T
    assert distance(part, without.nan_to_num(0.0)) > 0.1


def test_few_blocks_left_lose_no_digits() -> None:
    """Subtracting the kept blocks from a total over all, as the published code does, would leave none of them."""
    q, k, v = (torch.rand(1, 1, 64, DIM) for _ in range(3))
    k[:, :, :48] *= 1e6
    left = torch.tensor([False, False, False, True]).expand(1, 1, 4, 4)
    out = branch.linear_attention(q, k, v, left, feature_map="relu", block_q=16, block_k=16)
    weights = q.double() @ k[:, :, 48:].double().mT
    exact = weights / weights.sum(dim=-1, keepdim=True) @ v[:, :, 48:].double()
    assert distance(out, exact) < 1e-6

    def state(keys: slice) -> tuple[Tensor, Tensor]:
        return k[:, :, keys].mT @ v[:, :, keys], k[:, :, keys].sum(dim=2).unsqueeze(-1)

    (total, total_z), (kept, kept_z) = state(slice(None)), state(slice(48))
    assert not distance(q @ (total - kept) / (q @ (total_z - kept_z)), exact) < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_grouped_heads_are_repeated_heads(variant: str) -> None:
    q, k, v, weight, bias = inputs("grouped heads")
    out, lse = OP(q, k, v, weight, bias, **settings("grouped heads", variant=variant))
    repeated = (x.repeat_interleave(2, dim=1) for x in (k, v))
    want, want_lse = OP(q, *repeated, weight, bias, **settings("grouped heads", variant=variant))
    torch.testing.assert_close((out, lse), (want, want_lse))


def test_an_offset_of_k_changes_no_choice() -> None:
    q, k, *_ = inputs("tails")
    how = method(**settings("tails"))
    index, count = how.critical_blocks(q, k)
    moved, moved_count = how.critical_blocks(q, k + 1000)
    assert torch.equal(count, moved_count)
    assert torch.equal(index, moved)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("keep_ratio", [0.0, 0.3, 0.8, 1.0])
def test_chosen_blocks_are_those_of_the_definition(name: str, compat: bool, keep_ratio: float) -> None:
    q, k, *_ = inputs(name)
    # Block sums are exact in fp32, and so is the mean of k; many scores are equal.
    q, k = q.round(), k.round()
    k[:, :, 0] -= k.sum(dim=2)
    how = method(keep_ratio=keep_ratio, **sizes(name), compat=compat)
    exact = reference.chosen_blocks(q, k, how)
    index, count = how.critical_blocks(q, k)
    assert torch.equal(mask_of(index, count, exact.shape[-1]), exact)


def test_compat_chooses_as_the_published_code() -> None:
    q, k = (torch.randn(1, 4, 1024, DIM, dtype=torch.bfloat16) for _ in range(2))

    def pooled(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, 16)).float().mean(dim=3).to(x.dtype)

    scores = pooled(q) @ pooled(k - k.mean(dim=2, keepdim=True)).mT
    published = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, scores.topk(3, sorted=False).indices, True)
    edge = scores.sort(dim=-1, descending=True).values
    tied = edge[..., 2] == edge[..., 3]  # the published code leaves ties to the device
    for compat in (True, False):
        index, count = method(keep_ratio=3 / 64, **sizes("plain"), compat=compat).critical_blocks(q, k)
        same = (mask_of(index, count, 64) == published).all(dim=-1) | tied
        assert same.all() == compat
    assert tied.double().mean() < 0.5


def test_a_tensor_of_ratios_replaces_the_number() -> None:
    given = inputs("grouped heads")
    number, _ = OP(*given, **settings("grouped heads") | {"keep_ratio": 0.5})
    for ratio in (torch.tensor(0.5), torch.full((4,), 0.5)):
        tensor, _ = OP(*given, **settings("grouped heads", keep_ratios=ratio))
        assert torch.equal(tensor, number)
    per_head = torch.tensor([0.0, 0.34, 0.7, 1.0])
    out, _ = OP(*given, **settings("grouped heads", keep_ratios=per_head, variant="complement"))
    exact, _ = paper_sla(
        *(x.double() for x in given), keep=[1, 2, 4, 6], variant="complement", **sizes("grouped heads")
    )
    assert distance(out, exact) < 1e-5
    torch.testing.assert_close(
        OP(*given, **settings("grouped heads", keep_ratios=per_head), provider="reference")[0],
        OP(*given, **settings("grouped heads", keep_ratios=per_head))[0],
    )


def test_a_new_ratio_in_a_tensor_compiles_nothing_again() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(
        lambda *x: OP(*x[:3], keep_ratios=x[3], **sizes("plain"))[0], backend=counter, fullgraph=True
    )
    q, k, v, *_ = inputs("plain")
    for ratio in (0.125, 0.5, 1.0):
        torch.testing.assert_close(
            attend(q, k, v, torch.tensor(ratio)), OP(q, k, v, keep_ratio=ratio, **sizes("plain"))[0]
        )
    assert counter.frame_count == 1


def test_the_linear_branch_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [x.requires_grad_() for x in inputs("grouped heads")]
    results = []
    for chunk in (branch._CHUNK_BYTES, 1):
        monkeypatch.setattr(branch, "_CHUNK_BYTES", chunk)
        out, _ = OP(*leaves, **settings("grouped heads", variant="complement"))
        results.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("provider", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(provider: str, dtype: torch.dtype, requires_grad: bool) -> None:
    options = {"variant": "complement", "feature_map": "elu", "keep_ratios": torch.tensor(0.3), "scale": 0.5}
    for strided, tensors, more in ((True, 3, {}), (False, 5, {}), (True, 5, options)):
        given = [x.requires_grad_(requires_grad) for x in inputs("tails", dtype, strided)]
        torch.library.opcheck(OP.default, tuple(given[:tensors]), settings("tails", **more, provider=provider))


def test_one_graph_serves_all_lengths_forward_and_backward() -> None:
    def attend(*given: Tensor) -> Tensor:
        return OP(*given, keep_ratio=0.3, variant="complement", block_q=16, block_k=16)[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    weight, bias = (x.requires_grad_() for x in inputs("plain")[3:])
    for length in (128, 200, 333):
        given = [*(torch.randn(1, 2, length, DIM, requires_grad=True) for _ in range(3)), weight, bias]
        out, eager = compiled(*given), attend(*given)
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), given), torch.autograd.grad(eager.square().sum(), given)
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_rule_runs_it_training_free_and_trains_through_it(dynamic: bool | None) -> None:
    params = {"keep_ratio": 0.5, "block_q": 16, "block_k": 16}
    policy = sparseattn.Policy((sparseattn.Rule("sla", params=params),))
    model = SelfAttention()
    options = {"policy": policy, "inner_backend": "aot_eager"}
    compiled = torch.compile(model, backend="sparseattn", fullgraph=True, dynamic=dynamic, options=options)
    for length in (64, 90):
        x = tokens(length=length).requires_grad_()
        out = compiled(x)
        assert dict(sparseattn.last_report().chosen) == {"sla": 1}
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in model.qkv(x).chunk(3, dim=-1))
        want = OP(q, k, v, **params)[0].transpose(1, 2).flatten(2)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), x),
            torch.autograd.grad(want.square().sum(), x),
            rtol=1e-4,
            atol=1e-4,
        )


def test_sparsity_is_the_complement_of_keep_ratio_in_a_rule() -> None:
    policy = sparseattn.Policy((sparseattn.Rule("sla", params={"sparsity": 0.75}),))
    (decision,) = sparseattn.explain(SelfAttention(), tokens(), policy=policy).decisions
    assert dict(decision.params)["keep_ratio"] == 0.25


def test_autocast_casts_weights_too() -> None:
    given = inputs("tails")
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = OP(*given, **settings("tails"))
    assert torch.equal(out, OP(*(x.bfloat16() for x in given), **settings("tails"))[0])


def test_inputs_are_not_modified() -> None:
    leaves = [x.requires_grad_() for x in inputs("grouped heads")]
    before = [x.detach().clone() for x in leaves]
    for variant in VARIANTS:
        OP(*leaves, **settings("grouped heads", variant=variant))[0].sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(leaves, before, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens(variant: str) -> None:
    q = torch.randn(2, 2, 0, DIM, requires_grad=True)
    weight, bias = (x.requires_grad_() for x in inputs("plain")[3:])
    out, lse = OP(q, q, q, weight, bias, variant=variant)
    assert (out.shape, lse.shape) == ((2, 2, 0, DIM), (2, 2, 0))
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, weight, bias)))


def test_nan_reaches_the_output() -> None:
    q, k, v, weight, bias = inputs("plain")
    k[0, 0, 40, 0] = torch.nan
    out, _ = OP(q, k, v, weight, bias, **settings("plain", variant="complement"))
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()


def test_typed_wrapper() -> None:
    given = inputs("tails")
    for got, want in zip(
        backend.sparse_linear_attention(*given, **settings("tails")), OP(*given, **settings("tails")), strict=True
    ):
        assert torch.equal(got, want)


def test_mistakes_are_named() -> None:
    q, k, v, weight, bias = inputs("plain")
    for arguments, sentence in (
        ({"keep_ratio": 1.5}, r"keep_ratio must be in 0 ... 1, got 1.5"),
        ({"variant": "rest"}, "variant must be one of all, complement, got 'rest'"),
        ({"feature_map": "hedgehog"}, "feature_map must be one of softmax, elu, relu, got 'hedgehog'"),
        ({"block_k": 0}, "block_k must be at least 1, got 0"),
        ({"bias": bias}, "bias must come with a weight"),
        ({"weight": weight[:4]}, r"weight must have shape \(16, 16\), got \(4, 16\)"),
        ({"weight": weight.int()}, "weight must be float32 or float16 or bfloat16, got int32"),
        ({"weight": weight, "bias": bias[:4]}, r"bias must have shape \(16,\), got \(4,\)"),
        ({"keep_ratios": torch.ones(3)}, r"keep_ratios must have shape \(\) or \(2,\), one per head of q, got \(3,\)"),
        ({"keep_ratios": torch.tensor(1)}, "keep_ratios must be float32, whatever q is, got int64"),
    ):
        with pytest.raises(ArgumentError, match=f"^sparse_linear_attention: {sentence}"):
            OP(q, k, v, **arguments)
    with pytest.raises(ArgumentError, match=r"k must have q's 128 tokens, got 64\. It is for self-attention"):
        OP(q, k[:, :, :64], v[:, :, :64])
    with pytest.raises(UnsupportedError, match="needs a cuda device"):
        OP(q, k, v, provider="triton")
    with pytest.raises(PolicyError, match="block_k must be one of"):
        backend.BACKEND.check_params({"block_k": 48}, "rule 1")


def test_what_stays_dense_and_why() -> None:
    ask, cpu = backend.BACKEND.reasons, Capability.of("cpu")
    assert ask(AttentionCall(1, 4, 4, 4096, 4096, 64), cpu) == []
    assert ask(AttentionCall(1, 4, 4, 4096, 4096, 64, causal=True), cpu) == ["causal attention is not supported"]
    cross = AttentionCall(1, 4, 4, 4096, 77, 64, kind="cross")
    assert ask(cross, cpu) == ["cross-attention: 4096 queries, 77 keys"]
    pays = backend.BACKEND.break_even
    assert pays is not None
    assert pays(AttentionCall(1, 4, 4, 256, 256, 64), cpu) is None
    assert "128 tokens" in str(pays(AttentionCall(1, 4, 4, 128, 128, 64), cpu))
    assert pays(AttentionCall(1, 4, 4, 128, 128, 64), Capability.of("sm90")) is None


def test_backward_inside_autocast_keeps_its_precision() -> None:
    q, k, v = (torch.randn(1, 2, 128, 32, requires_grad=True) for _ in range(3))
    weight = torch.randn(32, 32, requires_grad=True)

    def grads(inside: bool) -> tuple[Tensor, ...]:
        out, _ = torch.ops.sparseattn.sparse_linear_attention(q, k, v, weight, None, keep_ratio=0.3)
        loss = out.square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return torch.autograd.grad(loss, (q, k, v, weight))

    for plain, autocast in zip(grads(False), grads(True), strict=True):
        assert torch.equal(plain, autocast)
