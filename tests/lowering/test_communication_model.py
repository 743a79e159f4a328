"""The communication model: bytes are those of the exchange, times follow from links and from what hides them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import ParallelError, PolicyError
from sparseattn.attn_ops.sharding import local_tokens
from sparseattn.fx_passes.parallel import ring
from sparseattn.fx_passes.parallel.ulysses import Piece, Ulysses, payload
from sparseattn.lowering.communication_model import Cluster, Link, Split, parallel_cost, splits
from sparseattn.lowering.cost_model import memory_rate
from sparseattn.lowering.head_split import HeadSplit

SM90 = Capability.of("sm90")
H100S = Cluster.of(SM90)
CALL = AttentionCall(1, 24, 24, 118_800, 118_800, 128, dtype=torch.bfloat16)
PLAIN = Cluster(node=8, nvlink=Link(100.0, 1.0), network=Link(10.0, 2.0), memory=float("inf"))
"""Links with numbers that a reader can follow; memory costs nothing."""
SMALL = AttentionCall(1, 8, 8, 64, 64, 4, dtype=torch.bfloat16)


def _constant(seconds: float):
    return lambda part: seconds


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(24, 24), (40, 40), (16, 2), (5, 5)])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize(("dtype", "value_dim"), [(torch.bfloat16, None), (torch.float32, 64)])
def test_ulysses_sends_what_the_exchange_counts(
    heads: int, kv_heads: int, ranks: int, text: int, dtype: torch.dtype, value_dim: int | None
) -> None:
    tokens, dim = 1001, 128
    values = value_dim or dim
    call = AttentionCall(2, heads, kv_heads, tokens + text, tokens + text, dim, dtype=dtype, value_dim=value_dim)
    split = HeadSplit.of(heads, kv_heads, ranks)
    pieces = [Piece(local_tokens(tokens, ranks), tokens, sharded=True), *([Piece(text, text, False)] if text else [])]
    sent = [(split.own, dim), (split.own_kv, dim), (split.own_kv, values)]
    elements = payload(Ulysses(tuple(pieces), split, 0, "group"), sent, 2, values)
    cost = parallel_cost(call, Split(ranks, 1), _constant(1.0), H100S, text_tokens=text)
    assert (cost.sent, cost.collectives) == (elements * dtype.itemsize, 2)


def test_a_ring_sends_all_keys_and_values_but_its_own() -> None:
    cost = parallel_cost(CALL, Split(1, 8), _constant(1.0), H100S)
    assert cost.sent == 7 * 2 * 24 * (118_800 // 8) * 128 * 2
    assert cost.collectives == 7


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize(("kv_heads", "ranks"), [(24, 2), (2, 3), (5, 5)])
def test_a_ring_sends_what_the_exchange_counts(kv_heads: int, ranks: int, text: int) -> None:
    call = AttentionCall(2, 5 * kv_heads, kv_heads, 1001 + text, 1001 + text, 64, dtype=torch.bfloat16)
    pieces = [Piece(local_tokens(1001, ranks), 1001, sharded=True), *([Piece(text, text, False)] if text else [])]
    elements = ring.payload(ring.Ring(tuple(pieces), False, ranks, 0, "group"), kv_heads, 64, 2)
    assert parallel_cost(call, Split(1, ranks), _constant(1.0), H100S, text_tokens=text).sent == 2 * elements


def test_a_hybrid_sends_what_both_do() -> None:
    cost = parallel_cost(SMALL, Split(4, 2), _constant(1.0), PLAIN)
    in_groups = 3 * 4 * 8 * 2 * 4 * 2  # peers, tensors, tokens, heads, channels, bytes
    around = 1 * 2 * 32 * 2 * 4 * 2  # passes, tensors, tokens of a group, heads, channels, bytes
    assert (cost.sent, cost.collectives) == (in_groups + around, 2 + 1)


def test_ulysses_waits_for_its_links() -> None:
    cost = parallel_cost(SMALL, Split(8, 1), _constant(5.0), PLAIN)
    assert cost.links == pytest.approx(cost.sent / 100.0 + 2 * 1.0)
    assert cost.seconds == pytest.approx(5.0 + cost.links)


def test_ulysses_across_nodes_waits_for_the_network() -> None:
    cost = parallel_cost(replace(SMALL, heads=16, kv_heads=16), Split(16, 1), _constant(5.0), PLAIN)
    assert cost.waiting == pytest.approx(cost.sent * 8 / 15 / 10.0 + 2 * 2.0)  # 8 of 15 peers are in the other node


@pytest.mark.parametrize(
    ("attention", "waiting"), [(100.0, 0.0), (11.24, 0.0), (3.0, 7 * (11.24 - 3.0)), (0.0, 7 * 11.24)]
)
def test_a_ring_waits_only_for_what_attention_does_not_hide(attention: float, waiting: float) -> None:
    cost = parallel_cost(SMALL, Split(1, 8), _constant(attention), PLAIN)  # a pass: 1 s and 1,024 bytes at 100 B/s
    assert cost.links == pytest.approx(7 * 11.24)
    assert cost.waiting == pytest.approx(waiting)
    assert cost.seconds == pytest.approx(8 * attention + waiting)


def test_parts_of_a_ring_are_attended_and_merged() -> None:
    parts: list[AttentionCall] = []

    def attend(part: AttentionCall) -> float:
        parts.append(part)
        return 100.0

    causal = replace(SMALL, seq_q=67, seq_k=67, causal=True)
    cost = parallel_cost(causal, Split(2, 4), attend, replace(PLAIN, memory=8.0), text_tokens=3)
    assert [(part.heads, part.seq_q, part.seq_k, part.causal) for part in parts] == [
        (4, 19, 19, True),
        (4, 19, 16, False),
    ]
    packing, merging = 4 * 2 * (4 * 8 + 3) * 4 * 4 * 2 / 8.0, 3 * 4 * 19 * 4 * (2 + 8) / 8.0
    exchange = (4 * 8 + 3) * 4 * 4 * 2 / 100.0 + 2 * 1.0
    assert cost.waiting == pytest.approx(packing + merging + exchange)


def test_one_rank_sends_and_waits_nothing() -> None:
    cost = parallel_cost(CALL, Split(1, 1), _constant(3.0), H100S)
    assert (cost.sent, cost.collectives, cost.links, cost.waiting, cost.seconds) == (0, 0, 0.0, 0.0, 3.0)


def test_every_way_to_share_is_listed_once() -> None:
    assert [str(split) for split in splits(16, 24)] == [
        "ulysses",
        "hybrid 8 x 2",
        "hybrid 4 x 4",
        "hybrid 2 x 8",
        "ring",
    ]
    assert [split.ulysses for split in splits(64, 24)] == [16, 8, 4, 2, 1]
    assert [split.method for split in splits(1, 24)] == ["none"]


@pytest.mark.parametrize(
    ("split", "near"),
    [(Split(8, 1), 7), (Split(16, 1), 7), (Split(4, 4), 3), (Split(1, 16), 0), (Split(12, 1), 3), (Split(6, 2), 1)],
)
def test_neighbours_of_the_worst_off_rank(split: Split, near: int) -> None:
    assert split.near(8) == near


def test_published_rates() -> None:
    assert (H100S.nvlink.bandwidth, H100S.network.bandwidth, H100S.memory) == (370e9, 43e9, memory_rate(SM90))
    assert H100S.link(8) is H100S.nvlink
    assert H100S.link(9) is H100S.network


def test_what_nobody_published_is_not_predicted() -> None:
    with pytest.raises(PolicyError, match=r"mesh: communication is predicted for sm90.*not for cpu"):
        Cluster.of(Capability.of("cpu-avx512"))
    with pytest.raises(ParallelError, match="got 32 ranks and 24 heads"):
        parallel_cost(CALL, Split(32, 1), _constant(1.0), H100S)
