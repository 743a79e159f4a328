"""The ops by hand on two gloo processes: DTensors with batch or heads split, and DistributedAttention."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed_attention_cases import METHODS
from support.dtensor_cases import OPS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparseattn import parallel
from sparseattn.attn_ops.dtensor import _divided
from sparseattn.attn_ops.errors import ArgumentError, ParallelError, PolicyError

CLOSE = 1e-5

forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")


@pytest.fixture(scope="module")
def two(launched: Any) -> dict[str, list[Any]]:
    """All cases on two ranks."""
    found: dict[str, list[Any]] = launched("support.sharded_eager", 2)
    return found


@pytest.fixture(scope="module")
def alone() -> Any:
    """Rank 1 of four that are not there; what it receives is not defined."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


@forked
@pytest.mark.parametrize("case", ["batch", "heads", "grouped heads", "one kv head"])
def test_every_op_stays_split_and_gives_what_it_gives_whole(two: dict[str, list[Any]], case: str) -> None:
    for rank in two[case]:
        assert set(rank) == set(OPS)
        assert max(rank.values()) <= CLOSE


@forked
@pytest.mark.parametrize("case", ["whole heads", "tokens", "ratios", "compiled"])
def test_dtensors_in_other_circumstances(two: dict[str, list[Any]], case: str) -> None:
    assert len(two[case]) == 2
    assert max(max(rank.values()) for rank in two[case]) <= CLOSE


@forked
def test_distributed_attention_is_local_attention_over_all_tokens(two: dict[str, list[Any]]) -> None:
    for rank in two["every method"]:
        assert set(rank) == set(METHODS)
        assert max(rank.values()) <= CLOSE


@forked
def test_distributed_attention_compiled_or_with_a_gate(two: dict[str, list[Any]]) -> None:
    for rank in two["other ways"]:
        assert set(rank) == {"compiled", "by this backend", "gated"}
        assert max(rank.values()) <= CLOSE


def test_batch_and_heads_on_a_mesh_of_two_dimensions(alone: Any) -> None:
    parallel.register_dtensor()
    q = distribute_tensor(torch.randn(4, 8, 16, 16), alone, [Shard(0), Shard(1)])
    k = distribute_tensor(torch.randn(4, 4, 16, 16), alone, [Shard(0), Shard(1)])
    for result in torch.ops.sparseattn.flash_attention(q, k, k):
        assert result.placements == (Shard(0), Shard(1))


def test_ratios_split_on_a_mesh_of_two_dimensions_are_refused(alone: Any) -> None:
    parallel.register_dtensor()
    q = distribute_tensor(torch.randn(4, 8, 16, 16), alone, [Shard(0), Shard(1)])
    ratios = distribute_tensor(torch.ones(8), alone, [Replicate(), Shard(0)])
    with pytest.raises(RuntimeError, match=r"block_topk_attention: keep_ratios must be Replicate where heads cannot"):
        torch.ops.sparseattn.block_topk_attention(q, q, q, keep_ratios=ratios)


@pytest.mark.parametrize(
    ("kv_heads", "mesh", "fine"),
    [(8, (4,), True), (6, (4,), False), (2, (4,), True), (8, (8, 8), True), (6, (2, 2), False), (6, (1, 3), True)],
)
def test_groups_stay_together_in_every_split_that_torch_may_choose(
    kv_heads: int, mesh: tuple[int, ...], fine: bool
) -> None:
    """More ranks than heads are no split: torch does not choose it."""
    assert _divided(kv_heads, mesh) == fine


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        ({"method": "flush"}, PolicyError, 'unknown backend .flush.. Did you mean "flash"'),
        ({"windows": 3}, ArgumentError, "windows must be a parameter of flash"),
        ({"method": "vsa", "causal": True}, ArgumentError, "causal must be a parameter of vsa"),
        ({"method": "block_sparse"}, ArgumentError, "Call the op with its block_index, block_count"),
        ({"num_heads": 1}, ParallelError, "must be at most the query heads, got 2 ranks and 1 heads"),
    ],
)
def test_modules_refuse_what_they_cannot_compute(alone: Any, asked: dict[str, Any], error: Any, told: str) -> None:
    given = {"num_heads": 4, "head_size": 16, **asked}
    with pytest.raises(error, match=told):
        parallel.DistributedAttention(**given, mesh=alone["tp"])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"q": torch.zeros(1, 4, 7, 16)}, r"q must be \(batch, tokens, 4, 16\), got \(1, 4, 7, 16\)"),
        ({"k": torch.zeros(1, 5, 4, 16)}, "k, v must have q's tokens"),
        ({"original_seq_len": 9}, "original_seq_len must be in 1 ... 8, the tokens of all ranks, got 9"),
        ({"replicated_q": torch.zeros(1, 3, 4, 16)}, "replicated_k must be given for q, k and v"),
        ({"gate_compress": torch.zeros(1, 4, 4, 16)}, "gate_compress must be None but for vsa"),
    ],
)
def test_modules_refuse_tensors_that_do_not_fit(alone: Any, changed: dict[str, Any], told: str) -> None:
    module = parallel.DistributedAttention(num_heads=4, head_size=16, mesh=alone["tp"])
    with pytest.raises(ArgumentError, match=told):
        module(**{**dict.fromkeys("qkv", torch.zeros(1, 4, 4, 16)), **changed})
