"""Which exchange an attention site needs: Ulysses, a ring, both, or none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, fx

from ...attn_ops.errors import ParallelError
from ...attn_ops.sharding import local_tokens
from ...lowering.context_parallel import ContextParallel
from ...lowering.decision import Decision
from ...lowering.head_split import HeadSplit
from ..normalize.graph import value_of
from ..sites import CallSite
from .communication import NO_SHARDS, Communication
from .hybrid import of_group, of_groups
from .masks import mask_of
from .ring import Ring
from .ring_exchange import RingExchange
from .tokens import Shards, tokens_text
from .ulysses import Piece, Ulysses
from .ulysses_exchange import UlyssesExchange


@dataclass(frozen=True)
class Exchanges:
    """What one graph and its sub-graphs exchange.

    Args:
        asked: how.
        shards: which tokens are shards.
    """

    asked: ContextParallel
    shards: Shards

    def at(self, site: CallSite) -> UlyssesExchange | RingExchange | Stay:
        """The exchange that a site needs.

        Raises:
            ParallelError: if it needs one that cannot be made.
        """
        q, k, v = self._pieces(site)
        name = site.module or site.source or "a site"
        if not any(piece.sharded for piece in (*q, *k, *v)):
            return Stay(site, NO_SHARDS)
        if not any(piece.sharded for piece in (*k, *v)):
            if site.call.causal:
                raise ParallelError(f"parallel: keys of the causal {name} must be sharded as its queries are.")
            call = replace(site.call, kind="cross", layout=None)  # also where both happen to have as many tokens
            return Stay(replace(site, call=call), "keys and values are on every rank: each answers its own queries")
        if self.asked.ranks == 1:
            return Stay(site, "there is one rank")
        if not q == k == v:
            raise ParallelError(
                f"parallel: queries, keys and values of {name} must be sharded alike, got {tokens_text(q)}, "
                f"{tokens_text(k)} and {tokens_text(v)} tokens. Leave keys and values whole where they come from text."
            )
        _refuse_unreadable(site, name)
        mask = mask_of(site, name)
        ways = self.asked.split(site.call.heads)
        heads = HeadSplit.of(site.call.heads, site.call.kv_heads, ways.ulysses)
        within = Ulysses(of_group(q, ways), heads, self.asked.group_rank, self.asked.group)
        if ways.ring == 1:
            return UlyssesExchange(site, within, mask, self.shards, self.asked.wire)
        ring = Ring(of_groups(q, ways), site.call.causal, ways.ring, self.asked.ring_rank, self.asked.ring_group)
        why = str(heads) if ways.ulysses > 1 else self._why_ring(site)
        if self.asked.wire == "int8":
            why += "; not as INT8: a ring passes on what it is given"
        return RingExchange(site, ring, within if ways.ulysses > 1 else None, mask, self.shards, why, name)

    def _why_ring(self, site: CallSite) -> str:
        """Why a ring alone."""
        heads, ranks = site.call.heads, self.asked.ranks
        return f"{heads} heads are too few for {ranks} ranks" if self.asked.method == "auto" else "asked for"

    def refuse_hidden(self, graph: fx.Graph) -> None:
        """Raise if a graph whose sites are exchanged has attention over shards that is no site.

        Raises:
            ParallelError: naming the place.
        """
        if self.asked.ranks > 1:
            self.shards.refuse_mixed(graph)

    def refuse_untold(self, graphs: Iterable[fx.Graph]) -> None:
        """Raise if the graphs of a module that has attention do not show what is a shard, and nobody said so.

        Raises:
            ParallelError: what they are given may be shards, and would be taken for whole sequences.
        """
        told = self.asked.ranks == 1 or self.asked.tokens is not None
        if not told and not any(map(self.shards.are_made_in, graphs)):
            raise ParallelError(
                "parallel: a graph with attention must make its shards, or be told of them by tokens, got neither: "
                "what it is given may be shards of a graph before it. Compile with fullgraph=True, give "
                "ContextParallel(mesh, tokens=...), or leave parallel out where every rank has all tokens."
            )

    def _pieces(self, site: CallSite) -> tuple[tuple[Piece, ...], ...]:
        if self.asked.tokens is None:
            return self.shards.pieces(site.q, site.k, site.v)
        return tuple(self._given(operand) for operand in (site.q, site.k, site.v))

    def _given(self, operand: fx.Node) -> tuple[Piece, ...]:
        """The pieces of tokens that the user told of; tokens of another number are on every rank."""
        value, text = value_of(operand), self.asked.text_tokens
        size = int(value.shape[2]) if isinstance(value, Tensor) and value.dim() == 4 else 0
        tokens = self.asked.tokens or 0
        shard = Piece(local_tokens(tokens, self.asked.ranks), tokens, sharded=True)
        if size != shard.local + text:
            return (Piece(size, size, sharded=False),)
        words = [Piece(text, text, sharded=False)] if text else []
        return (*words, shard) if self.asked.text_first else (shard, *words)


@dataclass(frozen=True)
class Stay:
    """No exchange around one site.

    Args:
        site: the site.
        why: why nothing has to be sent; "" where nobody asked.
    """

    site: CallSite
    why: str = ""

    @property
    def whole(self) -> CallSite:
        """The site as it is to be decided."""
        return self.site

    def of_rank(self, decision: Decision) -> Decision:
        """The decision for the heads of this rank: all."""
        return decision

    def decided(self, _decision: Decision) -> Stay:
        """The exchange for what was decided: nothing."""
        return self

    def communication(self, _handed: dict[str, fx.Node]) -> Communication | None:
        """What is sent: nothing."""
        return Communication("none", self.why) if self.why else None

    def insert(self, handed: dict[str, fx.Node]) -> tuple[CallSite, dict[str, fx.Node]]:
        """Leave the graph as it is."""
        return self.site, handed


def _refuse_unreadable(site: CallSite, name: str) -> None:
    if site.call.barrier is not None:
        raise ParallelError(f"parallel: attention of {name} must be readable to be exchanged: {site.call.barrier}.")
