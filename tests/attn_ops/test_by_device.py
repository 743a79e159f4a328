"""Which device chooses blocks with Triton, and that a CPU does it by the definition."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from sparseattn.attn_ops.blocks import by_device, topk
from sparseattn.attn_ops.capability import Capability

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("machine", "runs"),
    [
        (Capability.of("sm80"), True),
        (Capability.of("sm120"), True),
        (Capability.of("sm75"), False),
        (Capability.of("sm90", {"triton": "3.5"}), False),
        (Capability.of("sm90", {}), False),
    ],
    ids=["sm80", "sm120", "old GPU", "old Triton", "no Triton"],
)
def test_a_gpu_chooses_with_triton_where_its_providers_run(machine: Capability, runs: bool) -> None:
    with mock.patch.object(Capability, "current", return_value=machine):
        assert by_device.runs_triton(CUDA) is runs
        assert not by_device.runs_triton(torch.device("cpu"))


@pytest.mark.parametrize("name", ["block_mean", "top_k_blocks", "count_to_mass"])
def test_a_cpu_computes_the_definition(name: str) -> None:
    weights = torch.rand(1, 2, 12, 8).softmax(dim=-1)
    second = torch.tensor(0.5) if name == "count_to_mass" else 3
    torch.testing.assert_close(
        getattr(by_device, name)(weights, second), getattr(topk, name)(weights, second), rtol=0, atol=0
    )
