"""Put Ulysses' exchange around an attention site.

    before:  out = sdpa(q, k, v)                                    a rank's tokens, all heads
    after:   q', k', v' = to_heads(q, k, v);  out' = sdpa(q', k', v');  out = to_tokens(out')

Between the two collectives the site is an attention over the whole sequence, with fewer heads, and is rewritten as any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...attn_ops.registry import backend
from ...lowering.context_parallel import Wire
from ...lowering.decision import Decision
from ..layouts.axis import unknown
from ..normalize.graph import argument, value_of
from ..sites import CallSite
from . import int8_wire
from .communication import Communication
from .inline import inline
from .laid_out import laid_out
from .masks import with_mask
from .own_values import of_rank
from .tokens import Shards
from .ulysses import Ulysses, payload


@dataclass(frozen=True)
class UlyssesExchange:
    """The exchange around one site, not made yet.

    Args:
        site: as it is in the graph, over this rank's tokens.
        ulysses: how.
        mask: the mask over the whole sequence, or None.
        shards: which tokens are shards; learns what is made.
        wire: what queries and keys travel as.
        unrounded: why they do not travel as was asked; "" where they do.
    """

    site: CallSite
    ulysses: Ulysses
    mask: fx.Node | None
    shards: Shards
    wire: Wire = "exact"
    unrounded: str = ""

    @property
    def whole(self) -> CallSite:
        """The site as it is to be decided: over the whole sequence, and all heads."""
        tokens = self.ulysses.tokens
        call = replace(self.site.call, seq_q=tokens, seq_k=tokens, kind="self", dynamic=())
        return replace(self.site, call=with_mask(call, self.site.node, self.mask))

    def decided(self, decision: Decision) -> UlyssesExchange:
        """The exchange for what was decided: nothing is rounded for attention that does not round it itself."""
        if self.wire == "exact" or (decision.backend and backend(decision.backend).integer_qk):
            return self
        why = f"; not as INT8: {decision.backend or 'dense attention'} reads queries and keys unrounded"
        return replace(self, wire="exact", unrounded=why)

    def of_rank(self, decision: Decision) -> Decision:
        """The decision for this rank's heads: a parameter that has a value for each head gets theirs."""
        return of_rank(decision, self.ulysses.heads, self.ulysses.rank)

    def communication(self, handed: dict[str, fx.Node]) -> Communication:
        """What it sends, with what the module of the site hands over."""
        split = self.ulysses.heads
        own = [(split.own, self.site.q), (split.own_kv, self.site.k), (split.own_kv, self.site.v)]
        own += [(split.own, tensor) for tensor in _with_tokens(handed).values()]
        batch, dims = int(value_of(self.site.q).shape[0]), [(heads, _channels(node)) for heads, node in own]
        size = value_of(self.site.node).element_size()
        back = size * payload(self.ulysses, [], batch, _channels(self.site.v))
        if self.wire == "int8":
            there = int8_wire.bytes_to_heads(self.ulysses, dims, batch, size)
            return Communication("ulysses, INT8", str(split), 2, there + back)
        there = size * payload(self.ulysses, dims, batch, 0)
        return Communication("ulysses", f"{split}{self.unrounded}", 2, there + back)

    def insert(self, handed: dict[str, fx.Node]) -> tuple[CallSite, dict[str, fx.Node]]:
        """Put it into the graph, around the node of the site.

        Args:
            handed: what the module of the site hands over; what has tokens is sent with the rest.

        Returns:
            The site between the collectives, and what is handed over there.
        """
        node, whole, gates = self.site.node, self.whole, _with_tokens(handed)
        users, dims, traced = list(node.users), self.shards.dims(node), value_of(node)
        q, k, v, *more = self._to_heads([self.site.q, self.site.k, self.site.v, *gates.values()])
        (mask,) = self._own_mask() or (None,)
        node.args = (q, k, v)
        node.kwargs = {
            "attn_mask": mask,
            "dropout_p": self.site.call.dropout,
            "is_causal": argument(node, 5, "is_causal", False) or (mask is None and whole.call.causal),
            "scale": self.site.scale,
            "enable_gqa": self.ulysses.heads.own != self.ulysses.heads.own_kv,
        }
        node.meta = {**node.meta, _key_of(node): _result(value_of(q), value_of(v), traced)}
        (out,) = inline(node.next, lambda out: [laid_out(self.ulysses.to_tokens(out), traced)], [node], like=node)
        for user in users:
            user.replace_input_with(node, out)
        self.shards.know(node, self.shards.dims(q))
        self.shards.know(out, dims)
        return replace(whole, q=q, k=k, v=v), {**handed, **dict(zip(gates, more, strict=True))}

    def _to_heads(self, operands: list[fx.Node]) -> list[fx.Node]:
        node = self.site.node
        dtype = value_of(node).dtype  # under autocast the operands still have theirs, and more bytes

        def send(*tensors: Tensor) -> list[Tensor]:
            q, k, *others = (tensor.to(dtype) for tensor in tensors)
            if self.wire == "int8":
                return int8_wire.to_heads(self.ulysses, q, k, *others)
            return self.ulysses.to_heads(q, k, *others)

        sent = inline(node, send, operands, like=node)
        for before, after in zip(operands, sent, strict=True):
            batch, _, _, channels = self.shards.dims(before)
            self.shards.know(after, (batch, unknown(value_of(after).shape[1]), self.shards.whole(before), channels))
        return sent

    def _own_mask(self) -> list[fx.Node]:
        """The mask of this rank's heads."""
        shape = None if self.mask is None else value_of(self.mask).shape
        if self.mask is None or shape is None or len(shape) < 3 or shape[-3] == 1:
            return [] if self.mask is None else [self.mask]
        return inline(self.site.node, lambda mask: [self.ulysses.own_heads(mask)], [self.mask], like=self.site.node)


def _with_tokens(handed: dict[str, fx.Node]) -> dict[str, fx.Node]:
    """Tensors (B, H, S, D) among what a module hands over."""
    return {name: tensor for name, tensor in handed.items() if value_of(tensor).dim() == 4}


def _channels(node: fx.Node) -> int:
    return int(value_of(node).shape[3])


def _result(q: Tensor, v: Tensor, traced: Tensor) -> Tensor:
    """The value of attention between the collectives."""
    with traced.fake_mode, torch.set_grad_enabled(traced.requires_grad):  # type: ignore[attr-defined]
        values = q if q.shape[3] == v.shape[3] else q.new_empty((*q.shape[:3], v.shape[3]))
        return torch.empty_like(values, dtype=traced.dtype, requires_grad=traced.requires_grad)


def _key_of(node: fx.Node) -> str:
    return "example_value" if "example_value" in node.meta else "val"
