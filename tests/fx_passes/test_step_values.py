"""Steps in compiled models: one graph for every step, a second one where a rule begins or ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.attention_model import Blocks, SelfAttention, tokens
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sparseattn
from sparseattn import Policy, Rule, Schedule
from sparseattn.attn_ops.errors import PolicyError

BLOCKS = {"block_q": 16, "block_k": 16}
LINE = Schedule(kind="linear", start=1.0, end=0.25)


def block_topk(x: Tensor, model: SelfAttention, keep_ratio: Any) -> Tensor:
    """The model with block_topk in the place of its attention, by the op."""
    q, k, v = (part.unflatten(-1, (model.heads, -1)).transpose(1, 2) for part in model.qkv(x).chunk(3, dim=-1))
    given = {"keep_ratios": torch.tensor(keep_ratio)} if isinstance(keep_ratio, list) else {"keep_ratio": keep_ratio}
    out = sparseattn.ops.block_topk_attention(q, k, v, **given, **BLOCKS)[0]
    return out.transpose(1, 2).flatten(2)


def compiled(model: Any, *rules: Rule, inner: str = "aot_eager", **how: Any) -> Any:
    options = {"policy": Policy(rules), "inner_backend": inner}
    return torch.compile(model, backend="sparseattn", fullgraph=True, options=options, **how)


def keep(ratio: Any, use: str = "block_topk", **where: Any) -> Rule:
    return Rule(use, params={"keep_ratio": ratio, **BLOCKS}, **where)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_twenty_steps_of_another_ratio_are_one_graph(inner: str) -> None:
    model, x = SelfAttention(), tokens()
    run, counters = compiled(model, keep(LINE), inner=inner), torch._dynamo.utils.counters["stats"]
    counters.clear()
    with torch.no_grad():
        for index in sparseattn.steps(range(20)):
            ratio = 1.0 - 0.75 * index / 19
            torch.testing.assert_close(run(x), block_topk(x, model, ratio), rtol=1e-4, atol=1e-5)
    assert counters["unique_graphs"] == 1


def test_a_rule_that_begins_later_makes_a_second_graph() -> None:
    model, x = SelfAttention(), tokens()
    run, counters = compiled(model, keep(LINE, steps="5:-2")), torch._dynamo.utils.counters["stats"]
    counters.clear()
    backends = []
    with torch.no_grad():
        for _ in range(2):
            for index in sparseattn.steps(range(10)):
                out, sparse = run(x), 5 <= index < 8
                wanted = (
                    block_topk(x, model, LINE.at(sparseattn.steps(index, 10).__enter__(), "")) if sparse else model(x)
                )
                torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
                backends.append(sparseattn.last_report().rows[0].decision.backend)
    assert counters["unique_graphs"] == 2
    assert set(backends) == {None, "block_topk"}


def test_a_number_for_each_head() -> None:
    model, x = SelfAttention(), tokens()
    with torch.no_grad():
        out = compiled(model, keep([1.0, 0.25]))(x)
        torch.testing.assert_close(out, block_topk(x, model, [1.0, 0.25]), rtol=1e-4, atol=1e-5)


def test_a_table_may_mix_numbers_and_lists_of_heads() -> None:
    model, x = SelfAttention(), tokens()
    heads = [0.25 + 0.5 * (i % 2) for i in range(model.heads)]
    run = compiled(model, keep(Schedule(kind="table", values=(0.5, heads))), inner="inductor")
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    with torch.no_grad():
        for index, ratio in enumerate((0.5, heads)):
            with sparseattn.steps(index, 2):
                torch.testing.assert_close(run(x), block_topk(x, model, ratio), rtol=1e-4, atol=1e-5)
    assert counters["unique_graphs"] == 1
    with pytest.raises(PolicyError, match="as many numbers at every step, got 2 and 3"):
        Schedule(kind="table", values=((0.1, 0.2), (0.1, 0.2, 0.3)))


def test_a_list_of_another_length_stays_dense_with_the_reason() -> None:
    model, x = SelfAttention(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, keep([1.0, 0.5, 0.2]))(x), model(x), rtol=1e-4, atol=1e-5)
    assert "keep_ratio has 3 values, one for each head, and there are 2 heads" in str(sparseattn.last_report())


def test_without_a_step_the_rule_does_not_match_and_a_schedule_is_an_error() -> None:
    model, x = SelfAttention(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, keep(0.25, steps="5:"))(x), model(x), rtol=1e-4, atol=1e-5)
        assert "no step is set (sparseattn.steps)" in str(sparseattn.last_report())
        torch._dynamo.reset()
        with pytest.raises(sparseattn.attn_ops.errors.PolicyError, match="keep_ratio follows the steps"):
            compiled(model, keep(LINE))(x)


def test_explain_decides_for_the_step_that_is_set() -> None:
    chosen = []
    for index in sparseattn.steps(range(4)):
        report = sparseattn.explain(SelfAttention(), tokens(), policy=Policy([keep(LINE, steps="2:")]))
        chosen.append(report.rows[0].decision.backend)
        assert index < 2 or "keep_ratio=(linear 1 to 0.25 over :)" in str(report)
    assert chosen == [None, None, "block_topk", "block_topk"]
    assert '"kind": "linear"' in report.to_json()


class Checkpointed(Blocks):
    """The blocks, each under activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", [Blocks, Checkpointed])
