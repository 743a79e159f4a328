"""explain and the report: every site on a line, for machines that are not here, without running the model."""

from __future__ import annotations

import json

import pytest
import torch
from support.attention_model import Blocks, SelfAttention, tokens
from torch import nn

import sparseattn


class _Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs.add_(1)
        return self.attention(x)


def test_the_model_is_not_run() -> None:
    model = _Counted()
    report = sparseattn.explain(model, tokens(), policy="exact")
    assert report.rewritten == 1
    assert model.runs.item() == 0


def test_explaining_often_does_not_exhaust_recompilation() -> None:
    model = Blocks()
    for _ in range(12):
        assert sparseattn.explain(model, tokens(), policy="exact").rewritten == 2


def test_another_length_is_not_made_symbolic_by_the_one_before() -> None:
    shapes = [
        row.call.shape
        for length in (32, 64, 48)
        for row in sparseattn.explain(SelfAttention(), tokens(length=length), policy="exact").rows
    ]
    assert shapes == ["2,2,32,16", "2,2,64,16", "2,2,48,16"]


def test_a_gpu_that_is_not_here() -> None:
    with torch.no_grad():
        report = sparseattn.explain(Blocks().half(), tokens(length=4096).half(), policy="auto", capability="sm90")
    assert "sm90" in report.capability
    assert {decision.provider for decision in report.decisions} == {"triton"}
    assert dict(report.chosen) == {"sage": 2}


def test_table_json_and_html_tell_the_same() -> None:
    report = sparseattn.explain(Blocks(), tokens(), policy="exact")
    text, data, page = str(report), json.loads(report.to_json()), report.to_html()
    for needle in ("blocks.0", "blocks.1", "flash", "2,2,64,16", "torch"):
        assert needle in text
        assert needle in page
    assert [site["module"] for site in data["sites"]] == ["blocks.0", "blocks.1"]
    assert data["sites"][0]["decision"]["backend"] == "flash"
    assert report.summary() in text


def test_require_and_wrong_policy_raise() -> None:
    wide, policy = SelfAttention(heads=1, head_dim=320), {"rules": [{"use": "flash", "mode": "require"}]}
    with pytest.raises(sparseattn.attn_ops.errors.RequirementError, match="head_dim 320"):
        sparseattn.explain(wide, tokens(channels=320), policy=policy)
    with pytest.raises(sparseattn.attn_ops.errors.PolicyError, match="balanced"):
        sparseattn.explain(Blocks(), tokens(), policy="balnced")


def test_graph_breaks_give_one_report() -> None:
    class Broken(Blocks):
        def forward(self, x):
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    assert len(sparseattn.explain(Broken(), tokens(), policy="exact").rows) == 2
