"""Put a ring in the place of an attention site.

    before:  out = sdpa(q, k, v)                                    a rank's tokens, all heads
    after:   part = flash(q, k, v);  k', v' = pass_on(k, v);  part' = flash(q, k', v');  out = merge(part, part', ...)

It needs attention that can be computed in parts, by its lse: exact attention, causal or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...attn_ops.call import FLOAT_DTYPES
from ...attn_ops.errors import ParallelError
from ...lowering.decision import Decision
from ..normalize.graph import value_of
from ..sites import CallSite
from .communication import Communication
from .inline import inline
from .laid_out import laid_out
from .masks import with_mask
from .ring import Attend, Part, Ring, payload
from .tokens import Shards

_EXACT = (None, "flash")
"""Backends whose result a ring gives; None is dense attention."""


@dataclass(frozen=True)
class RingExchange:
    """The ring of one site, not made yet.

    Args:
        site: as it is in the graph, over this rank's tokens.
        ring: how.
        mask: the mask over the whole sequence, or None.
        shards: which tokens are shards; learns what is made.
        why: why a ring.
        name: of the site, for errors.
    """

    site: CallSite
    ring: Ring
    mask: fx.Node | None
    shards: Shards
    why: str
    name: str

    @property
    def whole(self) -> CallSite:
        """The site as it is to be decided: over the whole sequence."""
        tokens = sum(piece.whole for piece in self.ring.pieces)
        call = replace(self.site.call, seq_q=tokens, seq_k=tokens, kind="self", dynamic=())
        return replace(self.site, call=with_mask(call, self.site.node, self.mask))

    def place(self, decision: Decision) -> Communication:
        """Put it into the graph, in the place of the site.

        Raises:
            ParallelError: if a ring cannot compute what is asked, or was decided.
        """
        self._refuse(decision)
        node = self.site.node
        users_dims, traced = self.shards.dims(node), value_of(node)
        ring = replace(self.ring, causal=self.whole.call.causal)
        attention = self._exact(decision)

        def attend(*operands: Tensor) -> list[Tensor]:
            q, k, v = (operand.to(traced.dtype) for operand in operands)
            return [laid_out(ring.attend(q, k, v, attention), traced)]

        (out,) = inline(node, attend, [self.site.q, self.site.k, self.site.v], like=node)
        self.shards.know(out, users_dims)
        node.replace_all_uses_with(out)
        node.graph.erase_node(node)
        return self._communication(ring, traced)

    def _exact(self, decision: Decision) -> Attend:
        scale, provider = self.site.scale, decision.provider or "auto"

        def attention(q: Tensor, k: Tensor, v: Tensor, _source: int, causal: bool) -> Part:
            part: Part = torch.ops.sparseattn.flash_attention(q, k, v, causal=causal, scale=scale, provider=provider)
            return part

        return attention

    def _communication(self, ring: Ring, traced: Tensor) -> Communication:
        batch, kv_heads, _, head_dim = (int(size) for size in value_of(self.site.k).shape)
        sent = payload(ring, kv_heads, head_dim, batch) * traced.element_size()
        return Communication("ring", self.why, ring.ranks - 1, sent)

    def _refuse(self, decision: Decision) -> None:
        call = self.whole.call
        asks = {
            f"a {call.mask} mask": call.mask != "none",
            "a window": call.window is not None,
            "dropout": bool(call.dropout),
            "a scale that the graph computes": isinstance(self.site.scale, fx.Node),
            "values of another head_dim than keys": call.value_dim not in (None, call.head_dim),
            f"{call.dtype}": call.dtype not in FLOAT_DTYPES,
            f"{decision.backend}": decision.backend not in _EXACT,
        }
        if wrong := [what for what, found in asks.items() if found]:
            raise ParallelError(
                f"parallel: a ring must compute exact attention, causal or not, got {' and '.join(wrong)} at "
                f'{self.name}. Use method="ulysses", with at most as many ranks as heads.'
            )
