"""Communication model: what an attention costs on many GPUs that are not here. A prediction, from published rates.

Ulysses sends queries, keys and values to the ranks of their heads and the output back, and nothing can be computed
meanwhile. A ring passes keys and values on while it attends to those that it has. A hybrid does the first within
groups of neighbours, the second between the groups. docs/parallel_simulation.md has the formula with all assumptions.

NVLink: 370 of the 450 GB/s that an H100 has in each direction, what NCCL's maintainers say is left by the protocol
(NVIDIA/nccl-tests issue 212). Network: 43 of the 50 GB/s of InfiniBand with 400 Gb/s per GPU, what DeepEP publishes
for an all-to-all between nodes. Latencies: of NCCL's own model (src/graph/tuning.cc; ring, Simple).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..attn_ops.call import AttentionCall
from ..attn_ops.capability import Capability
from ..attn_ops.errors import PolicyError
from ..attn_ops.sharding import local_tokens
from .cost_model import memory_rate
from .head_split import HeadSplit

Attend = Callable[[AttentionCall], float]
"""Seconds of one attention on one GPU."""


@dataclass(frozen=True)
class Link:
    """Bytes per second in each direction that one GPU reaches, and seconds until the first one arrives."""

    bandwidth: float
    latency: float

    def seconds(self, size: float) -> float:
        """Of one message."""
        return self.latency + size / self.bandwidth


NVLINK = Link(370e9, 11.8e-6)
NETWORK = Link(43e9, 18.0e-6)


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes.

    Args:
        node: GPUs of a node.
        nvlink: link within a node.
        network: link between nodes, one for each GPU.
        memory: bytes per second of a GPU's memory.
    """

    node: int
    nvlink: Link
    network: Link
    memory: float

    @classmethod
    def of(cls, machine: Capability) -> Cluster:
        """Nodes of eight such GPUs.

        Raises:
            PolicyError: if nothing is known of their links.
        """
        if machine.sm != 90:
            raise PolicyError(
                f"mesh: communication is predicted for sm90, nodes of eight H100 SXM, not for {machine}. "
                'Give capability="sm90", or measure on the machine.'
            )
        return cls(8, NVLINK, NETWORK, memory_rate(machine))

    def link(self, ranks: int) -> Link:
        """The slowest between neighbours among so many ranks."""
        return self.network if ranks > self.node else self.nvlink


@dataclass(frozen=True)
class Split:
    """How ranks share an attention: rank r is number r % ulysses of group r // ulysses.

    Args:
        ulysses: ranks of a group, which share heads.
        ring: groups, which pass keys and values on.
    """

    ulysses: int
    ring: int

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.ulysses * self.ring

    @property
    def method(self) -> str:
        """Its name."""
        if self.ranks == 1:
            return "none"
        return "ulysses" if self.ring == 1 else "ring" if self.ulysses == 1 else "hybrid"

    def near(self, node: int) -> int:
        """Ranks of its own group that the worst-off rank has in its node beside itself."""
        groups = (range(first, first + self.ulysses) for first in range(0, self.ranks, self.ulysses))
        return min(sum(peer // node == rank // node for peer in group) - 1 for group in groups for rank in group)

    def __str__(self) -> str:
        return f"hybrid {self.ulysses} x {self.ring}" if self.method == "hybrid" else self.method


@dataclass(frozen=True)
class ParallelCost:
    """One forward of a site on one of many ranks: what it sends and, predicted, how long it takes.

    Args:
        split: how the ranks share it.
        sent: bytes that leave the rank.
        collectives: all-to-alls, and shards passed on.
        attention: seconds of attention itself.
        links: seconds in which links are busy.
        waiting: seconds added to attention: what no computation hides, rearranging for it, merging parts.
    """

    split: Split
    sent: int = 0
    collectives: int = 0
    attention: float = 0.0
    links: float = 0.0
    waiting: float = 0.0

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.attention + self.waiting

    def __add__(self, then: ParallelCost) -> ParallelCost:
        """One after the other."""
        attention, links, waiting = (
            self.attention + then.attention,
            self.links + then.links,
            self.waiting + then.waiting,
        )
        sent, collectives = self.sent + then.sent, self.collectives + then.collectives
        return ParallelCost(self.split, sent, collectives, attention, links, waiting)


def splits(ranks: int, heads: int) -> Iterator[Split]:
    """Every way in which ranks can share so many query heads: Ulysses first, if it can, and the ring last."""
    for ulysses in range(min(ranks, heads), 0, -1):
        if ranks % ulysses == 0:
            yield Split(ulysses, ranks // ulysses)


def parallel_cost(
    call: AttentionCall, split: Split, attend: Attend, cluster: Cluster, *, text_tokens: int = 0
) -> ParallelCost:
    """What a self-attention over shards of its sequence sends, and how long it should take.

    Args:
        call: the whole attention.
        split: how ranks share it.
        attend: seconds that a part of it takes on one GPU.
        cluster: the GPUs.
        text_tokens: so many of the tokens are on every rank.

    Raises:
        ParallelError: if a Ulysses group has more ranks than there are query heads.
    """
    heads = HeadSplit.of(call.heads, call.kv_heads, split.ulysses)
    own = replace(call, heads=heads.own, kv_heads=heads.own_kv)
    local = local_tokens(call.seq_q - text_tokens, split.ranks)
    return _exchange(own, split, local, text_tokens, cluster) + _ring(own, split, local, text_tokens, attend, cluster)


def _exchange(own: AttentionCall, split: Split, local: int, text: int, cluster: Cluster) -> ParallelCost:
    """The two all-to-alls of Ulysses, one after the other with attention in between."""
    peers = split.ulysses - 1
    if not peers:
        return ParallelCost(split)
    values = own.value_dim or own.head_dim
    to_heads = local * (own.heads * own.head_dim + own.kv_heads * (own.head_dim + values))
    each = own.batch * (to_heads + (local + text) * own.heads * values) * own.dtype.itemsize  # to one peer
    near = split.near(cluster.node)
    far = peers - near  # both kinds of links work at the same time
    slowest = max(near * each / cluster.nvlink.bandwidth, far * each / cluster.network.bandwidth)
    links = slowest + 2 * (cluster.network if far else cluster.nvlink).latency
    packing = 4 * split.ulysses * each / cluster.memory  # read and written, before and after
    return ParallelCost(split, sent=peers * each, collectives=2, links=links, waiting=links + packing)


def _ring(own: AttentionCall, split: Split, local: int, text: int, attend: Attend, cluster: Cluster) -> ParallelCost:
    """The steps of a ring, each over the keys of one group of ranks; the next keys arrive meanwhile."""
    if split.ring == 1:
        return ParallelCost(split, attention=attend(own))
    shard, passes, values = local * split.ulysses, split.ring - 1, own.value_dim or own.head_dim
    first = attend(replace(own, seq_q=shard + text, seq_k=shard + text))
    step = attend(replace(own, seq_q=shard + text, seq_k=shard, causal=False))
    size = own.batch * own.kv_heads * shard * (own.head_dim + values) * own.dtype.itemsize
    passing = cluster.link(split.ranks).seconds(size)
    hidden_by = [first, *[step] * (passes - 1)]
    waits = sum(max(0.0, passing - meanwhile) for meanwhile in hidden_by)
    parts = passes * own.batch * own.heads * (shard + text) * values  # each is read, and added to a sum in fp32
    merging = parts * (own.dtype.itemsize + 8) / cluster.memory
    attention, waiting = first + passes * step, waits + merging
    return ParallelCost(split, passes * size, passes, attention, links=passes * passing, waiting=waiting)
