"""Ring: queries stay where they are, the keys and values of all ranks pass by, and attention to each part is merged.

In every step a rank hands the shard that it holds to the next rank and attends to it meanwhile; lse says how much each
part counts. Text that every rank holds is not sent, and each rank attends to it once. Plain functions of tensors, which
`ring_exchange` traces into a graph; their gradients are the exact transposes: those of keys travel back the same way.
Paper: https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attn_ops.zeros_after import ZEROS_AFTER
from .ulysses import Piece

Part = tuple[Tensor, Tensor]
"""Attention to some of the keys: out (B, Hq, S, D) and lse (B, Hq, S)."""

Attend = Callable[[Tensor, Tensor, Tensor, "Runs", "Runs", bool], list[Part]]
"""(q, k, v, which of the queries, which of the keys, causal) -> attention of these queries to these keys, in parts.

A part is of the queries with the padding after each of their runs. Causal are only queries and keys of one same run.
"""

Method = Callable[["Ring", Tensor, Tensor], tuple[Attend, Tensor | None]]
"""(ring, q, k of this rank) -> how to attend; what was received to know that, or None: rings pass on after it."""

_TOKENS = 2  # dimension of the tokens in (B, H, S, D)


@dataclass(frozen=True)
class Run:
    """Tokens that lie next to each other: at `place` of a tensor, and from `first` of the whole sequence on.

    Args:
        place: of the first one in a tensor.
        first: its place in the whole sequence.
        size: how many.
        padding: so many more follow in the tensor that are none of the sequence.
    """

    place: int
    first: int
    size: int
    padding: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """These tokens of (B, H, S, D)."""
        return tensor.narrow(_TOKENS, self.place, self.size)

    @property
    def padded(self) -> Run:
        """With the padding as if it were of the sequence."""
        return Run(self.place, self.first, self.size + self.padding)


Runs = Sequence[Run]


@dataclass(frozen=True)
class Ring:
    """The exchange around one attention.

    Args:
        pieces: the tokens of its queries, keys and values, in order; at least one piece is sharded.
        causal: a query sees keys up to its own place in the whole sequence.
        ranks: ranks of the ring.
        rank: this rank's place in it.
        group: name of the process group.
    """

    pieces: tuple[Piece, ...]
    causal: bool
    ranks: int
    rank: int
    group: str

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence, padding excluded."""
        return sum(piece.whole for piece in self.pieces)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, method: Method) -> Tensor:
        """Attention of this rank's queries to the keys of all.

        Args:
            q: (B, Hq, local, D), padding included.
            k: (B, Hkv, local, D).
            v: (B, Hkv, local, D).
            method: how to attend to a part of the keys.

        Returns:
            (B, Hq, local, D), q's dtype. What stands for padding is finite, and means nothing.
        """
        attention, received = method(self, q, k)
        held = torch.stack([self._shards(k), self._shards(v)])
        held = held if received is None else after(received, held)
        queries = self._queries()
        parts: list[list[Part]] = [[] for _ in queries]
        for step in range(self.ranks):
            source = (self.rank - step) % self.ranks
            held = self._pass_on(held) if step else held
            keys, values = (held[0], held[1]) if step else (k, v)
            runs, before = self.runs(source, whole=not step), sum(map(len, parts))
            for query, found in zip(queries, parts, strict=True):
                for seen, causal in self._seen(query, runs):
                    found += attention(q, keys, values, query, seen, causal)
        each = zip(queries, parts, strict=True)
        outs = [merge(found).to(q.dtype) if found else _nothing(q, query) for query, found in each]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=_TOKENS)
        return out if sum(map(len, parts)) > before else after(held, out)  # `held` came last

    def _shards(self, tensor: Tensor) -> Tensor:
        """What travels of (B, H, local, D): the tokens that others do not have."""
        split = tensor.split([piece.local for piece in self.pieces], dim=_TOKENS)
        sharded = [part for part, piece in zip(split, self.pieces, strict=True) if piece.sharded]
        return sharded[0] if len(sharded) == 1 else torch.cat(sharded, dim=_TOKENS)

    def runs(self, source: int, *, whole: bool) -> list[Run]:
        """The tokens that a rank has: all that it holds (whole), or what travels."""
        place, first, found = 0, 0, []
        for piece in self.pieces:
            if piece.sharded:
                before = min(source * piece.local, piece.whole)
                size = min(piece.local, piece.whole - before)
                found.append(Run(place, first + before, size, piece.local - size))
            elif whole:
                found.append(Run(place, first, piece.whole))
            place += piece.local if piece.sharded or whole else 0
            first += piece.whole
        return found

    def _queries(self) -> list[Runs]:
        """The queries of this rank: all at once where all see the same keys."""
        runs = self.runs(self.rank, whole=True)
        return [[run] for run in runs] if self.causal else [runs]

    def _seen(self, queries: Runs, keys: Runs) -> Iterator[tuple[Runs, bool]]:
        """What some queries see of the keys of one rank, and whether causally."""
        keys = [run for run in keys if run.size]
        if not self.causal:
            if keys:
                yield keys, False
            return
        (query,) = queries
        for run in keys:
            if run == query:
                yield [run], True
            elif run.first + run.size <= query.first:
                yield [run], False

    def _pass_on(self, held: Tensor) -> Tensor:
        """Hand what is held, (2, ...), to the next rank; what the previous one held."""
        from torch.distributed._functional_collectives import all_to_all_single_autograd
        from torch.distributed.distributed_c10d import GroupName

        given, taken = [0] * self.ranks, [0] * self.ranks
        given[(self.rank + 1) % self.ranks] = taken[(self.rank - 1) % self.ranks] = held.shape[0]
        received: Tensor = all_to_all_single_autograd(held.contiguous(), taken, given, GroupName(self.group))
        return received


