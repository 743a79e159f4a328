"""Schedules over layers: the rules they write."""

from __future__ import annotations

from typing import Any

import pytest

from sparseattn import Policy, VideoLayout
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.attn_ops.step_range import Step
from sparseattn.lowering.decide import decide
from sparseattn.lowering.schedules import vmoba_rules

CPU = Capability.of("cpu")
GRID = (20, 30, 52)


def chunks_of(policy: Policy, layers: int) -> list[Any]:
    """The chunk that every layer gets, None for a dense one."""
    tokens = VideoLayout(GRID).tokens
    call = AttentionCall(1, 12, 12, tokens, tokens, 128)
    decisions = [decide(call, CPU, policy, module=f"blocks.{layer}.attn1") for layer in range(layers)]
    return [None if decision.is_dense else dict(decision.params)["chunk"] for decision in decisions]


def test_kinds_take_turns() -> None:
    policy = Policy(vmoba_rules(7, layout=GRID))
    turn = [(2, 0, 0), (0, 3, 4), (4, 6, 4)]
    assert chunks_of(policy, 8) == [*turn, *turn, turn[0], None]
    assert Policy.load(policy.to_dict()) == policy


def test_cycle_and_full_layers() -> None:
    rules = vmoba_rules(8, layout=GRID, cycle=(2, 0, 1), first_full_layer=2)
    temporal, st = (2, 0, 0), (4, 6, 4)
    assert chunks_of(Policy(rules), 8) == [None, None, temporal, temporal, st, temporal, temporal, st]
    assert rules[0].use == ("dense",)
    assert len(rules) == 3


def test_first_full_step() -> None:
    policy = Policy(vmoba_rules(3, layout=GRID, first_full_step=12, cycle=(1, 0, 0)))
    call = AttentionCall(1, 12, 12, VideoLayout(GRID).tokens, VideoLayout(GRID).tokens, 128)
    steps = [None, Step(0, 50), Step(11, 50), Step(12, 50), Step(49, 50)]
    decisions = [decide(call, CPU, policy, module="blocks.0.attn1", step=step) for step in steps]
    assert [decision.backend for decision in decisions] == [None, None, None, "vmoba", "vmoba"]
    assert "step 11 of 50 is not in steps 12:" in str(decisions[2].rejected)
    assert "no step is set" in str(decisions[0].rejected)


def test_a_number_is_a_whole_number() -> None:
    """Layer 1 is not layer 11."""
    policy = Policy(vmoba_rules(12, layout=GRID))
    assert chunks_of(policy, 12)[10:] == [(0, 3, 4), (4, 6, 4)]


def test_parameters() -> None:
    common = {"select": "threshold", "threshold": 0.3}
    rules = vmoba_rules(2, layout=GRID, temporal={"chunk_tokens": 100}, params=common, mode="require")
    assert dict(rules[0].params) == {"chunk_tokens": 100, "select": "threshold", "threshold": 0.3}
    assert dict(rules[1].params) == {"chunk": (0, 3, 4), "select": "threshold", "threshold": 0.3, "topk": 20}
    assert {rule.mode for rule in rules} == {"require"}
    assert {rule.kind for rule in rules} == {"self"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"first_full_step": -1}, "first_full_step must be an int of at least 0"),
        ({"layers": 0}, "layers must be an int of at least 1"),
        ({"first_full_layer": -1}, "first_full_layer must be an int of at least 0"),
        ({"cycle": (0, 0, 0)}, "cycle must be three ints of at least 0, not all 0"),
        ({"module": "blocks.*"}, r"module must have \{\} for the number of the layer"),
        ({"params": {"treshold": 0.3}}, "vmoba has no parameter 'treshold'"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        vmoba_rules(**{"layers": 3, **wrong})
