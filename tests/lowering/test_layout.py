"""VideoLayout: what it takes, what it says of a wrong length, and its way from a rule to a decision."""

from __future__ import annotations

import pytest

from sparseattn import Policy, Rule, VideoLayout
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import PolicyError, RequirementError
from sparseattn.attn_ops.spec import BackendSpec, Param, Provider, Support
from sparseattn.lowering.decide import decide

TILED = BackendSpec(
    name="tiled",
    op="tiled_attention",
    kind="sparse",
    summary="tiles",
    params=(
        Param("tile", (4, 4, 4), "Tokens per tile.", low=1),
        Param("window", (3, 3, 3), "Tiles per window.", low=1, repeats=True),
        Param("sparsity", 0.5, "Fraction of tiles to drop.", low=0.0, high=1.0),
        Param("mass", None, "Mass to keep.", low=0.0, high=1.0, kind=float),
    ),
    support=Support(layout=True),
    providers=(Provider("cpu", "cpu", load=lambda: print),),
)
CPU = Capability.of("cpu")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseattn.attn_ops import registry

    monkeypatch.setitem(registry._backends, "tiled", TILED)


def a_call(seq: int, **more: object) -> AttentionCall:
    return AttentionCall(1, 2, 2, seq, seq, 64, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        VideoLayout((2, 3, 4), 5, True),
        {"grid": [2, 3, 4], "text_tokens": 5, "text_first": True},
    ],
)
def test_forms(given: object) -> None:
    layout = VideoLayout.parse(given)
    assert layout == VideoLayout((2, 3, 4), 5, True)
    assert VideoLayout.parse(layout.to_dict()) == layout
    assert (layout.video_tokens, layout.tokens, str(layout)) == (24, 29, "5 text+2x3x4")
    assert VideoLayout.parse([2, 3, 4]) == VideoLayout((2, 3, 4))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([2, 3], "three positive ints"),
        ([2, 3, 0], "three positive ints"),
        ({"grid": [2, 3, 4], "text": 5}, "unknown key 'text'. Known: grid"),
        ({"text_tokens": 5}, "Write layout"),
        ({"grid": [2, 3, 4], "text_tokens": -1}, "at least 0"),
        ({"grid": [2, 3, 4], "text_first": 1}, "true or false"),
        (24, "Write layout"),
    ],
)
def test_wrong_layouts(given: object, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        VideoLayout.parse(given)


def test_rule_carries_the_layout_to_the_decision() -> None:
    rule = Rule("tiled", layout={"grid": [2, 3, 4]}, params={"window": [[3, 3, 3], [1, 1, 1]], "keep_ratio": 0.1})
    policy = Policy([rule])
    decision = decide(a_call(24), CPU, policy)
    assert decision.layout == VideoLayout((2, 3, 4))
    assert decision.params == (("sparsity", 0.9), ("window", (3, 3, 3, 1, 1, 1)))
    assert Policy.load(policy.to_dict()) == policy
    assert policy.hash != Policy([Rule("tiled", layout=[2, 4, 3], params=dict(rule.params))]).hash


def test_layout_of_the_graph_serves_a_rule_without_one() -> None:
    decision = decide(a_call(24, layout=VideoLayout((2, 3, 4))), CPU, Policy([Rule("tiled")]))
    assert decision.layout == VideoLayout((2, 3, 4))


def test_without_a_layout_the_reason_says_what_to_write() -> None:
    decision = decide(a_call(24), CPU, Policy([Rule("tiled")]))
    assert decision.is_dense
    assert "layout = { grid = [T, H, W] }" in decision.why


def test_wrong_length_is_refused_with_the_arithmetic() -> None:
    layout = {"grid": [2, 3, 4], "text_tokens": 1}
    with pytest.raises(RequirementError, match=r"layout 2x3x4\+1 text makes 25 tokens, the sequence has 24"):
        decide(a_call(24), CPU, Policy([Rule("tiled", layout=layout, mode="require")]))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"tile": [4, 4]}, "list of 3 int"),
        ({"tile": [4, 4, 4, 4, 4, 4]}, "list of 3 int"),
        ({"tile": [4, 0, 4]}, r"in \[1, None\]"),
        ({"tile": 4}, "list of 3 int"),
        ({"window": [3, 3, 3, 3]}, "3 for every head"),
        ({"keep_ratio": 2.0}, "keep_ratio must be in"),
        ({"keep_ratio": 0.1, "sparsity": 0.9}, "the same twice"),
        ({"mass": 1}, None),
        ({"mass": 2.0}, "mass must be in"),
    ],
)
def test_params(params: dict[str, object], says: str | None) -> None:
    if says is None:
        assert dict(Rule("tiled", params=params).params) == {"mass": 1.0}
        return
    with pytest.raises(PolicyError, match=says):
        Rule("tiled", params=params)
