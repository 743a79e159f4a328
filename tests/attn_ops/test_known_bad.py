"""The list of vendor builds that are known to be wrong: when an entry holds, when it does not, and who reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.vendors import known_bad, sageattention

FP8, FP16 = (("pv", "fp8"),), (("pv", "fp16"),)


def a_call(**changes: Any) -> AttentionCall:
    call: dict[str, Any] = {"batch": 1, "heads": 8, "kv_heads": 8, "seq_q": 4096, "seq_k": 4096, "head_dim": 64}
    return AttentionCall(**{**call, "dtype": torch.bfloat16, "device": "cuda", **changes})


@pytest.mark.parametrize(
    ("package", "version", "machine", "changes", "link"),
    [
        ("sageattention", "2.2.0", "sm90", {}, "/issues/320"),
        ("sageattention", "2.2.0", "sm89", {}, None),
        ("sageattention", "2.2.1", "sm90", {}, None),
        ("sageattention", "2.2.0", "sm120", {"seq_k": 160_001, "params": FP8}, "/issues/388"),
        ("sageattention", "2.2.0", "sm121", {"seq_k": 160_001, "params": FP8}, "/issues/388"),
        ("sageattention", "2.2.0", "sm120", {"seq_k": 160_000, "params": FP8}, None),
        ("sageattention", "2.2.0", "sm120", {"seq_k": 160_001, "params": FP16}, None),
        ("sageattention", "2.2.0", "sm89", {"seq_k": 160_001, "params": FP8}, None),
        ("sageattention", "1.0.6", "sm80", {"seq_k": 4097}, "thu-ml/SageAttention)"),
        ("sageattention", "1.0.6", "sm80", {"dynamic": ("seq_k",)}, "thu-ml/SageAttention)"),
        ("sageattention", "1.0.6", "sm80", {"seq_k": 4097, "causal": True}, None),
        ("sageattention", "1.0.6", "sm80", {}, None),
        ("sageattention", "2.2.0", "sm80", {"seq_k": 4097}, None),
        ("sageattn3", "1.0.0", "sm120", {"causal": True}, "/issues/340"),
        ("sageattn3", "1.0.0", "sm120", {}, None),
        ("flash_attn", "2.8.4", "sm90", {"causal": True}, None),
    ],
)
def test_an_entry_holds_where_it_says(
    package: str, version: str, machine: str, changes: dict[str, Any], link: str | None
) -> None:
    found = known_bad.reasons(package, a_call(**changes), Capability.of(machine, {package: version}))
    assert len(found) == (link is not None)
    assert all(f"{link}" in reason for reason in found)


def test_every_entry_has_a_sentence_and_a_link() -> None:
    for entry in known_bad.KNOWN_BAD:
        assert entry.link.startswith("https://")
        assert str(entry) == f"{entry.sentence} ({entry.link})"
        assert not entry.sentence.endswith(".")


def test_the_adapter_gives_the_reason() -> None:
    machine = Capability.of("sm90", {"sageattention": "2.2.0"})
    assert sageattention.PROVIDER.reasons(a_call(), machine) == known_bad.reasons("sageattention", a_call(), machine)


def test_what_only_the_running_call_can_tell() -> None:
    (report,) = known_bad.at_run_time("sageattention")
    assert "CUDA graph" in report
    assert known_bad.at_run_time("spas_sage_attn") == []