def merge(parts: Sequence[Part]) -> Tensor:
    """Attention to all keys, (B, Hq, S, D), from attention to parts that have none in common; fp32 if there are two.

    A row may see no key of a part (its lse is -inf), but must see one of some part.
    """
    (out, lse), *others = parts
    for other, more in others:
        lse, more = _finite(lse), _finite(more)
        total = torch.logaddexp(lse, more)
        ours, theirs = ((one - total).exp().unsqueeze(-1) for one in (lse, more))
        out, lse = out * ours + other * theirs, total
    return out


def _finite(lse: Tensor) -> Tensor:
    """-inf as a number so low that its weight is 0 too: differences of infinities have no value."""
    return lse.masked_fill(lse == -torch.inf, -1e30)


def cut(runs: Runs, tensor: Tensor) -> Tensor:
    """The runs one after the other: a view where they are neighbours."""
    if all(one.place + one.size == two.place for one, two in itertools.pairwise(runs)):
        return tensor.narrow(_TOKENS, runs[0].place, sum(run.size for run in runs))
    return torch.cat([run.of(tensor) for run in runs], dim=_TOKENS)


def _nothing(q: Tensor, queries: Runs) -> Tensor:
    """The output of padding alone."""
    return torch.zeros_like(cut([run.padded for run in queries], q))


def after(came: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself, as if it were made with what came, which nothing on this rank may need.

    Every rank must take part in every step, and in the same order: backward too, so that also a gradient that is zero
    has to wait for the gradient of `tensor`.
    """
    zero: Tensor = ZEROS_AFTER(came, ())
    return tensor + zero.to(tensor.dtype)


def payload(ring: Ring, kv_heads: int, head_dim: int, batch: int) -> int:
    """Elements that leave this rank in one forward pass."""
    sharded = sum(piece.local for piece in ring.pieces if piece.sharded)
    return (ring.ranks - 1) * 2 * batch * kv_heads * sharded * head_dim
