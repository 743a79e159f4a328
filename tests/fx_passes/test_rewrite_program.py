"""rewrite: exported programs and graphs get the ops that backend="sparseattn" would put there, and stay valid."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from support.attention_model import Blocks, SelfAttention, tokens
from support.graphs import capture, count, fresh_dynamo  # noqa: F401  (autouse)
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn import functional

import sparseattn
from sparseattn import Policy, Rule
from sparseattn.attn_ops.errors import PolicyError, RequirementError, UnsupportedError

SMALL = {"block_q": 16, "block_k": 16}
SDPA = torch.ops.aten.scaled_dot_product_attention.default
TOPK_OP = torch.ops.sparseattn.block_topk_attention.default
DYNAMIC = torch.export.Dim.DYNAMIC
STAGES = pytest.mark.parametrize("decompose", [False, True], ids=["training_ir", "decomposed"])
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
LINEAR = {"kind": "linear", "start": 1.0, "end": 0.25}


def topk(keep_ratio: Any = 0.5, **rule: Any) -> Policy:
    return Policy([Rule("block_topk", params={**SMALL, "keep_ratio": keep_ratio}, **rule)])


def exported(model: nn.Module, *args: Any, decompose: bool = False, **how: Any) -> ExportedProgram:
    program = torch.export.export(model.eval().requires_grad_(False), args, **how)
    return program.run_decompositions() if decompose else program


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def compiled(model: nn.Module, policy: Policy) -> Any:
    return torch.compile(model, backend="sparseattn", options={"policy": policy, "inner_backend": "aot_eager"})


@STRICT
@STAGES
def test_equals_the_compiled_model_at_any_length(strict: bool, decompose: bool) -> None:
    model = Blocks()
    program = exported(model, tokens(), decompose=decompose, strict=strict, dynamic_shapes=({1: DYNAMIC},))
    result, report = sparseattn.rewrite(program, topk())
    assert report.chosen == {"block_topk": 2}
    assert [row.module for row in report.rows] == ["blocks.0", "blocks.1"]
    assert [row.call.dynamic for row in report.rows] == [("seq_q", "seq_k")] * 2
    again = saved_and_loaded(result).module()
    for length in (32, 64, 100):
        x = tokens(length=length)
        torch.testing.assert_close(again(x), compiled(model, topk())(x), rtol=1e-5, atol=1e-5)


@STAGES
def test_the_given_program_is_left_as_it_is(decompose: bool) -> None:
    program = exported(Blocks(), tokens(), decompose=decompose)
    before = program.graph_module.code, str(program.graph_signature)
    result, _ = sparseattn.rewrite(program, topk())
    program.graph_module.recompile()
    assert (program.graph_module.code, str(program.graph_signature)) == before
    assert result.state_dict is program.state_dict
    assert result.graph_module.code != before[0]


@STAGES
def test_a_site_that_stays_dense_stays_as_it_was(decompose: bool) -> None:
    program = exported(Blocks(), tokens(), decompose=decompose)
    result, report = sparseattn.rewrite(program, topk(min_seq=1000))
    assert report.rewritten == 0
    assert result.graph_module.code == program.graph_module.code


@STAGES
def test_no_dead_mask_is_left(decompose: bool) -> None:
    program = exported(SelfAttention(is_causal=True), tokens(), decompose=decompose)
    result, report = sparseattn.rewrite(program, topk())
    assert report.rows[0].call.causal
    names = [str(node.target) for node in result.graph.nodes]
    assert not [name for name in names if "arange" in name or "softmax" in name or "where" in name]


class Regions(nn.Module):
    """Attention without gradients, under autocast, in both branches of a cond, and as a result of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, x: Tensor, flag: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            first = _attend(self.project(x))
        with torch.autocast("cpu", torch.bfloat16):
            second = _attend(x)
        third = torch.cond(flag, _attend, _attend_twice, (x,))
        return first + second + third, _attend(x)


def _attend(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x, x)


def _attend_twice(x: Tensor) -> Tensor:
    return _attend(x) * 2


