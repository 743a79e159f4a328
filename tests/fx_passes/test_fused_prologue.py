"""fused_prologue: what it fuses, what it leaves, that it computes the same, and that Inductor makes one kernel."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.graphs import capture, count, fresh_dynamo  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import sparseattn
from sparseattn import Capability, Policy, Rule
from sparseattn.fx_passes.rewrite import rewrite_graph
from sparseattn.lowering.decision import Decision

ONE_OP = torch.ops.sparseattn.sage_attention.default
QUANTIZED = torch.ops.sparseattn.sage_attention_quantized.default
FUSED = "quantization fused into the graph"


class Attention(nn.Module):
    """RMSNorm and a rotary embedding before grouped attention, as in a transformer."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, dim: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dim, self.sizes = dim, [heads * dim, kv_heads * dim, kv_heads * dim]
        self.project = nn.Linear(64, sum(self.sizes))
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.dim)) for part in self.project(x).split(self.sizes, -1))
        q, k = (_rotated(norm(part), angle) for norm, part in ((self.norm_q, q), (self.norm_k, k)))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    turned = torch.cat([low * angle.cos() - high * angle.sin(), low * angle.sin() + high * angle.cos()], -1)
    return turned.type_as(x)


def tokens(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, length, 64).to(dtype), torch.randn(length, 1, 16)


def policy(provider: str = "reference", **params: Any) -> Policy:
    return Policy([Rule("sage", provider=provider, params=params)])


def compiled(model: nn.Module, fuse: bool | None, dynamic: bool | None = None, **options: Any) -> Any:
    given = {"policy": policy(), **options} | ({} if fuse is None else {"fused_prologue": fuse})
    return torch.compile(model, backend="sparseattn", fullgraph=True, dynamic=dynamic, options=given)


def rewritten(
    fuse: bool | None, machine: Capability | None = None, **how: Any
) -> tuple[torch.fx.GraphModule, Decision]:
    with torch.no_grad():
        graph = capture(Attention(), *tokens(100))
        report = rewrite_graph(graph, policy(**how), machine, fuse=fuse)
    return graph, report.decisions[0]


MODES = pytest.mark.parametrize(
    "params",
    [{}, {"granularity": "per_block", "smooth_k": False}, {"granularity": "per_warp", "bits": 4}, {"pv": "fp8"}],
)


@MODES
def test_fuses(params: dict[str, Any]) -> None:
    for fuse, ops in ((True, (0, 1)), (False, (1, 0))):
        graph, decision = rewritten(fuse, **params)
        assert (count(graph, ONE_OP), count(graph, QUANTIZED)) == ops
        assert decision.why.endswith(FUSED) is fuse
        assert (decision.backend, decision.provider) == ("sage", "reference")


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_integers_are_those_of_the_op(params: dict[str, Any], dtype: torch.dtype) -> None:
    """Bit for bit, as long as nothing is compiled that sums in another order or keeps halves in fp32."""
    model, given = Attention().to(dtype), tokens(131, dtype)
    options = {"policy": policy(**params), "inner_backend": "aot_eager"}
    with torch.no_grad():
        fused, plain = (compiled(model, fuse, **options)(*given) for fuse in (True, False))
    torch.testing.assert_close(fused, plain, rtol=0, atol=0)


