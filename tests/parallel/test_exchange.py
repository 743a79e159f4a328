"""What the exchange does to a graph, seen on one rank of a group that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.attention_model import Blocks
from support.graphs import capture, count
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import scaled_dot_product_attention
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparseattn import Policy, Report, Rule, parallel
from sparseattn.attn_ops.errors import ArgumentError, ParallelError, PolicyError
from sparseattn.fx_passes.rewrite import rewrite_graph

RANKS, HEADS, CHANNELS = 4, 4, 64
EXACT, DENSE = Policy.preset("exact"), Policy((), name="dense")
SAGE = Policy([Rule("sage", mode="require")])


def topk(block_q: int = 16, block_k: int = 16) -> Policy:
    """A policy of block_topk."""
    return Policy([Rule("block_topk", mode="require", params={"block_q": block_q, "block_k": block_k})], name="topk")


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Iterator[DeviceMesh]:
    """Four ranks of which one is here; what it receives is not defined."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def _exchanged(
    function: Callable[..., Any], *inputs: Tensor, mesh: DeviceMesh, policy: Policy = EXACT, **asked: Any
) -> tuple[fx.GraphModule, Report]:
    graph = capture(function, *inputs)
    return graph, rewrite_graph(graph, policy, parallel=parallel.ContextParallel(mesh, **asked))


def _collectives(graph: fx.GraphModule) -> int:
    return sum("all_to_all" in str(node.target) for node in graph.graph.nodes)


class Sharing(Blocks):
    """Blocks on the shards of their input."""

    def __init__(self, mesh: DeviceMesh, **arguments: Any) -> None:
        super().__init__(heads=HEADS, **arguments)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(parallel.shard(x, self.mesh))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("policy", [EXACT, DENSE])
def test_two_collectives_around_every_site_rewritten_or_not(mesh: DeviceMesh, policy: Policy) -> None:
    graph, report = _exchanged(Sharing(mesh), torch.randn(2, 13, CHANNELS), mesh=mesh, policy=policy)
    assert _collectives(graph) == 2 * 2
    assert [row.decision.backend for row in report.rows] == [None if policy is DENSE else "flash"] * 2
    for row in report.rows:
        assert (row.call.seq_q, row.call.heads) == (13, HEADS)
        assert row.communication is not None
        assert (row.communication.method, row.communication.collectives) == ("ulysses", 2)


def test_the_site_sees_every_token_and_its_own_heads(mesh: DeviceMesh) -> None:
    graph, _ = _exchanged(Sharing(mesh), torch.randn(2, 13, CHANNELS), mesh=mesh, policy=DENSE)
    sites = graph.graph.find_nodes(op="call_function", target=torch._C._nn.scaled_dot_product_attention)
    assert [tuple(node.meta["example_value"].shape) for node in sites] == [(2, 1, 13, 16)] * 2


def test_bytes_are_those_of_shards_that_leave(mesh: DeviceMesh) -> None:
    _, report = _exchanged(Sharing(mesh), torch.randn(2, 13, CHANNELS), mesh=mesh)
    local, own, dim, others = 4, 1, 16, RANKS - 1
    one_way = others * 2 * local * own * dim * 4
    assert [row.communication.sent for row in report.rows if row.communication] == [3 * one_way + one_way] * 2
    assert "12.3 kB sent by each rank in 4 collectives around 2 of 2 sites" in str(report)
    assert "12.3 kB sent by each rank" in report.to_html()
    assert report.to_dict()["sites"][0]["communication"]["sent"] == 4 * one_way


