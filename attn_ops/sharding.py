"""Markers of context parallelism: what of a graph's tensors is this rank's shard of the tokens.

A pass reads them to know which attention must see more than its rank has. `shard_tokens` also does what it says;
`whole_mask` only makes a whole mask fit into a graph of local shapes: the pass gives attention the whole one again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import LIBRARY

_TAGS = (torch.Tag.pt2_compliant_tag,)


def local_tokens(tokens: int, ranks: int) -> int:
    """Tokens that every rank holds of a sequence: the last ranks hold padding where they do not divide it."""
    return -(-tokens // ranks)


def shard_tokens(x: Tensor, dim: int, ranks: int, rank: int) -> Tensor:
    """The tokens of one rank, padded with the last token of the sequence: what is finite for it is so for padding.

    Args:
        x: (..., S, ...) the same on all ranks.
        dim: dimension of the tokens, from the front.
        ranks: number of ranks.
        rank: this one, from 0.

    Returns:
        (..., ceil(S / ranks), ...).
    """
    tokens = x.shape[dim]
    size = local_tokens(tokens, ranks)
    own = max(0, min(size, tokens - rank * size))
    parts = [x.narrow(dim, rank * size, own)] if own else []
    if own < size:
        padding = list(x.shape)
        padding[dim] = size - own
        parts.append(x.narrow(dim, tokens - 1, 1).expand(padding))
    return torch.cat(parts, dim)  # a copy, also of one part: the whole tensor is not kept alive


def whole_mask(mask: Tensor, tokens: int) -> Tensor:
    """A mask over the whole sequence as one that broadcasts to `tokens` local queries and keys.

    Args:
        mask: (..., Sq or 1, Sk or 1) bool or float.
        tokens: tokens of the sequence on this rank, replicated ones among them.
    """
    for dim in (-2, -1):
        if mask.shape[dim] != 1:
            mask = mask.narrow(dim, 0, tokens)
    return mask.clone()


LIBRARY.define("shard_tokens(Tensor x, int dim, int ranks, int rank) -> Tensor", tags=_TAGS)
LIBRARY.impl("shard_tokens", shard_tokens, "CompositeImplicitAutograd")
LIBRARY.define("whole_mask(Tensor mask, SymInt tokens) -> Tensor", tags=_TAGS)
LIBRARY.impl("whole_mask", whole_mask, "CompositeImplicitAutograd")

SHARD_TOKENS = torch.ops.sparseattn.shard_tokens.default
WHOLE_MASK = torch.ops.sparseattn.whole_mask.default
