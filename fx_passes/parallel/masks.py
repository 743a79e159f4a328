"""Masks of sites that are exchanged: between the collectives attention needs them over the whole sequence."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ...attn_ops.call import AttentionCall, MaskKind
from ...attn_ops.errors import ParallelError
from ...attn_ops.sharding import WHOLE_MASK
from ..normalize.graph import argument, value_of
from ..normalize.masks import prove_mask
from ..sites import CallSite

_WHOLE = (WHOLE_MASK, WHOLE_MASK.overloadpacket)  # as we write it, and as Dynamo does


def mask_of(site: CallSite, name: str) -> fx.Node | None:
    """The mask of a site over the whole sequence; None where there is none, or flags say as much.

    Raises:
        ParallelError: if only the mask of this rank's tokens is there.
    """
    mask = argument(site.node, 3, "attn_mask")
    if not isinstance(mask, fx.Node):
        return None
    if mask.target in _WHOLE:
        whole = mask.args[0]
        assert isinstance(whole, fx.Node)
        return whole
    if site.call.causal and site.call.window is None and site.call.mask == "none":
        return None  # causal over the tokens of a rank is causal over all
    raise ParallelError(
        f"parallel: the mask of {name} must be over the whole sequence, got {tuple(value_of(mask).shape)}, made for "
        "the tokens of one rank. Pass it through sparseattn.parallel.whole_mask, or leave it out."
    )


def with_mask(call: AttentionCall, node: fx.Node, mask: fx.Node | None) -> AttentionCall:
    """What a site asks over the whole sequence, with the mask over it.

    Args:
        call: what it asks without.
        node: its node in the graph.
        mask: the mask, or None.
    """
    if mask is None:
        return call
    causal = argument(node, 5, "is_causal", False)
    call = replace(call, causal=causal, window=None)  # what was proved was of the tokens of one rank
    fact = None if causal else prove_mask(mask, call.seq_q, call.seq_k)
    if fact is not None:
        return replace(call, mask="none", causal=fact.causal, window=fact.window)
    kind: MaskKind = "bool" if value_of(mask).dtype == torch.bool else "float"
    return replace(call, mask=kind)