@STRICT
@STAGES
def test_sub_graphs_are_rewritten(strict: bool, decompose: bool) -> None:
    model, x = Regions(), torch.randn(2, 4, 64, 16)
    program = exported(model, x, torch.tensor(True), decompose=decompose, strict=strict)
    result, report = sparseattn.rewrite(program, topk(1.0))
    assert report.chosen == {"block_topk": 5}
    loaded = saved_and_loaded(result)
    assert [spec.arg.name for spec in loaded.graph_signature.output_specs] == [
        spec.arg.name for spec in program.graph_signature.output_specs
    ]
    for flag in (True, False):
        expected = program.module()(x, torch.tensor(flag))
        torch.testing.assert_close(loaded.module()(x, torch.tensor(flag)), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(loaded.module()(x, torch.tensor(flag))[1], expected[1], rtol=1e-5, atol=1e-5)


def test_decompositions_keep_the_op() -> None:
    result, _ = sparseattn.rewrite(exported(Blocks(), tokens()), topk())
    decomposed = result.run_decompositions()
    assert count(decomposed.graph_module, TOPK_OP) == 2
    x = tokens()
    torch.testing.assert_close(decomposed.module()(x), result.module()(x))


def test_a_program_rewritten_twice_has_nothing_left_to_rewrite() -> None:
    program = exported(Blocks(heads=2), tokens())
    once, _ = sparseattn.rewrite(program, topk([0.25, 1.0], modules="blocks.0"))
    twice, report = sparseattn.rewrite(once, topk([1.0, 0.25]))
    assert [row.module for row in report.rows] == ["blocks.1"]
    assert len(twice.constants) == 2
    x = tokens()
    expected = sparseattn.rewrite(
        program, Policy([*topk([0.25, 1.0], modules="blocks.0").rules, *topk([1.0, 0.25]).rules])
    )[0]
    torch.testing.assert_close(saved_and_loaded(twice).module()(x), expected.module()(x), rtol=0, atol=0)


@STAGES
def test_numbers_of_heads_become_constants(decompose: bool) -> None:
    policy, model, x = topk([0.25, 1.0]), Blocks(heads=2), tokens()
    result, _ = sparseattn.rewrite(exported(model, x, decompose=decompose), policy)
    kinds = [spec.kind for spec in result.graph_signature.input_specs]
    assert kinds[-2:] == [InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT]
    loaded = saved_and_loaded(result).module()
    torch.testing.assert_close(loaded(x), compiled(model, policy)(x), rtol=1e-5, atol=1e-5)


class NoGradBlocks(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = super().forward(x)
        return x * 2


def test_constants_are_handed_into_sub_graphs() -> None:
    x = tokens()
    model = NoGradBlocks(heads=2)
    result, report = sparseattn.rewrite(exported(model, x), topk([0.25, 1.0]))
    assert report.rewritten == 2
    expected = compiled(model, topk([0.25, 1.0]))(x)
    torch.testing.assert_close(saved_and_loaded(result).module()(x), expected, rtol=1e-5, atol=1e-5)


def test_constants_cannot_enter_a_cond() -> None:
    program = exported(Regions(), torch.randn(2, 4, 64, 16), torch.tensor(True))
    with pytest.raises(PolicyError, match=r"cannot enter a region of cond\. Give its layers one number"):
        sparseattn.rewrite(program, topk([0.25, 0.5, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        (topk(LINEAR), r"rule 1 follows the steps of a loop \(keep_ratio is linear 1 to 0.25"),
        (topk(steps="10:"), r"rule 1 follows the steps of a loop \(steps = '10:'\)"),
    ],
)
def test_what_follows_the_steps_is_refused(policy: Policy, what: str) -> None:
    with pytest.raises(PolicyError, match=what) as caught:
        sparseattn.rewrite(exported(Blocks(), tokens()), policy)
    assert "step=(i, n)" in str(caught.value)


def test_one_program_for_each_step() -> None:
    program, x = exported(Blocks(), tokens()), tokens()
    for step, ratio in ((0, 1.0), (49, 0.25)):
        result, report = sparseattn.rewrite(program, topk(LINEAR), step=(step, 50))
        expected, _ = sparseattn.rewrite(program, topk(ratio))
        torch.testing.assert_close(saved_and_loaded(result).module()(x), expected.module()(x), rtol=0, atol=0)
        assert f"for step {step} of 50 alone" in str(report)


def test_the_step_may_be_set_around_it() -> None:
    program = exported(Blocks(), tokens())
    with sparseattn.steps(3, 50):
        assert sparseattn.rewrite(program, topk(steps=":10"))[1].rewritten == 2
    assert sparseattn.rewrite(program, topk(steps=":10"), step=(10, 50))[1].rewritten == 0


@pytest.mark.parametrize("use", ["sla", "vsa"])
@STRICT
def test_converted_parameters_come_through(use: str, strict: bool) -> None:
    params = {**SMALL, "keep_ratio": 0.25} if use == "sla" else {"tile": (2, 4, 4), "sparsity": 0.5}
    policy = Policy([Rule(use, params=params, layout=None if use == "sla" else (4, 4, 8))])
    model, x = Blocks().eval(), tokens(length=128)
    conversion = sparseattn.convert(model, policy, (x,))
    with torch.no_grad():
        for parameter in conversion.parameters():
            parameter.normal_(std=0.3)
    result, report = sparseattn.rewrite(exported(model, x, strict=strict), policy)
    assert report.chosen == {use: 2}
    assert "attach" not in result.graph_module.code
    torch.testing.assert_close(saved_and_loaded(result).module()(x), compiled(model, policy)(x), rtol=1e-5, atol=1e-5)


def test_tiling_is_hoisted_and_results_keep_their_names() -> None:
    policy = Policy([Rule("sta", params={"tile": (2, 2, 2), "window": (1, 1, 1)}, layout=(4, 4, 4))])
    program, x = exported(Blocks(layers=3), tokens()), tokens()
    result, report = sparseattn.rewrite(program, policy)
    plain, _ = sparseattn.rewrite(program, policy, hoist_tiling=False)
    assert report.hoisted.sites == 3
    assert str(result.graph_signature.output_specs) == str(program.graph_signature.output_specs)
    torch.testing.assert_close(saved_and_loaded(result).module()(x), plain.module()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("machine", "provider"), [("sm90", "triton"), ("sm80", "triton"), ("cpu", "cpu")])
def test_retargeting_pins_the_provider_of_another_machine(machine: str, provider: str) -> None:
    model, x = Blocks().to(torch.bfloat16), tokens().to(torch.bfloat16)
    result, report = sparseattn.rewrite(exported(model, x), Policy([Rule("sage", mode="require")]), capability=machine)
    assert report.capability.startswith(machine)
    assert [decision.provider for decision in report.decisions] == [provider] * 2
    if provider == "cpu":
        assert result.module()(x).shape == x.shape
    else:
        with pytest.raises(UnsupportedError, match="triton: needs a cuda device, this is cpu"):
            result.module()(x)


def test_a_requirement_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(RequirementError, match="needs a cuda device"):
        sparseattn.rewrite(exported(Blocks(), tokens()), topk(provider="triton", mode="require"), capability="cpu")


def test_a_graph_of_dynamo() -> None:
    model, x = SelfAttention(), tokens()
    graph = capture(model, x)
    before = graph.code
    result, report = sparseattn.rewrite(graph, topk([0.25, 1.0]))
    assert report.rewritten == 1
    assert graph.code == before
    by_shape = {tuple(tensor.shape): tensor for tensor in (x, *model.parameters())}
    given = [by_shape[tuple(node.meta["example_value"].shape)] for node in result.graph.find_nodes(op="placeholder")]
    torch.testing.assert_close(result(*given)[0], compiled(model, topk([0.25, 1.0]))(x), rtol=1e-5, atol=1e-5)


def test_a_graph_of_export_is_called_as_before() -> None:
    model, x = Blocks(), tokens()
    graph = exported(model, x).module()
    result, report = sparseattn.rewrite(graph, topk([0.25, 1.0]))
    assert report.rewritten == 2
    assert count(graph, SDPA) == 2
    torch.testing.assert_close(result(x), compiled(model, topk([0.25, 1.0]))(x), rtol=1e-5, atol=1e-5)


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(TypeError, match="must be an ExportedProgram or a GraphModule, got Blocks"):
        sparseattn.rewrite(Blocks(), topk())  # type: ignore[type-var]


def test_the_report_is_remembered_and_a_switch_leaves_everything_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    program = exported(Blocks(), tokens())
    _, report = sparseattn.rewrite(program, topk())
    assert sparseattn.last_report() == report
    monkeypatch.setenv("SPARSEATTN_DISABLE", "1")
    result, report = sparseattn.rewrite(program, topk())
    assert report.policy == "disabled"
    assert count(result.graph_module, SDPA) == 2
