"""fuse_unfused: what it fuses, what it leaves alone, and that it can be undone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.graphs import capture, compiled, count, exported, fresh_dynamo, listing  # noqa: F401
from torch import Tensor, fx, nn

from sparseattn.fx_passes.normalize import Normalized, fuse_unfused

SDPA = (torch._C._nn.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
B, H, S, D = 2, 4, 24, 8
LOWEST = torch.finfo(torch.float32).min


def causal(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * D**-0.5


def fold(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-2], x.shape[-1])


FORMS = {
    "divided": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), dim=-1) @ v,
    "multiplied": lambda q, k, v: nn.functional.softmax(torch.matmul(q, k.mT) * D**-0.5, dim=-1).matmul(v),
    "scaled_query": lambda q, k, v: (q * D**-0.5 @ k.transpose(-1, -2)).softmax(-1) @ v,
    "scaled_both": lambda q, k, v: ((q * D**-0.25) @ (k.transpose(-2, -1) * D**-0.25)).softmax(dim=-1) @ v,
    "not_scaled": lambda q, k, v: torch.softmax(q @ k.permute(0, 1, 3, 2), 3) @ v,
    "scaled_in_place": lambda q, k, v: (q @ k.transpose(-1, -2)).mul_(0.3).softmax(-1) @ v,
    "fp32_softmax": lambda q, k, v: nn.functional.softmax(scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "upcast_scores": lambda q, k, v: scores(q, k).float().softmax(-1).type_as(v) @ v,
    "causal_fill": lambda q, k, v: scores(q, k).masked_fill(~causal(q, k), -math.inf).softmax(-1) @ v,
    "causal_fill_in_place": lambda q, k, v: scores(q, k).masked_fill_(~causal(q, k), -math.inf).softmax(-1) @ v,
    "fill_then_scale": lambda q, k, v: (
        ((q @ k.mT).masked_fill(causal(q, k) == 0, -math.inf) / math.sqrt(D)).softmax(-1) @ v
    ),
    "causal_lowest": lambda q, k, v: scores(q, k).masked_fill(~causal(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v,
    "causal_where": lambda q, k, v: torch.where(causal(q, k), scores(q, k), -math.inf).softmax(-1) @ v,
    "causal_where_method": lambda q, k, v: scores(q, k).where(causal(q, k), -math.inf).softmax(-1) @ v,
    "hidden_where": lambda q, k, v: torch.where(~causal(q, k), torch.tensor(-math.inf), scores(q, k)).softmax(-1) @ v,
    "causal_sum": lambda q, k, v: (
        (scores(q, k) + torch.full((q.shape[-2],) * 2, -math.inf, device=q.device).triu(1)).softmax(-1) @ v
    ),
    "sum_and_fill": lambda q, k, v: (
        (scores(q, k) + torch.arange(k.shape[-2], device=q.device, dtype=q.dtype))
        .masked_fill(~causal(q, k), -math.inf)
        .softmax(-1)
        @ v
    ),
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.2).softmax(-1), v
    ),
    "einsum_tokens_first": lambda q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)).div(3).softmax(dim=-1),
        v.transpose(1, 2),
    ).transpose(1, 2),
    "einsum_keys_first": lambda q, k, v: torch.einsum(
        "...js,...ij->...is", v, torch.einsum("...jd,...id->...ij", k, q).softmax(-1)
    ),
    "heads_in_batch": lambda q, k, v: torch.bmm(
        (torch.bmm(fold(q), fold(k).transpose(1, 2)) * 0.3).softmax(-1), fold(v)
    ).view(q.shape),
    "baddbmm": lambda q, k, v: torch.bmm(
        torch.baddbmm(
            torch.empty(B * H, S, S, dtype=q.dtype, device=q.device),
            fold(q),
            fold(k).transpose(-1, -2),
            beta=0,
            alpha=0.3,
        ).softmax(dim=-1),
        fold(v),
    ).reshape(q.shape),
    "transposed_output": lambda q, k, v: (v.mT @ scores(q, k).softmax(-1).mT).mT,
    "tensor_scale": lambda q, k, v: (q @ k.mT * torch.linspace(0.1, 0.5, H).view(H, 1, 1)).softmax(-1) @ v,
    "tensor_divisor": lambda q, k, v: (q @ k.mT / torch.sqrt(torch.tensor(8.0))).softmax(-1) @ v,
    "eval_dropout": lambda q, k, v: nn.functional.dropout(scores(q, k).softmax(-1), 0.5, training=False) @ v,
    "viewed_output": lambda q, k, v: (scores(q, k).softmax(-1) @ v).view(B, -1).view(q.shape),
}
ALONE = {
    "softcap": lambda q, k, v: (torch.tanh(scores(q, k) / 5) * 5).softmax(-1) @ v,
    "weights_returned": lambda q, k, v: (w := scores(q, k).softmax(-1)) @ v + w.sum(),
    "scores_used": lambda q, k, v: (s := scores(q, k)).softmax(-1) @ v + s.sum(),
    "other_dimension": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "multiplied_mask": lambda q, k, v: (scores(q, k) * causal(q, k)).softmax(-1) @ v,
    "filled_with_zero": lambda q, k, v: scores(q, k).masked_fill(~causal(q, k), 0.0).softmax(-1) @ v,
    "low_fill_of_unknown_mask": lambda q, k, v: (
        scores(q, k).masked_fill(k[:, :, None, :, 0] > 0, LOWEST).softmax(-1) @ v
    ),
    "low_fill_with_a_bias_that_may_hide_the_rest": lambda q, k, v: (
        (scores(q, k) + k[:, :, None, :, 0]).masked_fill(~causal(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v
    ),
    "two_low_fills": lambda q, k, v: (
        scores(q, k).masked_fill(~causal(q, k), -1e9).masked_fill(causal(q, k).roll(1, 0), -1e9).softmax(-1) @ v
    ),
    "scaled_mask": lambda q, k, v: ((scores(q, k) + q[:, :, :, :1]) * 2).softmax(-1) @ v,
    "negative_scale": lambda q, k, v: (q @ k.mT * -0.3).softmax(-1) @ v,
    "broadcast_heads": lambda q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v,
    "scores_mask_of_column": lambda q, k, v: (q @ k.mT * k[:, :, None, :, 0]).softmax(-1) @ v,
    "normalised_twice": lambda q, k, v: ((w := scores(q, k).softmax(-1)) / w.sum(-1, keepdim=True)) @ v,
    "vmapped": lambda q, k, v: torch.vmap(lambda a, b, c: scores(a, b).softmax(-1) @ c)(q, k, v),
    "query_written_between": lambda q, k, v: _written_between(q.clone(), k, v),
    "baddbmm_half_bias": lambda q, k, v: torch.bmm(
        torch.baddbmm(torch.ones(B * H, S, S), fold(q), fold(k).mT, beta=0.5).softmax(-1), fold(v)
    ),
}


def _written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    q.mul_(2)
    return weights @ v + q


def operands(grad: bool = False, dtype: torch.dtype = torch.float32, seq: int = S) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, seq, D).to(dtype).requires_grad_(grad) for _ in range(3)]


class Counted:
    """fuse_unfused, remembering its records."""

    def __init__(self) -> None:
        self.records: list[Normalized] = []

    def __call__(self, graph: fx.GraphModule) -> None:
        self.records = fuse_unfused(graph)
        for record in self.records:
            record.commit()
        assert count(graph, *SDPA) == len(self.records)


@pytest.mark.parametrize("form", FORMS)
def test_fuses_and_computes_the_same(form: str) -> None:
    fuse, function = Counted(), FORMS[form]
    ours, theirs = operands(grad=True), operands(grad=True)
    out, wanted = compiled(function, fuse, dynamic=False)(*ours), function(*theirs)
    assert len(fuse.records) == 1
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert out.stride() == wanted.stride()
    weight = torch.randn_like(wanted)
    grads, wanted_grads = torch.autograd.grad(out, ours, weight), torch.autograd.grad(wanted, theirs, weight)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-4, atol=1e-5)


DYNAMIC = ("multiplied", "causal_fill", "causal_lowest", "einsum_tokens_first", "transposed_output", "tensor_scale")


@pytest.mark.parametrize("form", DYNAMIC)
def test_fuses_dynamic_shapes_in_one_graph(form: str) -> None:
    graphs: list[int] = []
    run = compiled(FORMS[form], lambda graph: graphs.append(len(fuse_unfused(graph))), dynamic=True)
    for seq in (24, 16, 40):
        torch.testing.assert_close(run(*operands(seq=seq)), FORMS[form](*operands(seq=seq)), rtol=1e-5, atol=1e-5)
    assert graphs == [1]


@pytest.mark.parametrize("form", ["multiplied", "causal_lowest", "heads_in_batch", "tensor_scale"])
def test_fuses_without_gradients(form: str) -> None:
    fuse = Counted()
    with torch.no_grad():
        out = compiled(FORMS[form], fuse)(*operands())
        torch.testing.assert_close(out, FORMS[form](*operands()), rtol=1e-5, atol=1e-5)
    assert len(fuse.records) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["multiplied", "fp32_softmax", "upcast_scores", "causal_lowest", "scaled_query"])
def test_halves_are_no_less_accurate_than_the_original(form: str, dtype: torch.dtype) -> None:
    fuse, given = Counted(), operands(dtype=dtype)
    exact = FORMS[form](*(operand.double() for operand in given))
    ours, original = compiled(FORMS[form], fuse)(*given), FORMS[form](*given)
    assert len(fuse.records) == 1
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 1.2 * (original - exact).abs().max()


def test_fuses_upcast_query_and_key() -> None:
    def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.float() @ k.float().mT * 0.3).softmax(-1).to(v.dtype) @ v

    graph = capture(upcast, *operands(dtype=torch.bfloat16))
    (record,) = fuse_unfused(graph)
    assert [node.op for node in record.site.args] == ["placeholder"] * 3  # type: ignore[union-attr]


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_keeps_dropout_in_training(probability: float) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(probability)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.dropout(scores(q, k).softmax(-1)) @ v

    for training, wanted in ((True, probability), (False, 0.0)):
        torch._dynamo.reset()
        (record,) = fuse_unfused(capture(Dropped().train(training), *operands(), dynamic=False))
        assert record.site.kwargs["dropout_p"] == wanted


def test_dropout_keeps_its_expectation() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.dropout(scores(q, k).softmax(-1), 0.5) @ v

    run, given = compiled(dropped, Counted()), operands()
    draws = torch.stack([run(*given) for _ in range(400)])
    wanted = nn.functional.scaled_dot_product_attention(*given)
    standard_error = draws.std(0) / 20
    assert ((draws.mean(0) - wanted).abs() / standard_error).max() < 6
    assert standard_error.min() > 0


def test_fuses_under_autocast() -> None:
    fuse, given = Counted(), operands()
    run = compiled(FORMS["causal_fill"], fuse)
    with torch.autocast("cpu", torch.bfloat16):
        out, original = run(*given), FORMS["causal_fill"](*given)
    assert len(fuse.records) == 1
    assert out.dtype == original.dtype == torch.bfloat16
    torch.testing.assert_close(out, original, rtol=2e-2, atol=2e-2)


def test_autocast_turns_a_provable_float_mask_into_the_flag() -> None:
    """Autocast would round the mask, and the lowest fp32 number with it to -inf."""

    def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k) + torch.full((S, S), LOWEST).triu(1)).softmax(-1) @ v

    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (scores(q, k) + bias).softmax(-1) @ v

    with torch.autocast("cpu", torch.bfloat16):
        (record,) = fuse_unfused(capture(summed, *operands()))
        assert fuse_unfused(capture(biased, *operands(), torch.randn(S, S))) == []
    assert record.site.kwargs["is_causal"] is True
    assert record.site.kwargs["attn_mask"] is None


def test_gradient_reaches_a_learned_bias() -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (scores(q, k) + bias).softmax(-1) @ v

    given = [*operands(), torch.randn(H, S, S).requires_grad_()]
    fuse = Counted()
    out, wanted = compiled(biased, fuse)(*given), biased(*given)
    assert len(fuse.records) == 1
    torch.testing.assert_close(
        *(torch.autograd.grad(result.sin().sum(), given[-1])[0] for result in (out, wanted)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("form", FORMS)
def test_restores_the_graph_byte_for_byte(form: str) -> None:
    graph = capture(FORMS[form], *operands(), dynamic=False)
    before = listing(graph)
    records = fuse_unfused(graph)
    assert listing(graph) != before
    for record in records:
        record.restore()
    assert listing(graph) == before


def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = scores(q, k).softmax(-1) @ v
    return scores(first, k).softmax(-1) @ first


def test_restores_one_of_two_and_commits_the_other() -> None:
    def change(graph: fx.GraphModule) -> None:
        first, second = fuse_unfused(graph)
        second.commit()
        first.restore()
        assert count(graph, *SDPA) == 1

    torch.testing.assert_close(compiled(two_layers, change)(*operands()), two_layers(*operands()))


def test_is_idempotent() -> None:
    graph = capture(two_layers, *operands())
    records = fuse_unfused(graph)
    assert len(records) == 2
    assert fuse_unfused(graph) == []
    for record in records:
        record.commit()
    assert fuse_unfused(graph) == []


def test_commit_erases_what_it_matched_and_nothing_else() -> None:
    def logged(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        seen.add_(1)
        return scores(q, k).softmax(-1) @ v

    graph = capture(logged, *operands(), torch.zeros(1))
    for record in fuse_unfused(graph):
        record.commit()
    graph.graph.lint()
    assert count(graph, "add_") == 1
    assert count(graph, "softmax") == 0


@pytest.mark.parametrize("form", ALONE)
def test_skips(form: str) -> None:
    graph = capture(ALONE[form], *operands(), dynamic=False)
    before = listing(graph)
    assert fuse_unfused(graph) == []
    assert listing(graph) == before


def test_keeps_the_meta_of_the_product() -> None:
    graph = capture(FORMS["multiplied"], *operands())
    product = next(node for node in graph.graph.nodes if node.target == "matmul")
    (record,) = fuse_unfused(graph)
    assert record.site.meta["stack_trace"] == product.meta["stack_trace"]
    assert record.site.meta["example_value"].shape == (B, H, S, D)


class Exported(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = nn.functional.dropout(
            scores(q, k).masked_fill(~causal(q, k), -math.inf).softmax(-1), 0.1, self.training
        )
        return torch.einsum("bhqk,bkhd->bqhd", weights, v.transpose(1, 2))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_fuses_exported_programs(strict: bool) -> None:
    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = exported(Exported().eval(), *operands(), dynamic_shapes=[{2: tokens}] * 3, strict=strict)
    before = listing(program.graph_module)
    (record,) = fuse_unfused(program.graph_module)
    record.restore()
    assert listing(program.graph_module) == before
    (record,) = fuse_unfused(program.graph_module)
    record.commit()
    program.graph_module.recompile()
    program.graph_module.graph.lint()
    given = operands(seq=40)
    torch.testing.assert_close(program.module()(*given), Exported().eval()(*given), rtol=1e-5, atol=1e-5)
    assert record.site.target is SDPA[1]


def llama() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager"), torch.randint(1, 90, (2, 16))


def gpt2() -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager"), torch.randint(1, 90, (2, 16))


def diffusers_processor() -> tuple[nn.Module, Tensor]:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    layers = [Attention(32, heads=4, dim_head=8, processor=AttnProcessor()) for _ in range(2)]
    return nn.Sequential(*layers), torch.randn(2, 16, 32)


@pytest.mark.models
@pytest.mark.parametrize("build", [llama, gpt2, diffusers_processor])
def test_fuses_eager_attention_of_models(build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, given = build()
    model = model.eval()
    fuse = Counted()
    arguments = {} if given.is_floating_point() else {"use_cache": False}
    out, wanted = compiled(model, fuse)(given, **arguments), model(given, **arguments)
    assert len(fuse.records) == 2
    out, wanted = (getattr(result, "logits", result) for result in (out, wanted))
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    weight = next(model.parameters())
    torch.testing.assert_close(
        *(torch.autograd.grad(result.square().mean(), weight)[0] for result in (out, wanted)), rtol=1e-3, atol=1e-6
    )
