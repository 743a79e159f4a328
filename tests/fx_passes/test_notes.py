"""The notes of a report: rules that match nothing, and a policy that was measured on another model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.attention_model import Blocks, tokens

import sparseattn
from sparseattn import Measured, Policy, Rule

POLICY = Policy([Rule("dense", modules="layers.*"), Rule("flash", steps="2:"), Rule("flash", kind="cross")])
UNMATCHED = [
    "rule 1 matches no site: prefer dense where modules='layers.*'",
    "rule 3 matches no site: prefer flash where kind='cross'",
]


def measured(policy: Policy, /, **what: str) -> Policy:
    return dataclasses.replace(policy, measured=Measured(**what))


def test_rules_that_match_nothing_are_noted_whatever_the_step() -> None:
    report = sparseattn.explain(Blocks(), tokens(), policy=POLICY)
    assert list(report.notes) == UNMATCHED
    assert json.loads(report.to_json())["notes"] == UNMATCHED
    for note in UNMATCHED:
        assert f"\nnote: {note}\n" in str(report)
    assert "Note: rule 3 matches no site" in report.to_html()


def test_many_rules_are_noted_together() -> None:
    policy = Policy([Rule("flash", modules=f"blocks.{layer}") for layer in range(12)])
    report = sparseattn.explain(Blocks(), tokens(), policy=policy)
    assert list(report.notes) == ["10 rules match no site: 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"]


def test_a_policy_that_fits_has_no_notes() -> None:
    report = sparseattn.explain(Blocks(), tokens(), policy="exact")
    assert report.notes == ()
    assert "note" not in str(report)


def test_a_model_without_attention_has_none_either() -> None:
    assert sparseattn.explain(torch.nn.Linear(32, 32), tokens(), policy=POLICY).notes == ()


def test_all_graphs_of_a_model_count() -> None:
    class Broken(Blocks):
        def forward(self, x):
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    policy = Policy([Rule("flash", modules=f"blocks.{layer}") for layer in range(3)])
    report = sparseattn.explain(Broken(), tokens(), policy=policy)
    assert list(report.notes) == ["rule 3 matches no site: prefer flash where modules='blocks.2'"]


def test_a_compiled_graph_notes_its_own_rules() -> None:
    policy = measured(POLICY, model="000000000000")
    torch.compile(Blocks(), backend="sparseattn", options={"policy": policy, "inner_backend": "eager"})(tokens())
    report = sparseattn.last_report()
    assert report is not None
    assert list(report.notes) == UNMATCHED


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_the_model_that_was_measured_is_recognised(wrap) -> None:
    model = Blocks()
    policy = measured(Policy.preset("exact"), model=sparseattn.fingerprint(model), policy=Policy.preset("exact").hash)
    report = sparseattn.explain(wrap(model), tokens(), policy=policy)
    assert report.rewritten == 2
    assert report.notes == ()


def test_a_policy_measured_before_conversion_is_recognised_after() -> None:
    model = Blocks()
    policy = measured(Policy([Rule("sla")]), model=sparseattn.fingerprint(model))
    sparseattn.convert(model, policy, (tokens(),))
    assert sparseattn.explain(model, tokens(), policy=policy).notes == ()


def test_another_model_is_noted_with_both_fingerprints() -> None:
    model, other = Blocks(), Blocks(3)
    policy = measured(Policy.preset("exact"), model=sparseattn.fingerprint(other))
    (note,) = sparseattn.explain(model, tokens(), policy=policy).notes
    assert note == (
        f"the policy was measured on model {sparseattn.fingerprint(other)}; "
        f"this model is {sparseattn.fingerprint(model)}: expect another error and speed-up"
    )


def test_a_function_has_no_fingerprint() -> None:
    model = Blocks()
    policy = measured(Policy.preset("exact"), model=sparseattn.fingerprint(model))
    (note,) = sparseattn.explain(lambda x: model(x), tokens(), policy=policy).notes
    assert "which has no fingerprint to compare" in note


def test_edited_rules_are_noted() -> None:
    policy = measured(Policy([Rule("flash")]), policy="000000000000")
    (note,) = sparseattn.explain(Blocks(), tokens(), policy=policy).notes
    assert note == f"the rules are not those that were measured: their hash was 000000000000, it is {policy.hash}"
