"""Models of diffusers and transformers, unmodified: every site found, rewritten or left with its reason, same
output."""

from __future__ import annotations

import pytest
import torch
from support.zoo import ZOO, Entry, build

import sparseattn

pytestmark = pytest.mark.models


def _tensors(output: object) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "items") else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_exact_policy_keeps_the_output(entry: Entry) -> None:
    torch._dynamo.reset()
    model, inputs = build(entry)
    options = {"policy": "exact", "inner_backend": "aot_eager"}
    compiled = torch.compile(model, backend="sparseattn", options=options, fullgraph=True)
    with torch.no_grad():
        expected = _tensors(model(**inputs))
        actual = _tensors(compiled(**inputs))
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    report = sparseattn.last_report()
    assert len(report.rows) == entry.sites
    assert report.rewritten == entry.rewritten
    left = [decision.why for decision in report.decisions if decision.is_dense]
    for word, count in entry.dense.items():
        assert sum(word in sentence for sentence in left) == count, left
    assert len(left) == sum(entry.dense.values())


@pytest.mark.parametrize("entry", [e for e in ZOO if e.name in ("wan", "llama", "whisper")], ids=lambda e: e.name)
def test_explain_agrees_with_compile(entry: Entry) -> None:
    torch._dynamo.reset()
    model, inputs = build(entry)
    with torch.no_grad():
        told = sparseattn.explain(model, policy="exact", **inputs)
        torch.compile(model, backend="sparseattn", options={"policy": "exact", "inner_backend": "eager"})(**inputs)
    assert told == sparseattn.last_report()


def test_llama_prefill_reaches_the_op_as_causal_with_grouped_heads() -> None:
    torch._dynamo.reset()
    model, inputs = build(next(entry for entry in ZOO if entry.name == "llama"))
    with torch.no_grad():
        report = sparseattn.explain(model, policy="exact", **inputs)
    for row in report.rows:
        assert row.call.causal
        assert row.call.mask == "none"
        assert (row.call.heads, row.call.kv_heads) == (4, 2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "vit", "whisper"])
def test_eager_attention_of_transformers_is_fused(name: str) -> None:
    entry = next(entry for entry in ZOO if entry.name == name)
    model, inputs = build(entry)
    model.set_attn_implementation("eager")
    options = {"policy": "exact", "inner_backend": "aot_eager"}
    with torch.no_grad():
        expected = _tensors(model(**inputs))
        actual = _tensors(torch.compile(model, backend="sparseattn", options=options, fullgraph=True)(**inputs))
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert sparseattn.last_report().rewritten == entry.sites
