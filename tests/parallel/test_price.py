"""The price of a mesh that is not there: what explain says of exchange, bytes and time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.attention_model import Blocks
from support.graphs import capture
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparseattn import Policy, Report, Rule, explain, parallel
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import ParallelError, PolicyError
from sparseattn.fx_passes.parallel.price import price
from sparseattn.fx_passes.rewrite import rewrite_graph

SM90 = Capability.of("sm90")
EXACT = Policy.preset("exact")
TOPK = Policy([Rule("block_topk", params={"block_q": 16, "block_k": 16}, mode="require")], name="topk")
SPARSE = {"rules": [{"use": "block_topk", "params": {"keep_ratio": 0.25}}]}


class Mixed(nn.Module):
    """Attention over the sequence, to text, and of text."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        over_text = scaled_dot_product_attention(text, text, text)
        return scaled_dot_product_attention(x, x, x) + scaled_dot_product_attention(x, over_text, over_text)


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    return tuple(torch.zeros(1, 6, tokens, 64, dtype=torch.bfloat16) for tokens in (8192, 77))


def _explained(inputs: tuple[Tensor, Tensor], mesh: Any, policy: Any = "exact") -> Report:
    with torch.no_grad():
        return explain(Mixed(), *inputs, policy=policy, capability="sm90", mesh=mesh)


@pytest.fixture
def rank() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "policy"),
    [((4,), EXACT), ((2, 2), EXACT), ((4, 1), TOPK), ((2, 2), TOPK)],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_bytes_are_those_of_the_exchange_itself(rank: None, shape: tuple[int, ...], policy: Policy) -> None:
    mesh, x = init_device_mesh("cpu", shape), torch.randn(2, 61, 64)

    class Sharing(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(parallel.shard(x, mesh))

    asked = parallel.ContextParallel(mesh)
    made = rewrite_graph(capture(Sharing(heads=4), x), policy, parallel=asked)
    priced = explain(Blocks(heads=4), x, policy=policy, capability="sm90", mesh=shape)
    told = [
        [(row.communication.method, row.communication.collectives, row.communication.sent) for row in report.rows]
        for report in (made, priced)
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 2


def test_each_kind_of_site_is_told_apart(inputs: tuple[Tensor, Tensor]) -> None:
    of_text, over_itself, to_text = _explained(inputs, (2,)).rows
    assert of_text.communication.why == "every rank holds all of its tokens"
    assert to_text.communication.why == "keys and values are on every rank: each answers its own queries"
    assert over_itself.communication.sent > 0
    assert of_text.communication.sent == to_text.communication.sent == 0
    alone = _explained(inputs, (1,)).rows
    assert of_text.cost == alone[0].cost
    assert to_text.cost.attention < alone[2].cost.attention


def test_heads_decide_the_method_and_the_other_is_told(inputs: tuple[Tensor, Tensor]) -> None:
    few, many = (_explained(inputs, (ranks,)).rows[1] for ranks in (2, 8))
    around = _explained(inputs, (2, 1)).rows[1]
    assert few.communication.method == "ulysses"
    assert few.communication.why == f"6 heads on 2 ranks, 3 on each; ring would take {1e3 * around.cost.seconds:.3g} ms"
    assert many.communication.method == around.communication.method == "ring"
    assert many.communication.why == "6 heads are too few for 8 ranks"


def test_only_what_can_be_computed_in_parts_goes_round(inputs: tuple[Tensor, Tensor]) -> None:
    policy = {"rules": [{"use": "sage", "min_seq": 1024}]}
    assert _explained(inputs, (2,), policy).rows[1].communication.why == "6 heads on 2 ranks, 3 on each"
    with pytest.raises(ParallelError, match=r"sage cannot attend to a part of the keys\. Use mesh=\(4,\)"):
        _explained(inputs, (2, 2), policy)
    with pytest.raises(ParallelError, match="got 8 ranks and 6 heads"):
        _explained(inputs, (8,), policy)


def test_a_mesh_of_two_dimensions_is_a_ring_of_groups(inputs: tuple[Tensor, Tensor]) -> None:
    site = _explained(inputs, (4, 3)).rows[1]
    assert (site.communication.method, site.communication.collectives) == ("hybrid 3 x 4", 2 + 3)
    assert site.communication.why == "6 heads on 3 ranks, 2 on each"
    with pytest.raises(ParallelError, match="got 8 ranks and 6 heads"):
        _explained(inputs, (1, 8))


def test_a_sparse_site_computes_less_and_sends_as_much(inputs: tuple[Tensor, Tensor]) -> None:
    dense, sparse = (_explained(inputs, (1, 2), policy).rows[1] for policy in ("exact", SPARSE))
    assert sparse.decision.backend == "block_topk"
    assert sparse.cost.attention < 0.5 * dense.cost.attention
    assert (sparse.cost.sent, sparse.cost.waiting) == (dense.cost.sent, dense.cost.waiting)


def test_on_a_ring_it_sends_the_sums_of_its_blocks_too(inputs: tuple[Tensor, Tensor]) -> None:
    dense, sparse = (_explained(inputs, (2, 1), policy).rows[1] for policy in ("exact", SPARSE))
    blocks, heads, head_dim = 8192 // 64 // 2, 6, 64
    assert sparse.cost.sent == dense.cost.sent + blocks * heads * head_dim * 4
    assert sparse.cost.collectives == dense.cost.collectives + 1
    assert sparse.cost.waiting > dense.cost.waiting


def test_what_the_data_decide_is_priced_in_full(inputs: tuple[Tensor, Tensor]) -> None:
    policy = {"rules": [{"use": "sparge", "params": {"mass": 0.9}, "min_seq": 1024}]}
    (note,) = _explained(inputs, (2,), policy).notes
    assert "what only data or steps decide to keep is priced as if all were kept, at 1 of the sites" in note


def test_the_report_shows_prices_and_that_they_are_predicted(inputs: tuple[Tensor, Tensor]) -> None:
    report = _explained(inputs, (2,))
    cost, text = report.rows[1].cost, str(report)
    for needle in (
        "attention ms",
        "waiting ms",
        f"{1e3 * cost.attention:.3g}",
        "predicted for a mesh (2,)",
        "not measured",
    ):
        assert needle in text
    assert "predicted for a mesh (2,)" in report.to_html()
    assert json.loads(report.to_json())["sites"][1]["cost"]["waiting"] == cost.waiting
    assert "attention ms" not in str(_explained(inputs, None))


def test_wrong_meshes_and_machines_are_named(inputs: tuple[Tensor, Tensor]) -> None:
    for mesh in (8, (), (2, 2, 2), (0,), (True,), ("8",)):
        with pytest.raises(PolicyError, match=r"mesh must be \(ranks,\) or \(ring, ulysses\)"):
            price(Report(), mesh, SM90)
    with pytest.raises(PolicyError, match='Give capability="sm90"'):
        explain(Mixed(), *inputs, policy="exact", mesh=(8,))
    assert price(Report(), (8,), SM90).rows == ()
