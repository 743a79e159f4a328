"""Put a ring, alone or between groups that split heads, in the place of an attention site.

    before:  out = sdpa(q, k, v)                                    a rank's tokens, all heads
    after:   part = flash(q, k, v);  k', v' = pass_on(k, v);  part' = flash(q, k', v');  out = merge(part, part', ...)

It needs a method that can attend in parts, merged by their lse: see `in_parts`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from ...attn_ops.call import FLOAT_DTYPES
from ...attn_ops.errors import ParallelError
from ...attn_ops.registry import backend
from ...lowering.communication_model import Split
from ...lowering.decision import Decision
from ..normalize.graph import value_of
from ..place_op import arguments_of
from ..sites import CallSite
from ..step_values import StepValues
from . import ring_sparse, ulysses
from .communication import Communication
from .hybrid import Hybrid
from .in_parts import IN_PARTS
from .inline import inline
from .laid_out import laid_out
from .masks import with_mask
from .own_values import of_rank
from .ring import Ring, payload
from .tokens import Shards
from .ulysses import Ulysses


@dataclass(frozen=True)
class RingExchange:
    """The ring of one site, not made yet.

    Args:
        site: as it is in the graph, over this rank's tokens.
        ring: how.
        within: the exchange of heads in a group, where the ring is one of groups; else None.
        mask: the mask over the whole sequence, or None.
        shards: which tokens are shards; learns what is made.
        why: why a ring.
        name: of the site, for errors.
    """

    site: CallSite
    ring: Ring
    within: Ulysses | None
    mask: fx.Node | None
    shards: Shards
    why: str
    name: str

    @property
    def whole(self) -> CallSite:
        """The site as it is to be decided: over the whole sequence."""
        call = replace(self.site.call, seq_q=self.ring.tokens, seq_k=self.ring.tokens, kind="self", dynamic=())
        return replace(self.site, call=with_mask(call, self.site.node, self.mask))

    def place(self, decision: Decision, values: StepValues | None) -> Communication:
        """Put it into the graph, in the place of the site.

        Args:
            decision: what to compute, for all heads.
            values: takes the values that follow the steps.

        Raises:
            ParallelError: if a ring cannot compute what is asked, or was decided.
        """
        self._refuse(decision)
        node = self.site.node
        users_dims, traced = self.shards.dims(node), value_of(node)
        ring = replace(self.ring, causal=self.whole.call.causal)
        around = ring if self.within is None else Hybrid(self.within, ring)
        own = decision if self.within is None else of_rank(decision, self.within.heads, self.within.rank)
        arguments = self._arguments(own, values)
        nodes = {name: value for name, value in arguments.items() if isinstance(value, fx.Node)}

        def attend(*operands: Tensor) -> list[Tensor]:
            q, k, v = (operand.to(traced.dtype) for operand in operands[:3])
            given = dict(zip(nodes, operands[3:], strict=True))
            method = IN_PARTS[decision.backend]({**arguments, **given})
            return [laid_out(around.attend(q, k, v, method), traced)]

        (out,) = inline(node, attend, [self.site.q, self.site.k, self.site.v, *nodes.values()], like=node)
        self.shards.know(out, users_dims)
        node.replace_all_uses_with(out)
        node.graph.erase_node(node)
        return self._communication(ring, arguments, traced)

    def _arguments(self, decision: Decision, values: StepValues | None) -> dict[str, Any]:
        """All arguments of the op that stands for the whole site; of dense attention, its scale."""
        if decision.backend is None:
            return {"scale": self.site.scale}
        known = dict(backend(decision.backend).complete(()))
        return {**known, **arguments_of(self.site, decision, values)}

    def _communication(self, ring: Ring, arguments: dict[str, Any], traced: Tensor) -> Communication:
        q, k = value_of(self.site.q), value_of(self.site.k)
        batch, head_dim = int(q.shape[0]), int(q.shape[3])
        heads, kv_heads, collectives, sent = int(q.shape[1]), int(k.shape[1]), ring.ranks - 1, 0
        if self.within is not None:
            heads, kv_heads = self.within.heads.own, self.within.heads.own_kv
            dims = [(count, head_dim) for count in (heads, kv_heads, kv_heads)]
            sent += ulysses.payload(self.within, dims, batch, head_dim) * traced.element_size()
            collectives += 2
        sent += payload(ring, kv_heads, head_dim, batch) * traced.element_size()
        if "block_k" in arguments:
            blocks = arguments["block_q"], arguments["block_k"]
            sent += ring_sparse.payload(ring, heads, kv_heads, head_dim, batch, blocks)
            collectives += 1
        split = Split(1 if self.within is None else self.within.ranks, ring.ranks)
        return Communication(str(split), self.why, collectives, sent)

    def _refuse(self, decision: Decision) -> None:
        call = self.whole.call
        asks = {
            f"a {call.mask} mask": call.mask != "none",
            "a window": call.window is not None,
            "dropout": bool(call.dropout),
            "a scale that the graph computes": isinstance(self.site.scale, fx.Node),
            "values of another head_dim than keys": call.value_dim not in (None, call.head_dim),
            f"{call.dtype}": call.dtype not in FLOAT_DTYPES,
            f"{decision.backend}": decision.backend not in IN_PARTS,
            self._why_not_blocks(decision): True,
        }
        if wrong := [what for what, found in asks.items() if what and found]:
            raise ParallelError(
                f"parallel: a ring must compute exact attention or block_topk, causal or not, got "
                f'{" and ".join(wrong)} at {self.name}. Use method="ulysses", with at most as many ranks as heads.'
            )

    def _why_not_blocks(self, decision: Decision) -> str:
        if decision.backend != "block_topk":
            return ""
        given = dict(backend("block_topk").complete(decision.params))
        ring = replace(self.ring, causal=self.whole.call.causal)
        return ring_sparse.why_not(int(given["block_q"]), int(given["block_k"]), ring)  # type: ignore[arg-type]
