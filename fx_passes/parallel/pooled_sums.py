"""PooledSums: the sums of the blocks of a sequence that the ranks of a ring share, on every rank by one gather.

A block that lies on several ranks, or has text in it that all of them hold, is summed in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .ring import Ring, Run
from .run_blocks import RunBlocks

_BLOCKS = 2  # dimension of the blocks in (B, H, blocks, D)


@dataclass(frozen=True)
class PooledSums:
    """Blocks of one size, of queries or of keys.

    Args:
        ring: the ranks, and which tokens they have.
        block: tokens of a block.
    """

    ring: Ring
    block: int

    @property
    def in_parts(self) -> bool:
        """Whether some block lies in several runs."""
        return any(run.first % self.block for runs in self._runs() for run in runs if run.size)

    @property
    def sent(self) -> int:
        """Blocks for which a rank sends sums, those that stand for nothing on it included."""
        return sum(self._most())

    def own(self, x: Tensor) -> Tensor:
        """What this rank sends of (B, H, local, D): (B, H, sent, D) fp32."""
        runs = self.ring.runs(self.ring.rank, whole=True)
        parts = [_filled(x, self.of(run), most) for run, most in zip(runs, self._most(), strict=True) if most]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=_BLOCKS)

    def whole(self, x: Tensor, received: Tensor) -> Tensor:
        """The sums of all blocks, (B, H, blocks, D), with the tokens of x that every rank holds.

        Args:
            x: (B, H, local, D).
            received: (ranks, B, H, sent, D), what every rank sent.
        """
        parts, place = [], 0
        for piece, most, runs in zip(self.ring.pieces, self._most(), zip(*self._runs(), strict=True), strict=True):
            if piece.sharded:
                blocks = [(rank, self.of(run)) for rank, run in enumerate(runs) if run.size]
                parts += [(some, received[rank].narrow(_BLOCKS, place, some.count)) for rank, some in blocks]
            elif piece.whole:
                parts.append((self.of(runs[0]), self.of(runs[0]).sums(x)))
            place += most
        return torch.cat(list(_joined(parts)), dim=_BLOCKS)

    def of(self, run: Run) -> RunBlocks:
        """The blocks of a run."""
        return RunBlocks(run, self.block)

    def _runs(self) -> list[list[Run]]:
        """Of every rank, one for each piece."""
        return [self.ring.runs(rank, whole=True) for rank in range(self.ring.ranks)]

    def _most(self) -> list[int]:
        """For each piece the blocks of the rank that has most; none for what every rank holds."""
        every = zip(self.ring.pieces, zip(*self._runs(), strict=True), strict=True)
        return [
            max((self.of(run).count for run in runs if run.size), default=0) if piece.sharded else 0
            for piece, runs in every
        ]


def gather(ring: Ring, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one dtype as all ranks have them, each (ranks, ...), in one collective."""
    from torch.distributed import _functional_collectives  # noqa: F401  (it defines the operators)

    collectives = torch.ops._c10d_functional
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    received: Tensor = collectives.wait_tensor(collectives.all_gather_into_tensor(flat, ring.ranks, ring.group))
    parts = received.unflatten(0, (ring.ranks, -1)).split([tensor.numel() for tensor in tensors], dim=1)
    return [part.unflatten(1, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _filled(x: Tensor, blocks: RunBlocks, most: int) -> Tensor:
    """The sums of a run's blocks, and zeros up to so many."""
    if not blocks.run.size:
        return x.new_zeros((*x.shape[:2], most, x.shape[3]), dtype=torch.float32)
    return pad(blocks.sums(x), (0, 0, 0, most - blocks.count))


def _joined(parts: Sequence[tuple[RunBlocks, Tensor]]) -> Iterator[Tensor]:
    """Sums of runs in the order of the sequence, those of a block that several have added up."""
    (before, sums), *others = parts
    for blocks, more in others:
        if blocks.first < before.first + before.count:
            yield sums.narrow(_BLOCKS, 0, sums.shape[_BLOCKS] - 1)
            shared = sums.narrow(_BLOCKS, sums.shape[_BLOCKS] - 1, 1) + more.narrow(_BLOCKS, 0, 1)
            more = torch.cat([shared, more.narrow(_BLOCKS, 1, blocks.count - 1)], dim=_BLOCKS)
        else:
            yield sums
        before, sums = blocks, more
    yield sums
