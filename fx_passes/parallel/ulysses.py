"""Ulysses: tensors of shards of the sequence become tensors of shards of the heads, and back.

Two collectives: queries, keys, values (and a gate) go out in one all-to-all, the output comes back in another. Text
that every rank holds is not sent: each takes its heads of it, and its part of the output goes to all with the rest.
Plain functions of tensors, which `ulysses_exchange` traces into a graph; their gradients are the exact transposes.
Paper: https://arxiv.org/abs/2309.14509.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...lowering.head_split import HeadSplit

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName

_TOKENS = 2  # dimension of the tokens in (B, H, S, D)


@dataclass(frozen=True)
class Piece:
    """Tokens that lie next to each other in a sequence.

    Args:
        local: how many this rank holds.
        whole: how many there are; as many as `local` where every rank holds the same.
        sharded: whether every rank holds another part; the last ones are then padded up to `local`.
    """

    local: int
    whole: int
    sharded: bool


@dataclass(frozen=True)
class Ulysses:
    """The exchange around one attention.

    Args:
        pieces: the tokens of its queries, keys and values, in order; at least one piece is sharded.
        heads: which heads each rank computes.
        rank: this rank's place in the group.
        group: name of the process group.
    """

    pieces: tuple[Piece, ...]
    heads: HeadSplit
    rank: int
    group: str

    @property
    def ranks(self) -> int:
        """Ranks of the group."""
        return self.heads.ranks

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence, padding excluded."""
        return sum(piece.whole for piece in self.pieces)

    @property
    def local(self) -> int:
        """Tokens that this rank holds, padding included."""
        return sum(piece.local for piece in self.pieces)

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Give every rank the whole sequence of its heads.

        Args:
            tensors: each (B, Hq or Hkv, local, D) of one dtype; D may differ.

        Returns:
            Each as (B, own heads, tokens, D).
        """
        spread = [self._spread(tensor) for tensor in tensors]
        channels = [tensor.shape[1] // self.ranks * tensor.shape[3] for tensor in spread]
        sent = torch.cat([self._by_rank(tensor) for tensor in spread], dim=-1)  # (ranks, B, sharded tokens, channels)
        received = self._all_to_all(sent).transpose(0, 1).split(channels, dim=-1)
        return [self._assemble(got, tensor) for got, tensor in zip(received, spread, strict=True)]

    def to_tokens(self, out: Tensor) -> Tensor:
        """Give every rank all heads of its tokens.

        Args:
            out: (B, own heads, tokens, D).

        Returns:
            (B, Hq, local, D), in the memory order (B, S, H, D). What stands for padding is zero.
        """
        sent = torch.cat([self._to_every_rank(part, piece) for part, piece in self._parts(out, whole=True)], dim=2)
        received = self._all_to_all(sent)  # (ranks, B, local, own heads, D)
        heads = received.permute(1, 2, 0, 3, 4).flatten(2, 3)
        return heads.narrow(2, 0, self.heads.heads).transpose(1, 2)

    def own_heads(self, tensor: Tensor) -> Tensor:
        """The heads of this rank, of a tensor (B, Hq, ...) that every rank holds."""
        return self._spread(tensor).narrow(1, self.rank * self.heads.own, self.heads.own)

    def _spread(self, tensor: Tensor) -> Tensor:
        """The heads of all ranks one after the other: repeated, and padded with copies of the last."""
        is_kv = tensor.shape[1] != self.heads.heads
        own = self.heads.own_kv if is_kv else self.heads.own
        if is_kv and self.heads.repeat > 1:
            tensor = tensor.repeat_interleave(self.heads.repeat, dim=1)
        missing = own * self.ranks - tensor.shape[1]
        if missing:
            tensor = torch.cat([tensor, tensor[:, -1:].expand(-1, missing, -1, -1)], dim=1)
        return tensor

    def _parts(self, tensor: Tensor, *, whole: bool) -> list[tuple[Tensor, Piece]]:
        """The pieces of a tensor, before (whole=False) or after the exchange."""
        parts = tensor.split([piece.whole if whole else piece.local for piece in self.pieces], dim=_TOKENS)
        return list(zip(parts, self.pieces, strict=True))

    def _by_rank(self, tensor: Tensor) -> Tensor:
        """What goes to each rank: (B, ranks * own, local, D) to (ranks, B, sharded tokens, own * D)."""
        sharded = [part for part, piece in self._parts(tensor, whole=False) if piece.sharded]
        rows = sharded[0] if len(sharded) == 1 else torch.cat(sharded, dim=_TOKENS)
        by_rank: Tensor = rows.unflatten(1, (self.ranks, -1))
        return by_rank.permute(1, 0, 3, 2, 4).flatten(3)

    def _assemble(self, got: Tensor, tensor: Tensor) -> Tensor:
        """The whole sequence of this rank's heads, from (B, ranks, sharded tokens, own * D) and what was not sent."""
        own = tensor.shape[1] // self.ranks
        arrived = iter(got.split([piece.local for piece in self.pieces if piece.sharded], dim=2))
        parts = []
        for part, piece in self._parts(tensor, whole=False):
            if piece.sharded:
                rows = next(arrived).flatten(1, 2).narrow(1, 0, piece.whole)
                parts.append(rows.unflatten(-1, (own, -1)).transpose(1, 2))
            else:
                parts.append(part.narrow(1, self.rank * own, own))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=_TOKENS)

    def _to_every_rank(self, part: Tensor, piece: Piece) -> Tensor:
        """A piece of the output, (B, own, whole, D), as what goes to each rank: (ranks, B, local, own, D)."""
        if not piece.sharded:
            return part.transpose(1, 2).expand(self.ranks, -1, -1, -1, -1)
        padded = pad(part, (0, 0, 0, piece.local * self.ranks - piece.whole))
        by_rank: Tensor = padded.unflatten(2, (self.ranks, piece.local))
        return by_rank.permute(2, 0, 3, 1, 4)

    def _all_to_all(self, sent: Tensor) -> Tensor:
        """Row r goes to rank r; row r of the result came from there."""
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        each = [1] * self.ranks
        received: Tensor = all_to_all_single_autograd(sent.contiguous(), each, each, cast("GroupName", self.group))
        return received


def payload(exchange: Ulysses, head_dims: Sequence[tuple[int, int]], batch: int, out_dim: int) -> int:
    """Elements that leave this rank in one forward pass; `head_dims` are (own heads, D) of each tensor sent."""
    sharded = sum(piece.local for piece in exchange.pieces if piece.sharded)
    to_heads = sharded * sum(own * dim for own, dim in head_dims)
    return (exchange.ranks - 1) * batch * (to_heads + exchange.local * exchange.heads.own * out_dim)
