"""The option `check`: every rewritten site beside dense attention, in the runs that are due and in no other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.attention_model import Blocks, SelfAttention, tokens
from torch import Tensor, fx
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sparseattn
from sparseattn import Policy, Rule
from sparseattn.attn_ops import resolve
from sparseattn.attn_ops.errors import PolicyError, SelfCheckError
from sparseattn.attn_ops.kernels.cpu import flash
from sparseattn.fx_passes.options import Options
from sparseattn.fx_passes.site_check import SiteCheck

BLOCKS = {"block_q": 16, "block_k": 16}
SPARSE = {"rules": [{"use": "block_topk", "params": {"keep_ratio": 0.5, **BLOCKS}}]}


def compiled(model: Any, check: Any = "first", policy: Any = "exact", inner: str = "aot_eager", **options: Any) -> Any:
    how = {"dynamic": options.pop("dynamic", None)}
    given = {"policy": policy, "inner_backend": inner, "check": check, **options}
    return torch.compile(model, backend="sparseattn", fullgraph=True, options=given, **how)


def checks() -> list[SiteCheck]:
    return [row.check for row in sparseattn.last_report().rows]


def by_hand(ours: Tensor, dense: Tensor) -> tuple[float, float]:
    cosine = functional.cosine_similarity(ours.double().flatten(), dense.double().flatten(), dim=0)
    return float(cosine), float((ours - dense).double().abs().sum() / dense.double().abs().sum())


def attention_of(model: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the op that SPARSE puts into the model, and of dense attention."""
    q, k, v = (part.unflatten(-1, (model.heads, -1)).transpose(1, 2) for part in model.qkv(x).chunk(3, dim=-1))
    ours = sparseattn.ops.block_topk_attention(q, k, v, keep_ratio=0.5, **BLOCKS)[0]
    return ours, functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_the_numbers_are_those_by_hand_and_later_runs_are_as_without(inner: str) -> None:
    model, x = Blocks(), tokens()
    with torch.no_grad():
        wanted = torch.compile(
            model, backend="sparseattn", fullgraph=True, options={"policy": SPARSE, "inner_backend": inner}
        )(x)
        torch._dynamo.reset()
        run = compiled(model, policy=SPARSE, inner=inner, check_limit=2)
        torch.testing.assert_close(run(x), wanted, rtol=1e-4, atol=1e-5)
        found, hidden = checks(), x
        for block, check in zip(model.blocks, found, strict=True):
            ours, dense = attention_of(block, hidden)
            cosine, rel_l1 = by_hand(ours, dense)
            assert check.cosine == pytest.approx(cosine, rel=1e-4)
            assert check.rel_l1 == pytest.approx(rel_l1, rel=1e-3)
            assert (check.non_finite, check.limit, check.run, check.failure) == (0, 2, 0, "")
            hidden = hidden + ours.transpose(1, 2).flatten(2)
        assert torch.equal(run(x), wanted)
        assert checks() is not found
        assert checks() == found


