"""Hybrid: Ulysses within groups of neighbours, who split heads, and a ring between the groups.

    q, k, v = to_heads(q, k, v);  out = ring(q, k, v);  out = to_tokens(out)

After the first exchange the ranks of a group have what their group had of the tokens, each for its heads: one shard of
a ring of ranks that have the same heads. Rank r is number r % ulysses of group r // ulysses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ...lowering.communication_model import Split
from .ring import Method, Ring
from .ulysses import Piece, Ulysses


@dataclass(frozen=True)
class Hybrid:
    """The exchanges around one attention.

    Args:
        within: the exchange in a group, of the tokens that its ranks have: see `of_group`.
        ring: of ranks with the same heads, each with the tokens of a group: see `of_groups`.
    """

    within: Ulysses
    ring: Ring

    def attend(self, q: Tensor, k: Tensor, v: Tensor, method: Method) -> Tensor:
        """Attention of this rank's queries to the keys of all, as `Ring.attend`."""
        q, k, v = self.within.to_heads(q, k, v)
        return self.within.to_tokens(self.ring.attend(q, k, v, method))


def of_group(pieces: tuple[Piece, ...], split: Split) -> tuple[Piece, ...]:
    """The tokens that the ranks of a Ulysses group share: where there are several groups, with their padding."""
    if split.ring == 1:
        return pieces
    return tuple(replace(piece, whole=piece.local * split.ulysses) if piece.sharded else piece for piece in pieces)


def of_groups(pieces: tuple[Piece, ...], split: Split) -> tuple[Piece, ...]:
    """The tokens of the sequence as the groups share them."""
    return tuple(replace(piece, local=piece.local * split.ulysses) if piece.sharded else piece for piece in pieces)
