"""backend="sparseattn" from the outside: what a user types, what they get, what they are told."""

from __future__ import annotations

import logging

import pytest
import torch
from support.attention_model import Blocks, SelfAttention, tokens
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sparseattn

EAGER = {"inner_backend": "aot_eager"}
TOP_K = {"rules": [{"use": "block_topk", "params": {"keep_ratio": 1.0, "block_q": 16, "block_k": 16}}]}


def _compile(model, policy="exact", **options):
    fullgraph, dynamic = options.pop("fullgraph", True), options.pop("dynamic", None)
    given = {"policy": policy, **EAGER, **options}
    return torch.compile(model, backend="sparseattn", fullgraph=fullgraph, dynamic=dynamic, options=given)


def test_output_and_gradients_equal_dense() -> None:
    model, x = Blocks(), tokens()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = _compile(model)
    out = compiled(x)
    torch.testing.assert_close(out, model(x))
    out.square().sum().backward()
    assert sparseattn.last_report().rewritten == 2
    for parameter, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-4)


def test_inductor_is_the_default_inner_backend_and_takes_mode_and_options() -> None:
    model, x = SelfAttention(), tokens()
    with torch.no_grad():
        for options in (
            {},
            {"mode": "max-autotune-no-cudagraphs"},
            {"options": {"policy": "exact", "epilogue_fusion": False}},
        ):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="sparseattn", **options)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_sites_are_named_by_module_and_line() -> None:
    report = sparseattn.explain(Blocks(), tokens(), policy="exact")
    assert [row.module for row in report.rows] == ["blocks.0", "blocks.1"]
    assert all(row.source.startswith("attention_model.py:") for row in report.rows)


def test_one_graph_serves_five_lengths() -> None:
    compiled, counter = _compile(SelfAttention(is_causal=True), dynamic=True), torch._dynamo.utils.counters["stats"]
    counter.clear()
    for length in (48, 64, 65, 127, 200):
        x = tokens(length=length)
        torch.testing.assert_close(compiled(x), SelfAttention.forward(compiled._orig_mod, x), rtol=1e-4, atol=1e-5)
    assert counter["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"attn_mask": torch.randn(64, 64)}, "float mask"),
        ({"attn_mask": torch.rand(64, 64) > 0.3}, "bool mask"),
        ({"dropout_p": 0.5}, "dropout 0.5"),
    ],
)
def test_a_site_it_cannot_serve_stays_as_it_was(arguments, word) -> None:
    model, x = SelfAttention(**arguments).eval(), tokens()
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        actual = torch.compile(model, backend="sparseattn", options={"policy": "exact", "inner_backend": "eager"})(x)
    torch.testing.assert_close(actual, expected)
    (decision,) = sparseattn.last_report().decisions
    assert decision.is_dense
    assert word in str(decision.rejected)


def test_quantized_under_grad_stays_dense_with_the_reason() -> None:
    _compile(SelfAttention(), policy={"rules": [{"use": "sage"}]})(tokens())
    (decision,) = sparseattn.last_report().decisions
    assert decision.is_dense
    assert "gradient" in str(decision.rejected)


def test_cross_attention_is_never_sparse() -> None:
    def attend(q, k):
        return functional.scaled_dot_product_attention(q, k, k)

    report = sparseattn.explain(attend, torch.randn(1, 2, 256, 16), torch.randn(1, 2, 32, 16), policy=TOP_K)
    (decision,) = report.decisions
    assert decision.is_dense
    assert "cross" in str(decision.rejected)


def test_head_dim_above_the_limit_stays_dense() -> None:
    q = torch.randn(1, 1, 8, 320)
    report = sparseattn.explain(lambda q: functional.scaled_dot_product_attention(q, q, q), q, policy="exact")
    (decision,) = report.decisions
    assert decision.is_dense
    assert "head_dim 320" in str(decision.rejected)


def test_require_raises_at_compile_time_with_every_reason() -> None:
    policy = {"rules": [{"use": "sage", "mode": "require"}]}
    with pytest.raises(Exception, match="gradient") as raised:
        _compile(SelfAttention(), policy=policy)(tokens())
    assert "sage" in str(raised.value)