def graphs_given_to(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What the inner backend "eager" is given from now on."""
    given: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        given.append(module)
        return module.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _name: keep)
    return given


def structure(module: fx.GraphModule) -> list[tuple[str, str, str]]:
    """The nodes of a graph, each named by its place."""
    other = fx.Graph()
    places = {node: other.placeholder(f"node_{place}") for place, node in enumerate(module.graph.nodes)}
    return [
        (node.op, str(node.target), str(fx.map_arg((node.args, node.kwargs), places.__getitem__)))
        for node in module.graph.nodes
    ]


def test_without_the_option_nothing_is_copied_or_added(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, given = Blocks(), tokens(), graphs_given_to(monkeypatch)
    from sparseattn.fx_passes import backend

    asked: list[fx.GraphModule] = []
    rewrite = backend.rewrite_graph
    monkeypatch.setattr(
        backend, "rewrite_graph", lambda gm, *given, **how: asked.append(gm) or rewrite(gm, *given, **how)
    )
    with torch.no_grad():
        torch.compile(model, backend="sparseattn", options={"policy": SPARSE, "inner_backend": "eager"})(x)
        assert len(given) == len(asked) == 1
        assert given[0] is asked[0]
        assert checks() == [None, None]
        torch._dynamo.reset()
        compiled(model, policy=SPARSE, inner="eager")(x)
    off, checked, plain = given
    assert structure(plain) == structure(off)
    assert "attention_error" in checked.code
    assert "attention_error" not in off.code
    assert all("check" not in site for site in json.loads(sparseattn.explain(model, x).to_json())["sites"])


def test_a_graph_without_our_ops_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = graphs_given_to(monkeypatch)
    with torch.no_grad():
        compiled(SelfAttention(), policy={"rules": []}, inner="eager")(tokens())
    assert len(given) == 1


class Marked(Blocks):
    """Three blocks; the scale of the second tells its calls from those of the others."""

    def __init__(self) -> None:
        super().__init__(layers=3)
        self.blocks[1].arguments["scale"] = 0.3


Spoil = Callable[[Callable[[Tensor], Tensor]], list[float]]


@pytest.fixture
def spoil() -> Iterator[Spoil]:
    """`spoil(how)`: from now on exact attention gives `how(out)` in the second block. Gives a list of the calls."""
    kernel, calls = flash.attention, list[float]()

    def start(how: Callable[[Tensor], Tensor]) -> list[float]:
        def attention(*args: Any, scale: float, **kwargs: Any) -> tuple[Tensor, Tensor]:
            calls.append(scale)
            out, lse = kernel(*args, scale=scale, **kwargs)
            return (how(out) if scale == 0.3 else out), lse

        flash.attention = attention
        resolve.forget_choices()
        return calls

    yield start
    flash.attention = kernel
    resolve.forget_choices()


def with_nan(out: Tensor) -> Tensor:
    out = out.clone()
    out[0, 0, 5, :3] = torch.nan
    return out


def ten_times_its_error(out: Tensor) -> Tensor:
    return out * (1 + 10 * sparseattn.backends()["flash"].tolerance["float32"])


def twice_its_error(out: Tensor) -> Tensor:
    return out * (1 + 2 * sparseattn.backends()["flash"].tolerance["float32"])


FAULTS = [(with_nan, "3 NaN or infinite values where dense attention has none"), (ten_times_its_error, "limit 3e-05")]


@pytest.mark.parametrize(("fault", "told"), FAULTS)
def test_a_faulty_layer_is_named(spoil: Spoil, fault: Any, told: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Marked(), tokens()
    spoil(fault)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="sparseattn"):
        compiled(model)(x)
    report = sparseattn.last_report()
    # NaN goes on into the third block: there dense attention has it too, and the block is not blamed.
    assert [bool(check.failure) for check in checks()] == [False, True, False]
    assert told in checks()[1].failure
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("self-check: blocks.1 (flash by torch) has ")
    assert told in warning
    assert "FAILED" in str(report)
    assert "FAILED" in report.to_html()
    failures = [site["check"]["failure"] for site in json.loads(report.to_json(), parse_constant=pytest.fail)["sites"]]
    assert failures == ["", checks()[1].failure, ""]


def test_what_is_within_the_limit_passes(spoil: Spoil) -> None:
    spoil(twice_its_error)
    with torch.no_grad():
        compiled(Marked(), on_failure="raise")(tokens())
    assert checks()[1].rel_l1 == pytest.approx(2e-5, rel=0.1)
    assert "cosine" in str(sparseattn.last_report())


@pytest.mark.parametrize(("fault", "told"), FAULTS)
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_demoted_layers_are_dense_from_the_next_call_on(spoil: Spoil, fault: Any, told: str, inner: str) -> None:
    model, x = Marked(), tokens()
    calls, counters = spoil(fault), torch._dynamo.utils.counters["stats"]
    run = compiled(model, inner=inner, on_failure="demote")
    counters.clear()
    with torch.no_grad():
        assert not torch.allclose(run(x), model(x), rtol=1e-6, atol=0)
        assert dict(sparseattn.last_report().chosen) == {"flash": 3}
        for _ in range(3):
            torch.testing.assert_close(run(x), model(x))
    assert calls.count(0.3) == 1
    assert counters["unique_graphs"] == 2
    report = sparseattn.last_report()
    assert [row.decision.backend for row in report.rows] == ["flash", None, "flash"]
    assert "demoted by the self-check in run 0: blocks.1 (flash by torch) has" in report.rows[1].decision.why
    assert told in report.rows[1].decision.why
    assert report.rows[1].check is None
    assert not report.rows[0].check.failure


def test_what_was_demoted_is_forgotten_with_the_graph(spoil: Spoil) -> None:
    model, x = Marked(), tokens()
    spoil(with_nan)
    with torch.no_grad():
        compiled(model, on_failure="demote")(x)
        torch._dynamo.reset()
        compiled(model, on_failure="demote")(x)
        assert dict(sparseattn.last_report().chosen) == {"flash": 3}


def test_an_error_names_layer_numbers_and_limit_and_comes_again(spoil: Spoil) -> None:
    model, x = Marked(), tokens()
    spoil(ten_times_its_error)
    run = compiled(model, on_failure="raise")
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(
                SelfCheckError, match=r"blocks\.1 .* relative L1 0\.0001 .* limit 3e-05 .*cosine 1\.0000"
            ):
                run(x)
        torch._dynamo.reset()
        compiled(model, on_failure="raise", check_limit=1e-3)(x)


def test_every_nth_run_is_compared(spoil: Spoil) -> None:
    """What becomes faulty later is found later; the runs between have no dense attention beside them."""
    model, x = Marked(), tokens()
    run, first = compiled(model, check=3), compiled(model)
    with torch.no_grad():
        runs = [(run(x), checks()[0].run)[1] for _ in range(8)]
        assert runs == [0, 0, 0, 3, 3, 3, 6, 6]
        first(x)
        spoil(with_nan)
        first(x)
        assert not checks()[1].failure
        run(x)
        assert not checks()[1].failure
        run(x)
        assert checks()[1].failure
        assert checks()[1].run == 9


def test_each_graph_has_a_first_run() -> None:
    rules = [Rule("block_topk", steps="2:", params={"keep_ratio": 0.5, **BLOCKS}), Rule("flash")]
    model, x = Blocks(), tokens()
    run, seen = compiled(model, policy=Policy(rules)), []
    with torch.no_grad():
        for _ in sparseattn.steps(range(4)):
            run(x)
            seen.append([(row.decision.backend, row.check.rel_l1) for row in sparseattn.last_report().rows])
    assert [{name for name, _ in step} for step in seen] == [{"flash"}, {"flash"}, {"block_topk"}, {"block_topk"}]
    assert all(rel_l1 > 0.01 for _, rel_l1 in seen[2])
    assert all(rel_l1 < 1e-5 for _, rel_l1 in seen[0])


def test_a_value_that_follows_the_steps_reaches_both_graphs() -> None:
    line = sparseattn.Schedule(kind="linear", start=1.0, end=0.25)
    policy = Policy([Rule("block_topk", params={"keep_ratio": line, **BLOCKS})])
    run, x, errors = compiled(SelfAttention(), check=1, policy=policy), tokens(), []
    with torch.no_grad():
        for _ in sparseattn.steps(range(4)):
            run(x)
            errors.append(checks()[0].rel_l1)
    assert errors[0] < 1e-5
    assert errors == sorted(errors)
    assert errors[3] > 0.05


class Checkpointed(Blocks):
    """The blocks, each under activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("kind", [Blocks, Checkpointed])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_training(kind: type[Blocks], inner: str) -> None:
    model, x = kind(), tokens()
    run = compiled(model, check=2, policy="exact", inner=inner, on_failure="raise")
    model(x).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    for _ in range(3):
        model.zero_grad()
        run(x).square().sum().backward()
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    assert [check.run for check in checks()] == [2, 2]
    assert all(check.cosine == pytest.approx(1) for check in checks())


def test_a_region_that_cannot_be_looked_into_says_so() -> None:
    block = SelfAttention()

    def branch(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: block(x), lambda x: block(-x), (x,)) + block(x)

    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(compiled(branch)(x), branch(x), rtol=1e-4, atol=1e-5)
    told = [check.skipped for check in checks()]
    assert sorted(told) == ["", *2 * ["it is inside a region of cond"]]
    assert "not checked: it is inside a region of cond" in str(sparseattn.last_report())


def test_a_nested_compile_region_is_refused() -> None:
    block, x = SelfAttention(), tokens()

    @torch.compiler.nested_compile_region
    def region(x: Tensor) -> Tensor:
        return block(x)

    def nested(x: Tensor) -> Tensor:
        return region(region(x))

    with torch.no_grad(), pytest.raises(Exception, match="check must have a model without nested_compile_region"):
        compiled(nested)(x)


def test_dynamic_shapes_are_one_graph_and_a_demotion_holds_for_all(spoil: Spoil) -> None:
    model, counters = Marked(), torch._dynamo.utils.counters["stats"]
    run = compiled(model, check=2, on_failure="demote", dynamic=True)
    counters.clear()
    with torch.no_grad():
        for length in (48, 64, 65):
            x = tokens(length=length)
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
        assert counters["unique_graphs"] == 1
        assert checks()[0].run == 2
        spoil(with_nan)
        run(x)
        run(x)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert counters["unique_graphs"] == 2
    assert dict(sparseattn.last_report().chosen) == {"flash": 2, "sdpa": 1}


def test_tiled_methods_autocast_and_grouped_heads() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    q, k, v = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32, 16)
    with torch.no_grad():
        compiled(attend)(q, k, v)
        assert checks()[0].rel_l1 < 1e-5
        torch._dynamo.reset()
        sta = Policy([Rule("sta", layout=(4, 8, 8), params={"tile": (2, 4, 4), "window": (1, 1, 1)})])
        model, x = Blocks(), tokens(length=256)
        with torch.autocast("cpu", torch.bfloat16):
            compiled(model, policy=sta)(x)
    report = sparseattn.last_report()
    assert {row.decision.backend for row in report.rows} == {"sta"}
    assert {str(row.call.dtype) for row in report.rows} == {"torch.bfloat16"}
    # One window of 32 of 256 tokens, queries that prefer no key: the mean of an eighth of the values.
    assert all(0.1 < check.cosine < 0.9 for check in checks())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"check": "frist"}, r'check must be "first" or a number of runs, at least 1, got \'frist\''),
        ({"check": 0}, "got 0"),
        ({"check": True}, "got True"),
        ({"check": 2.5}, "got 2.5"),
        ({"check": "first", "on_failure": "rise"}, 'on_failure must be "report" or "demote" or "raise", got \'rise\''),
        ({"check": "first", "check_limit": 0}, "check_limit must be a positive number, a relative L1, got 0"),
        ({"check": "first", "check_limit": "0.1"}, "got '0.1'"),
        ({"check": "first", "check_limit": float("nan")}, "got nan"),
        ({"on_failure": "raise"}, 'on_failure must come with check. Add "check": "first".'),
        ({"on_failure": "raise", "check_limit": 0.1}, "on_failure and check_limit must come with check"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PolicyError, match=f"options: .*{sentence}"):
        Options.parse(None, options)


def test_demotion_needs_dynamo() -> None:
    from support.graphs import capture

    from sparseattn.fx_passes.backend import sparseattn_backend

    given = {"policy": "exact", "inner_backend": "eager", "check": "first", "on_failure": "demote"}
    with pytest.raises(PolicyError, match="must have a torch that can compile again"):
        sparseattn_backend(capture(SelfAttention(), tokens()), [tokens()], options=given)


@pytest.mark.parametrize(
    ("sums", "rel_l1", "failed"),
    [
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 0.0, False),  # dense attention is zero, and so are we
        ((1.0, 0.0, 0.0, 1.0, 0.0, 0.0), float("inf"), True),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 9.0), float("nan"), True),  # every entry of ours is NaN
        ((4.0, 4.0, 0.0, 0.0, 4.0, 0.0), 1.0, True),  # ours is zero
    ],
)
def test_the_ends_of_the_scale(sums: tuple[float, ...], rel_l1: float, failed: bool) -> None:
    check = SiteCheck.read(sums, 0.9, 0)
    assert check.rel_l1 == pytest.approx(rel_l1, nan_ok=True)
    assert bool(check.failure) is failed
    json.loads(json.dumps(check.to_dict()), parse_constant=pytest.fail)