def test_what_is_rounded_anyway_travels_as_int8(mesh: DeviceMesh) -> None:
    x = torch.randn(2, 13, CHANNELS)
    with torch.no_grad():
        graph, report = _exchanged(Sharing(mesh, layers=1), x, mesh=mesh, policy=SAGE, wire="int8")
    there, back = (node for node in graph.graph.nodes if "all_to_all" in str(node.target))
    assert there.meta["example_value"].dtype == torch.uint8
    assert back.meta["example_value"].dtype == torch.float32
    assert report.rows[0].communication is not None
    local, own, dim, others = 4, 1, 16, RANKS - 1
    row = own * (2 * (dim + 4) + dim * 4)  # one token more: the mean of k
    sent = others * 2 * ((local + 1) * row + local * own * dim * 4)
    assert (report.rows[0].communication.method, report.rows[0].communication.sent) == ("ulysses, INT8", sent)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"policy": EXACT}, "flash reads queries and keys unrounded"),
        ({"policy": DENSE}, "dense attention reads queries and keys unrounded"),
        ({"policy": EXACT, "method": "ring"}, "a ring passes on what it is given"),
    ],
    ids=["flash", "dense", "ring"],
)
def test_what_is_not_rounded_travels_as_it_is(mesh: DeviceMesh, asked: dict[str, Any], told: str) -> None:
    graph, report = _exchanged(Sharing(mesh, layers=1), torch.randn(2, 13, CHANNELS), mesh=mesh, wire="int8", **asked)
    sent = [node.meta["example_value"].dtype for node in graph.graph.nodes if "all_to_all" in str(node.target)]
    assert set(sent) == {torch.float32}
    assert report.rows[0].communication is not None
    assert f"; not as INT8: {told}" in report.rows[0].communication.why