@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast(inside: bool) -> None:
    """What autocast would cast for the op is cast before the quantization, in a region of the graph too."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside or torch.is_autocast_enabled("cpu")):
            return nn.functional.scaled_dot_product_attention(2 * q, k, v)

    given = tuple(torch.randn(1, 2, 100, 32) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        fused, plain = (compiled(attend, fuse, inner_backend="aot_eager")(*given) for fuse in (True, False))
    assert fused.dtype is torch.bfloat16
    torch.testing.assert_close(fused, plain, rtol=0, atol=0)


def test_one_graph_for_ten_lengths() -> None:
    model = Attention()
    run = compiled(model, True, dynamic=True, inner_backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for length in (100, 2, 31, 32, 33, 64, 127, 128, 129, 300):
            given = tokens(length)
            error = (run(*given) - model(*given)).abs().max()
            assert error < 0.05, length
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_inductor_makes_one_kernel_of_it() -> None:
    """As many as without it: the quantization is in the kernel of the norm and the rotary embedding."""
    model, given = Attention(), tokens(131)
    kernels, results = [], []
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):
        for fuse in (False, True):
            result, code = run_and_get_code(compiled(model, fuse), *given)
            kernels.append(re.findall(r"\bcpp_fused_\w+\(", code[0][code[0].index("def call(") :]))
            results.append(result)
    assert [len(made) for made in kernels] == [1, 1]
    assert "round" in kernels[1][0]
    torch.testing.assert_close(*results, rtol=0, atol=2e-3)  # a norm summed in another order turns a rare integer


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"smooth_q": True}, "smooth_q: the scores of the means are a product, which nothing fuses with"),
        ({"asymmetric": True}, "asymmetric: the op on integers takes no offsets"),
    ],
)
def test_leaves_what_it_cannot_say_and_says_why(how: dict[str, Any], reason: str) -> None:
    graph, decision = rewritten(True, **how)
    assert (count(graph, ONE_OP), count(graph, QUANTIZED)) == (1, 0)
    assert dict(decision.rejected)["sage/fused prologue"] == (reason,)


def test_leaves_a_package_that_quantizes_by_itself() -> None:
    machine = Capability.of("sm89", {"sageattention": "2.2.0"})
    with torch.no_grad():
        x, angle = tokens(100, torch.bfloat16)
        graph = capture(Attention(dim=64).bfloat16(), x, torch.cat([angle, angle], -1))
        (decision,) = rewrite_graph(graph, policy("sageattention"), machine, fuse=True).decisions
    assert (count(graph, ONE_OP), count(graph, QUANTIZED)) == (1, 0)
    assert dict(decision.rejected)["sage/fused prologue"] == ("sageattention quantizes in its own kernels",)


def test_unasked_it_fuses_where_that_was_measured_to_pay() -> None:
    gpu, cpu = Capability.of("sm90"), Capability.of("cpu")
    for machine, how, reason in (
        (gpu, {"provider": "triton"}, "not measured on cuda"),
        (cpu, {"provider": "cpu"}, "the native CPU kernel quantizes by itself"),
    ):
        graph, decision = rewritten(None, machine, **how)
        assert count(graph, QUANTIZED) == 0
        assert dict(decision.rejected)["sage/fused prologue"][0].startswith(reason)
    for params in ({"bits": 4}, {"pv": "fp8"}):
        graph, decision = rewritten(None, cpu, provider="cpu", **params)
        assert count(graph, QUANTIZED) == 1
        assert decision.why.endswith(FUSED)


def test_other_ops_and_dense_sites_are_left() -> None:
    with torch.no_grad():
        graph = capture(Attention(), *tokens(100))
        report = rewrite_graph(graph, Policy([Rule("flash")]), fuse=True)
    assert FUSED not in report.decisions[0].why
    assert "sage/fused prologue" not in dict(report.decisions[0].rejected)


def test_the_layout_is_that_of_the_site() -> None:
    """Queries as (B, S, H, D): so is the output, and its flattening is a view, with the quantization fused or not."""
    graph, _ = rewritten(True)
    (node,) = graph.graph.find_nodes(op="call_function", target=QUANTIZED)
    out = next(iter(node.users)).meta["example_value"]
    assert out.transpose(1, 2).is_contiguous()


def test_a_program_keeps_the_op_unless_asked() -> None:
    program = torch.export.export(Attention().eval().requires_grad_(False), given := tokens(100))
    plain, _ = sparseattn.rewrite(program, policy())
    fused, report = sparseattn.rewrite(program, policy(), fused_prologue=True)
    assert (count(plain.graph_module, ONE_OP), count(fused.graph_module, QUANTIZED)) == (1, 1)
    assert FUSED in str(report)
    torch.testing.assert_close(fused.module()(*given), plain.module()(*given), rtol=0, atol=0)


def test_another_value_of_the_option_is_refused() -> None:
    with pytest.raises(Exception, match="fused_prologue must be true, false or left out, got 'yes'"):
        compiled(Attention(), None, fused_prologue="yes")(*tokens(8))