def test_wrong_options_name_the_nearest() -> None:
    for options, word in (
        ({"polcy": "exact"}, "policy"),
        ({"policy": "exakt"}, "exact"),
        ({"inner_backend": "inductr"}, "inductor"),
        ({"inner_backend": "eager", "epilogue_fusion": False}, "epilogue_fusion"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=word):
            torch.compile(SelfAttention(), backend="sparseattn", options=options)(tokens())


def test_policy_change_recompiles_in_the_same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = SelfAttention(), tokens()
    compiled = torch.compile(model, backend="sparseattn", options=EAGER)
    with torch.no_grad():
        compiled(x)
        assert dict(sparseattn.last_report().chosen) == {"flash": 1}
        with sparseattn.use_policy(TOP_K):
            compiled(x)
            assert dict(sparseattn.last_report().chosen) == {"block_topk": 1}
        monkeypatch.setenv("SPARSEATTN_DISABLE", "1")
        before = sparseattn.last_report()
        torch.testing.assert_close(compiled(x), model(x))
        assert sparseattn.last_report() is before
        monkeypatch.delenv("SPARSEATTN_DISABLE")
        _compile(model, policy=TOP_K)(x)
        assert dict(sparseattn.last_report().chosen) == {"block_topk": 1}


def test_sub_graphs_are_rewritten() -> None:
    block = SelfAttention()

    def checkpointed(x):
        return checkpoint(block, x, use_reentrant=False).sum()

    def conditional(x):
        return torch.cond(x.sum() > 0, lambda x: block(x), lambda x: block(-x), (x,))

    def scanned(x):
        def step(carry, row):
            carry = block(carry + row)
            return carry, carry.mean()

        return torch._higher_order_ops.scan(step, x, torch.ones(3, 1, 1, 1))[0]

    @torch.compiler.nested_compile_region
    def region(x):
        return block(x)

    def nested(x):
        return region(region(x))

    cases = [(checkpointed, 1), (conditional, 2), (nested, 2)]
    if torch.__version__ >= "2.13":  # aot_eager of torch 2.11 refuses this scan, without us too
        cases.append((scanned, 1))
    for function, sites in cases:
        torch._dynamo.reset()
        x = tokens()
        actual = _compile(function)(x)
        torch.testing.assert_close(actual, function(x), rtol=1e-4, atol=1e-4)
        assert sparseattn.last_report().rewritten == sites


def test_one_graph_serves_the_layers_of_a_model_compiled_one_by_one() -> None:
    """A layer's number that reaches the graph as a Python int is a graph per layer, up to the recompilation limit."""
    model, x = Blocks(layers=12), tokens().requires_grad_()
    expected = model(x)
    for block in model.blocks:
        block.compile(backend="sparseattn", fullgraph=True, options={"policy": TOP_K, **EAGER})
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_functorch_sites_are_left_alone_with_the_reason() -> None:
    def loss(q):
        return functional.scaled_dot_product_attention(q, q, q).sum()

    q = torch.randn(1, 2, 16, 8)
    actual = _compile(torch.func.grad(loss))(q)
    torch.testing.assert_close(actual, torch.func.grad(loss)(q), rtol=1e-4, atol=1e-5)
    assert "torch.func" in str(sparseattn.last_report().decisions)


def test_autocast_runs_the_op_in_the_autocast_dtype() -> None:
    model, x = SelfAttention(), tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = model(x), _compile(model)(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert sparseattn.last_report().rows[0].call.dtype == torch.bfloat16


def test_rewriting_twice_changes_nothing_more() -> None:
    from support.graphs import capture

    from sparseattn.fx_passes.rewrite import rewrite_graph

    module = capture(Blocks(), tokens())
    policy = sparseattn.Policy.preset("exact")
    assert rewrite_graph(module, policy).rewritten == 2
    code = module.code
    assert rewrite_graph(module, policy).rows == ()
    assert module.code == code


def test_exported_program_is_rewritten() -> None:
    from sparseattn.fx_passes.rewrite import rewrite_graph

    model, x = Blocks(is_causal=True).eval(), tokens()
    program = torch.export.export(model, (x,))
    report = rewrite_graph(program.graph_module, sparseattn.Policy.preset("exact"))
    assert report.rewritten == 2
    assert [row.module for row in report.rows] == ["blocks.0", "blocks.1"]
    torch.testing.assert_close(program.module()(x), model(x))


def test_the_provider_is_pinned_in_the_node() -> None:
    from support.graphs import capture

    from sparseattn.fx_passes.rewrite import rewrite_graph

    module = capture(SelfAttention(scale=0.3, is_causal=True), tokens())
    rewrite_graph(module, sparseattn.Policy.preset("exact"))
    (node,) = module.graph.find_nodes(op="call_function", target=torch.ops.sparseattn.flash_attention.default)
    assert node.kwargs == {"causal": True, "scale": 0.3, "provider": "torch"}


def test_one_info_line_per_graph(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sparseattn"):
        _compile(Blocks())(tokens())
    lines = [record.message for record in caplog.records if record.name == "sparseattn"]
    assert len(lines) == 1
    assert "2 attention sites: 2 flash" in lines[0]


def test_unfused_attention_that_feeds_attention() -> None:
    def attend(q, k, v):
        first = torch.softmax(q @ k.mT * 0.3, dim=-1) @ v
        return torch.softmax(first @ k.mT * 0.3, dim=-1) @ first

    q, k, v = torch.randn(3, 1, 2, 32, 16)
    torch.testing.assert_close(_compile(attend)(q, k, v), attend(q, k, v), rtol=1e-4, atol=1e-5)
    assert sparseattn.last_report().rewritten == 2
    first_only = {"rules": [{"use": "flash", "max_seq": 32, "min_seq": 32}]}
    torch.testing.assert_close(_compile(attend, first_only)(q, k, v), attend(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recorded", "path"),
    [
        ("L['self'].blocks.0.attn1", "blocks.0.attn1"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn1", "blocks.0.attn1"),
        ("L['model']._modules['layers'][3].attn", "layers.3.attn"),
        ("L['self']", ""),
        ("L['function'].__closure__[0].cell_contents.attn", "attn"),
        ("blocks.0", "blocks.0"),
    ],
)
def test_module_paths_are_read_however_dynamo_writes_them(recorded: str, path: str) -> None:
    from sparseattn.fx_passes.sites import module_path

    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"0": (recorded, torch.nn.Module)}
    assert module_path(node) == path


def test_distributed_tensors_are_left_alone_with_the_reason() -> None:
    from torch.distributed.tensor import DTensor, init_device_mesh

    from sparseattn.fx_passes.sites import read_site

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        graph = torch.fx.Graph()
        q = graph.placeholder("q")
        node = graph.call_function(functional.scaled_dot_product_attention, (q, q, q))
        q.meta["example_value"] = DTensor.from_local(torch.randn(1, 2, 8, 16), init_device_mesh("cpu", (1,)))
        assert "DTensor" in read_site(node).call.barrier
    finally:
        torch.distributed.destroy_process_group()
