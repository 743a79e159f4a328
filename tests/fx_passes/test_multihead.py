"""open_multihead: what it opens, what it leaves alone, and that it can be undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import capture, compiled, count, fresh_dynamo, listing  # noqa: F401
from torch import Tensor, fx, nn

from sparseattn.fx_passes.normalize import Normalized, opaque_sites, open_multihead

SDPA = torch.ops.aten.scaled_dot_product_attention.default
MULTIHEAD = torch.nn.functional.multi_head_attention_forward


class Attend(nn.Module):
    """nn.MultiheadAttention and how it is called."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Any], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(32, 4, **{"batch_first": True, **options})
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.call(self.attention, x)
        return out


def above(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)


CALLS: dict[str, tuple[Callable[[nn.Module, Tensor], Any], dict[str, Any]]] = {
    "no_weights": (lambda attend, x: attend(x, x, x, need_weights=False)[0], {}),
    "weights_not_used": (lambda attend, x: attend(x, x, x)[0], {}),
    "tokens_first": (lambda attend, x: attend(x, x, x)[0], {"batch_first": False}),
    "bool_mask": (lambda attend, x: attend(x, x, x, attn_mask=above(x), need_weights=False)[0], {}),
    "float_mask": (lambda attend, x: attend(x, x, x, attn_mask=above(x) * -2.0)[0], {}),
    "key_padding": (lambda attend, x: attend(x, x, x, key_padding_mask=x[:, :, 0] > 1)[0], {}),
    "causal": (lambda attend, x: attend(x, x, x, attn_mask=above(x), is_causal=True, need_weights=False)[0], {}),
    "causal_only_promised": (lambda attend, x: attend(x, x, x, attn_mask=above(x) * -2.0, is_causal=True)[0], {}),
    "cross": (lambda attend, x: attend(x, x[:, :5], x[:, :5])[0], {}),
    "no_bias": (lambda attend, x: attend(x, x, x)[0], {"bias": False}),
    "other_widths": (lambda attend, x: attend(x, x[..., :8], x[..., :8])[0], {"kdim": 8, "vdim": 8}),
    "zero_key": (lambda attend, x: attend(x, x, x)[0], {"add_zero_attn": True}),
}


def given(seq: int = 12) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, seq, 32)


class Opened:
    """open_multihead, remembering its records."""

    def __init__(self) -> None:
        self.records: list[Normalized] = []

    def __call__(self, graph: fx.GraphModule) -> None:
        self.records += open_multihead(graph)
        for record in self.records[-1:]:
            record.commit()
        assert count(graph, MULTIHEAD) == 0
        assert count(graph, SDPA) == 1


@pytest.mark.parametrize("name", CALLS)
def test_opens_and_computes_the_same(name: str) -> None:
    call, options = CALLS[name]
    model, opened = Attend(call, **options), Opened()
    x, twin = given().requires_grad_(), given().requires_grad_()
    out, wanted = compiled(model, opened)(x), model(twin)
    assert len(opened.records) == 1
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    weights = list(model.parameters())
    grads = torch.autograd.grad(out.sin().sum(), [x, *weights])
    torch.testing.assert_close(grads, torch.autograd.grad(wanted.sin().sum(), [twin, *weights]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["weights_not_used", "bool_mask", "key_padding", "other_widths"])
def test_opens_dynamic_shapes_in_one_graph(name: str) -> None:
    call, options = CALLS[name]
    model, opened = Attend(call, **options).eval(), Opened()
    run, first = compiled(model, opened), given()
    torch._dynamo.mark_dynamic(first, 1)
    with torch.no_grad():
        for x in (first, given(20), given(7)):
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(opened.records) == 1


def test_keeps_dropout_in_training_and_drops_it_in_evaluation() -> None:
    for training, wanted in ((True, 0.3), (False, 0.0)):
        torch._dynamo.reset()
        model = Attend(CALLS["no_weights"][0], dropout=0.3).train(training)
        (record,) = open_multihead(capture(model, given(), grad=training))
        arguments = dict(zip(("q", "k", "v", "attn_mask", "dropout_p"), record.site.args, strict=False))
        assert arguments.get("dropout_p", 0.0) == wanted


def test_opens_under_autocast() -> None:
    model, opened = Attend(CALLS["weights_not_used"][0]), Opened()
    run = compiled(model, opened)
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = run(given()), model(given())
    assert out.dtype == wanted.dtype == opened.records[0].site.meta["example_value"].dtype
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)


def test_opens_where_the_graph_switches_autocast_on() -> None:
    def call(attend: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = attend(x, x, x)[0]
        return out

    model, opened = Attend(call), Opened()
    out, wanted = compiled(model, opened)(given()), model(given())
    assert out.dtype == wanted.dtype == opened.records[0].site.meta["example_value"].dtype
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", CALLS)
def test_restores_the_graph_byte_for_byte(name: str) -> None:
    call, options = CALLS[name]
    graph = capture(Attend(call, **options), given())
    before, attributes = listing(graph), set(vars(graph))
    (record,) = open_multihead(graph)
    assert listing(graph) != before
    record.restore()
    assert listing(graph) == before
    assert set(vars(graph)) == attributes


def test_is_idempotent() -> None:
    graph = capture(Attend(CALLS["no_weights"][0]), given())
    assert len(open_multihead(graph)) == 1
    assert open_multihead(graph) == []


def test_gives_the_nodes_the_meta_of_the_module() -> None:
    graph = capture(Attend(CALLS["no_weights"][0]), given())
    node = next(node for node in graph.graph.nodes if node.target is MULTIHEAD)
    (record,) = open_multihead(graph)
    assert record.site.meta["nn_module_stack"] == node.meta["nn_module_stack"]
    assert record.site.meta["example_value"].shape == (2, 4, 12, 8)


def test_skips_and_reports_weights_that_are_used() -> None:
    graph = capture(Attend(lambda attend, x: sum(part.sum() for part in attend(x, x, x))), given())
    before = listing(graph)
    assert open_multihead(graph) == []
    assert listing(graph) == before
    ((node, reason),) = opaque_sites(graph)
    assert node.target is MULTIHEAD
    assert "need_weights=False" in reason


def test_reports_the_fast_path_of_the_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    graph = capture(layer, given())
    ((_, reason),) = opaque_sites(graph)
    assert "set_fastpath_enabled(False)" in reason


def test_reports_nothing_of_what_it_opens() -> None:
    assert list(opaque_sites(capture(Attend(CALLS["no_weights"][0]), given()))) == []