def test_training_follows_the_steps(kind: type[Blocks], inner: str) -> None:
    """The value is an input of the checkpointed region too, and kept for the backward."""
    model, x = kind(), tokens()
    run, counters = compiled(model, keep(LINE), inner=inner), torch._dynamo.utils.counters["stats"]
    counters.clear()
    for index in sparseattn.steps(range(4)):
        model.zero_grad()
        run(x).square().sum().backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        out = x
        for block in model.blocks:
            out = out + block_topk(out, block, 1.0 - 0.25 * index)
        out.square().sum().backward()
        for gradient, parameter in zip(got, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)
    assert counters["unique_graphs"] == 1


def test_one_value_for_two_layers_is_one_input() -> None:
    from support.graphs import capture

    from sparseattn.fx_passes.rewrite import rewrite_graph
    from sparseattn.fx_passes.step_values import StepValues

    module = capture(Blocks(), tokens())
    before = len(module.graph.find_nodes(op="placeholder"))
    values = StepValues(module)
    rewrite_graph(module, Policy([keep(LINE, modules="blocks.0"), keep(LINE)]), values=values)
    assert len(module.graph.find_nodes(op="placeholder")) == before + 1
    assert [value.shape for value in values.examples()] == [()]


def test_a_graph_that_nobody_feeds_refuses_a_schedule() -> None:
    from support.graphs import capture

    from sparseattn.fx_passes.rewrite import rewrite_graph

    with pytest.raises(sparseattn.attn_ops.errors.PolicyError, match=r"keep_ratio of .* follows the steps or differs"):
        rewrite_graph(capture(SelfAttention(), tokens()), Policy([keep(LINE)]))


def test_a_region_that_takes_no_more_operands_is_named() -> None:
    model = SelfAttention()

    def branch(flag: Tensor, x: Tensor) -> Tensor:
        return torch.cond(flag, model, lambda x: x + 1, (x,))

    run = compiled(branch, keep(LINE))
    with torch.no_grad(), sparseattn.steps(0, 4), pytest.raises(Exception, match="cannot enter a region of cond"):
        run(torch.tensor(True), tokens())


@pytest.mark.parametrize(
    ("rule", "op", "argument"),
    [
        (Rule("sla", params={"keep_ratio": LINE}), "sparse_linear_attention", "keep_ratios"),
        (Rule("sparge", params={"keep_ratio": LINE}), "sparge_attention", "keep_ratios"),
        (Rule("sparge", params={"mass": LINE}), "sparge_attention", "masses"),
        (Rule("sage_sla", params={"sparsity": LINE}), "sage_sparse_linear_attention", "keep_ratios"),
        (Rule("vsa", params={"keep_ratio": LINE}, layout=(4, 8, 8)), "video_sparse_attention", "sparsities"),
    ],
)
def test_every_method_with_a_ratio_follows_it(rule: Rule, op: str, argument: str) -> None:
    torch._dynamo.reset()
    options = {"policy": Policy([rule]), "inner_backend": "eager"}
    model, x = SelfAttention(), tokens(length=256)
    run = torch.compile(model, backend="sparseattn", fullgraph=True, options=options)
    with torch.no_grad():
        outs = [run(x) for _ in sparseattn.steps(range(3))]
    assert not torch.equal(outs[0], outs[2])
    (row,) = sparseattn.last_report().rows
    assert (row.decision.op, row.decision.provider) == (op, "cpu")
    assert argument in {param.tensor for param in sparseattn.backends()[row.decision.backend].params}