def test_under_autocast_half_as_many_bytes_are_sent(mesh: DeviceMesh) -> None:
    def halved(q: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return _attend(*[parallel.shard(q, mesh, dim=2)] * 3)

    graph, report = _exchanged(halved, torch.randn(1, 4, 8, 16), mesh=mesh)
    sent = [node for node in graph.graph.nodes if "all_to_all" in str(node.target)]
    assert [node.meta["example_value"].dtype for node in sent] == [torch.bfloat16] * 2
    assert report.rows[0].communication is not None
    assert report.rows[0].communication.sent == 4 * 3 * 2 * 1 * 16 * 2


def test_keys_on_every_rank_are_not_sent(mesh: DeviceMesh) -> None:
    def cross(x: Tensor, text: Tensor) -> Tensor:
        return _attend(parallel.shard(x, mesh, dim=2), text, text)

    graph, report = _exchanged(cross, torch.randn(1, 4, 13, 16), torch.randn(1, 4, 5, 16), mesh=mesh)
    assert _collectives(graph) == 0
    assert report.rows[0].communication is not None
    assert report.rows[0].communication.why == "keys and values are on every rank: each answers its own queries"


def test_tokens_on_every_rank_are_not_sent(mesh: DeviceMesh) -> None:
    def text(x: Tensor, words: Tensor) -> Tensor:
        return parallel.shard(x, mesh, dim=2).sum() + _attend(words, words, words)

    graph, report = _exchanged(text, torch.randn(1, 4, 13, 16), torch.randn(1, 4, 5, 16), mesh=mesh)
    assert _collectives(graph) == 0
    assert report.rows[0].communication is not None
    assert report.rows[0].communication.why == "every rank holds all of its tokens"
    assert "parallel: no site has shards. Call sparseattn.parallel.shard_model" in str(report)


def test_shards_behind_a_graph_break_are_an_error(mesh: DeviceMesh) -> None:
    def broken(q: Tensor) -> Tensor:
        q = parallel.shard(q, mesh, dim=2)
        torch._dynamo.graph_break()
        return _attend(q, q, q)

    options = {"inner_backend": "eager", "parallel": parallel.ContextParallel(mesh)}
    with pytest.raises(BackendCompilerFailed, match=r"must make its shards, or be told of them by tokens.*fullgraph"):
        torch.compile(broken, backend="sparseattn", options=options)(torch.randn(1, 4, 13, 16))


def test_whole_sequences_are_whole_where_the_tokens_are_told(mesh: DeviceMesh) -> None:
    q = torch.randn(1, 4, 13, 16)
    graph, report = _exchanged(_attend, q, q, q, mesh=mesh, tokens=101)
    assert _collectives(graph) == 0
    assert "parallel: no site has shards" in str(report)


def test_a_graph_without_attention_may_be_given_shards(mesh: DeviceMesh) -> None:
    assert not _exchanged(torch.sin, torch.randn(4), mesh=mesh)[1].rows


def test_a_graph_that_is_not_parallel_is_left_alone() -> None:
    graph = capture(_attend, *torch.randn(3, 1, 4, 8, 16))
    report = rewrite_graph(graph, EXACT)
    assert _collectives(graph) == 0
    assert "communication" not in str(report)
    assert "communication" not in report.to_dict()["sites"][0]


@pytest.mark.parametrize(
    ("lose", "told"),
    [
        (lambda x: x.flip(1), "flip"),
        (lambda x: x.roll(1, dims=1), "roll"),
        (lambda x: x.view(2, 2, 2, CHANNELS).transpose(1, 2).reshape(2, 4, CHANNELS), "cut"),
    ],
    ids=["flip", "roll", "reshape"],
)
def test_shards_that_cannot_be_followed_are_an_error(
    mesh: DeviceMesh, lose: Callable[[Tensor], Tensor], told: str
) -> None:
    blocks = Blocks(layers=1, heads=HEADS)
    with pytest.raises(ParallelError, match=rf"parallel: .*{told}"):
        _exchanged(lambda x: blocks(lose(parallel.shard(x, mesh))), torch.randn(2, 16, CHANNELS), mesh=mesh)


def test_what_was_gathered_is_whole(mesh: DeviceMesh) -> None:
    def gathered(x: Tensor) -> Tensor:
        q = parallel.gather(parallel.shard(x, mesh, dim=2) * 2, mesh, dim=2, tokens=13)
        return _attend(q, q, q)

    graph, report = _exchanged(gathered, torch.randn(1, 4, 13, 16), mesh=mesh)
    assert _collectives(graph) == 0
    assert report.rows[0].call.seq_q == 13


def test_attention_that_is_no_site_is_an_error(mesh: DeviceMesh) -> None:
    def capped(q: Tensor) -> Tensor:
        q = parallel.shard(q, mesh, dim=2)
        return torch.tanh(q @ q.transpose(2, 3)).softmax(dim=-1) @ q

    with pytest.raises(ParallelError, match=r"must be scaled_dot_product_attention, and softmax at test_exchange.py"):
        _exchanged(capped, torch.randn(1, 4, 16, 16), mesh=mesh)


def test_unfused_attention_is_a_site_and_stays_one(mesh: DeviceMesh) -> None:
    def unfused(q: Tensor) -> Tensor:
        q = parallel.shard(q, mesh, dim=2)
        return (q @ q.transpose(2, 3) / 4).softmax(dim=-1) @ q

    graph, report = _exchanged(unfused, torch.randn(1, 4, 16, 16), mesh=mesh, policy=DENSE)
    assert _collectives(graph) == 2
    assert len(graph.graph.find_nodes(op="call_function", target=torch._C._nn.scaled_dot_product_attention)) == 1
    assert report.rows[0].call.seq_q == 16


def test_a_mask_of_one_rank_is_an_error(mesh: DeviceMesh) -> None:
    def masked(q: Tensor, mask: Tensor) -> Tensor:
        q = parallel.shard(q, mesh, dim=2)
        return scaled_dot_product_attention(q, q, q, attn_mask=mask)

    with pytest.raises(ParallelError, match=r"must be over the whole sequence, got \(4, 4\), made for the"):
        _exchanged(masked, torch.randn(1, 4, 16, 16), torch.ones(4, 4, dtype=torch.bool), mesh=mesh)


def test_a_whole_mask_reaches_the_site(mesh: DeviceMesh) -> None:
    def masked(q: Tensor, mask: Tensor) -> Tensor:
        q = parallel.shard(q, mesh, dim=2)
        return scaled_dot_product_attention(q, q, q, attn_mask=parallel.whole_mask(mask, q.shape[2]))

    mask = torch.ones(1, HEADS, 16, 16, dtype=torch.bool)
    graph, report = _exchanged(masked, torch.randn(1, HEADS, 16, 16), mask, mesh=mesh)
    (site,) = graph.graph.find_nodes(op="call_function", target=torch._C._nn.scaled_dot_product_attention)
    assert site.kwargs["attn_mask"].meta["example_value"].shape == (1, 1, 16, 16)
    assert report.rows[0].call.mask == "bool"


def test_keys_sharded_otherwise_than_queries_are_an_error(mesh: DeviceMesh) -> None:
    def cross(x: Tensor, text: Tensor) -> Tensor:
        return _attend(parallel.shard(x, mesh, dim=2), *[parallel.shard(text, mesh, dim=2)] * 2)

    with pytest.raises(ParallelError, match="must be sharded alike, got 4 of 13, 2 of 8 and 2 of 8 tokens"):
        _exchanged(cross, torch.randn(1, 4, 13, 16), torch.randn(1, 4, 8, 16), mesh=mesh)


@pytest.mark.parametrize("policy", [EXACT, DENSE])
def test_a_ring_takes_the_place_of_a_site(mesh: DeviceMesh, policy: Policy) -> None:
    model = Sharing(mesh, layers=1)
    graph, report = _exchanged(model, torch.randn(2, 13, CHANNELS), mesh=mesh, policy=policy, method="ring")
    assert _collectives(graph) == RANKS - 1
    assert count(graph, torch.ops.sparseattn.flash_attention.default) == RANKS
    assert count(graph, torch._C._nn.scaled_dot_product_attention) == 0
    assert report.rows[0].communication is not None
    assert report.rows[0].communication.sent == (RANKS - 1) * 2 * 2 * 4 * CHANNELS * 4


def test_a_causal_ring_computes_what_is_not_in_the_future(mesh: DeviceMesh) -> None:
    model = Sharing(mesh, layers=1, is_causal=True)
    graph, _ = _exchanged(model, torch.randn(2, 13, CHANNELS), mesh=mesh, method="ring")
    assert _collectives(graph) == RANKS - 1
    assert count(graph, torch.ops.sparseattn.flash_attention.default) == 2  # this is rank 1


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_are_chosen_before_the_ring(mesh: DeviceMesh, causal: bool) -> None:
    model = Sharing(mesh, layers=1, is_causal=causal)
    graph, report = _exchanged(model, torch.randn(2, 128, CHANNELS), mesh=mesh, policy=topk(), method="ring")
    assert _collectives(graph) == RANKS - 1
    assert count(graph, torch.ops._c10d_functional.all_gather_into_tensor.default) == 1
    assert count(graph, torch.ops.sparseattn.choose_by_sums.default) == 1
    assert count(graph, torch.ops.sparseattn.block_sparse_attention.default) == (
        2 if causal else RANKS
    )  # this is rank 1
    moved, (blocks, others) = report.rows[0].communication, (128 // RANKS // 16, RANKS - 1)
    assert moved is not None
    assert moved.collectives == RANKS
    assert moved.sent == others * 2 * (2 * 32 + blocks) * CHANNELS * 4
    assert report.rows[0].decision.backend == "block_topk"


def test_a_mesh_of_two_dimensions_is_a_ring_of_groups(mesh: DeviceMesh) -> None:
    of_two = init_device_mesh("cpu", (2, 2))
    graph, report = _exchanged(Sharing(of_two, layers=1), torch.randn(2, 13, CHANNELS), mesh=of_two)
    assert _collectives(graph) == 2 + 1
    moved, local, own = report.rows[0].communication, 4, CHANNELS // 2
    assert moved is not None
    assert (moved.method, moved.why, moved.collectives) == ("hybrid 2 x 2", "4 heads on 2 ranks, 2 on each", 3)
    assert moved.sent == 4 * (2 * 4 * local * own + 2 * 2 * (2 * local) * own)


def test_a_mesh_with_a_dimension_of_one_is_a_ring_or_ulysses(mesh: DeviceMesh) -> None:
    for shape, method in (((1, 4), "ulysses"), ((4, 1), "ring")):
        flat = init_device_mesh("cpu", shape)
        graph, report = _exchanged(Sharing(flat, layers=1), torch.randn(2, 13, CHANNELS), mesh=flat, method="hybrid")
        assert _collectives(graph) == (2 if method == "ulysses" else RANKS - 1)
        assert report.rows[0].communication is not None
        assert report.rows[0].communication.method == method


def test_fewer_heads_than_ranks_are_a_ring(mesh: DeviceMesh) -> None:
    _, report = _exchanged(_shared_by(mesh), torch.randn(1, 3, 13, 16), mesh=mesh)
    assert report.rows[0].communication is not None
    assert report.rows[0].communication.method == "ring"
    assert report.rows[0].communication.why == "3 heads are too few for 4 ranks"


@pytest.mark.parametrize(
    ("arguments", "policy", "told"),
    [
        ({"dropout_p": 0.5}, DENSE, "got dropout at"),
        ({"attn_mask": torch.ones(16, 16).tril(3) > 0}, DENSE, "got a bool mask at"),
        ({}, Policy([Rule("sla", mode="require")]), "got sla at"),
        ({"is_causal": True}, topk(block_q=32), "got causal block_topk with block_q=32 and block_k=16, whose blocks"),
    ],
    ids=["dropout", "mask", "sparse", "blocks"],
)
def test_what_a_ring_cannot_compute_is_an_error(
    mesh: DeviceMesh, arguments: dict[str, Any], policy: Policy, told: str
) -> None:
    with pytest.raises(
        ParallelError, match=rf"a ring must compute exact attention or block_topk, causal or not, .*{told}"
    ):
        _exchanged(_shared_by(mesh, **arguments), torch.randn(1, 4, 16, 16), mesh=mesh, policy=policy, method="ring")


def _shared_by(mesh: DeviceMesh, *, attn_mask: Tensor | None = None, **arguments: Any) -> Callable[[Tensor], Tensor]:
    def attend(q: Tensor) -> Tensor:
        q = parallel.shard(q, mesh, dim=2)
        mask = None if attn_mask is None else parallel.whole_mask(attn_mask, q.shape[2])
        return scaled_dot_product_attention(q, q, q, attn_mask=mask, **arguments)

    return attend


def test_text_given_by_number(mesh: DeviceMesh) -> None:
    tensors = torch.randn(3, 1, 4, 4 + 5, 16)
    graph, report = _exchanged(_attend, *tensors, mesh=mesh, tokens=13, text_tokens=5, text_first=True)
    assert _collectives(graph) == 2
    assert report.rows[0].call.seq_q == 13 + 5


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"method": "rings"}, "method must be one of ulysses, ring, hybrid, auto, got 'rings'"),
        ({"method": "hybrid"}, "method must be ulysses, ring or auto on a mesh of 1 dimension, got 'hybrid'"),
        ({"wire": "int4"}, "wire must be one of exact, int8, got 'int4'"),
        ({"tokens": 0}, "tokens must be an int of at least 1, got 0"),
        ({"text_tokens": 3}, "text_tokens and text_first must come with tokens"),
    ],
)
def test_wrong_wishes_are_refused(mesh: DeviceMesh, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        parallel.ContextParallel(mesh, **asked)


def test_a_mesh_has_one_dimension_or_two() -> None:
    with pytest.raises(
        PolicyError, match=r"mesh must be a DeviceMesh of one dimension, or of two .*, got 3 dimensions"
    ):
        parallel.ContextParallel(init_device_mesh("cpu", (1, 2, 2)))
    with pytest.raises(PolicyError, match="method must be hybrid or auto on a mesh of 2 dimensions, got 'ring'"):
        parallel.ContextParallel(init_device_mesh("cpu", (2, 2)), method="ring")
    with pytest.raises(PolicyError, match="got int"):
        parallel.ContextParallel(4)


def test_gather_wants_the_tokens_that_were_sharded(mesh: DeviceMesh) -> None:
    with pytest.raises(ArgumentError, match="gather: tokens must be those of 4 shards of 5, got 21"):
        parallel.gather(torch.zeros(1, 5, 3), mesh, tokens=21)


@pytest.mark.parametrize("rank", range(4))
def test_shards_are_padded_with_the_last_token(rank: int) -> None:
    x = torch.arange(5.0)[None]
    expected = [[0, 1], [2, 3], [4, 4], [4, 4]]
    assert torch.ops.sparseattn.shard_tokens(x, 1, 4, rank).tolist() == [expected[rank]]


def test_a_model_without_a_plan_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(ParallelError, match="the plan of Blocks must be known or given"):
        parallel.shard_model(Blocks(), mesh)


def test_a_plan_must_fit_the_model(mesh: DeviceMesh) -> None:
    with pytest.raises(ParallelError, match="and Blocks has no such module"):
        parallel.shard_model(Blocks(), mesh, {"layers.0": parallel.Gather()})
    with pytest.raises(ParallelError, match="SelfAttention must have the argument 'y' of the plan"):
        parallel.shard_model(Blocks(), mesh, {"blocks.0": {"y": parallel.Split(1)}})


def test_a_plan_of_ones_own_and_its_end(mesh: DeviceMesh) -> None:
    model = Blocks(layers=2, heads=HEADS)
    plan: parallel.Plan = {"blocks.*": {"x": parallel.Split(1)}}
    with parallel.shard_model(model, mesh, plan):
        assert all(block._forward_pre_hooks for block in model.blocks)
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_the_plan_that_diffusers_gives_is_read() -> None:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    plan = parallel.plan_of(model)
    assert plan["proj_out"] == parallel.Gather(1)
    assert plan[""]["hidden_states"] == parallel.Split(1, rank=3)
