"""HeadSplit: which heads each rank computes when attention is split over ranks by heads. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from ..attn_ops.errors import ParallelError

T = TypeVar("T")


@dataclass(frozen=True)
class HeadSplit:
    """The same number of heads on every rank; where that needs more than there are, copies of the last head.

    Args:
        heads: query heads of the call.
        kv_heads: key and value heads of the call.
        ranks: ranks that share them.
        repeat: so many ranks, or query heads, get a copy of each key and value head.
        own: query heads of one rank.
        own_kv: key and value heads of one rank.
    """

    heads: int
    kv_heads: int
    ranks: int
    repeat: int
    own: int
    own_kv: int

    @classmethod
    def of(cls, heads: int, kv_heads: int, ranks: int) -> HeadSplit:
        """The split that computes and sends least.

        Raises:
            ParallelError: if there are fewer query heads than ranks.
        """
        if heads < ranks:
            raise ParallelError(
                f"parallel: the ranks of a Ulysses group must be at most the query heads, got {ranks} ranks and "
                f"{heads} heads: {ranks - heads} would have nothing to compute. Use a smaller mesh."
            )
        group, most = heads // kv_heads, _ceil(heads, ranks)
        if heads % ranks == 0 and ranks % kv_heads == 0:
            return cls(heads, kv_heads, ranks, ranks // kv_heads, most, 1)
        own_kv = _ceil(kv_heads, ranks)
        if own_kv * group <= most:
            return cls(heads, kv_heads, ranks, 1, own_kv * group, own_kv)
        return cls(heads, kv_heads, ranks, group, most, most)

    @property
    def padding(self) -> int:
        """Query heads that are computed and thrown away, over all ranks."""
        return self.own * self.ranks - self.heads

    def of_rank(self, rank: int, values: tuple[T, ...]) -> tuple[T, ...]:
        """What one rank's heads get of a list with as many entries for each query head."""
        each = len(values) // self.heads
        heads = [min(rank * self.own + place, self.heads - 1) for place in range(self.own)]
        return tuple(value for head in heads for value in values[head * each : (head + 1) * each])

    def __str__(self) -> str:
        repeated = f", key and value heads repeated {self.repeat} times" if self.repeat > 1 else ""
        padded = f", {self.padding} of padding" if self.padding else ""
        return f"{self.heads} heads on {self.ranks} ranks, {self.own} on each{repeated}{padded}"


def _ceil(total: int, parts: int) -> int:
    return -(-total // parts)
