"""Which key blocks a block of queries keeps: the best by number or by mass, and those that nothing may drop.

The map of SpargeAttention (https://arxiv.org/abs/2502.18137). Scores, similarities and thresholds are fp32 whatever the
inputs are, ties go to the lower block, sums of mass are exact: the same blocks every time. No host synchronization.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads import per_query_head
from .by_device import block_mean, count_to_mass, top_k_blocks
from .pooled import causal_blocks, pooled_scores

Threshold = float | Tensor
"""A number, or an fp32 tensor of shape () or (Hq,) on the device of the queries."""


@dataclass(frozen=True, eq=False)
class Selection:
    """How the blocks are chosen; every threshold may differ from head to head.

    Args:
        keep_ratio: fraction of the candidate blocks to keep, 0 ... 1, rounded half up; not used if `mass` is given.
        mass: keep the fewest blocks that hold this fraction of the softmax over the candidates, 0 ... 1; 1 keeps all.
        similarity: `self_similarity` that lets a block be represented by its mean. A block of queries below it keeps
            all candidates; a block of keys below it is always kept. 0 or less: every block passes.
        sink: block 0 of the keys is always kept.
        smooth_k: the mean of the keys is taken from them before they are compared with each other.
        block_q: tokens per block of queries.
        block_k: tokens per block of keys.
        causal: the candidates are the blocks not wholly in the future; those with the row's own tokens are always kept.
    """

    keep_ratio: Threshold
    mass: Threshold | None
    similarity: Threshold
    sink: bool
    smooth_k: bool
    block_q: int
    block_k: int
    causal: bool

    @property
    def compares_similarity(self) -> bool:
        """Whether a block can fail the similarity test."""
        return isinstance(self.similarity, Tensor) or self.similarity > 0


def select_blocks(q: Tensor, k: Tensor, how: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """The key blocks that every block of queries keeps, by scale * mean(q block) . mean(k block).

    Blocks that are always kept come first and count towards keep_ratio; mass is that of the other candidates. At least
    one block is kept. A block whose score is NaN or infinite is always kept, so that it reaches the output.

    Args:
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Sk, D), smoothed if it is to be; query head h reads head h // (Hq / Hkv) and chooses for itself.
        how: thresholds, blocks and mode.
        scale: factor on the scores.

    Returns:
        index: (B, Hq, nq, nk) int32, ascending, 0 after the count.
        count: (B, Hq, nq) int32.
    """
    scores = scale * pooled_scores(q, k, block_q=how.block_q, block_k=how.block_k)
    nk = scores.shape[-1]
    first_block = torch.arange(nk, device=q.device) == 0
    visible, forced = torch.ones_like(first_block), torch.zeros_like(first_block)
    if how.causal:
        visible, forced = causal_blocks(q.shape[2], nk, block_q=how.block_q, block_k=how.block_k, device=q.device)
    if how.sink:
        forced = forced | first_block
    forced = forced | ~(scores < torch.inf)
    if how.compares_similarity:
        similar_k = self_similarity(k, how.block_k).unsqueeze(-1)
        forced |= per_query_head(similar_k, q.shape[1]).mT < _per_head(how.similarity, q).unsqueeze(-1)
    forced &= visible
    kept = forced.sum(dim=-1)
    if how.mass is None:
        wanted = _per_head(how.keep_ratio, q) * visible.sum(dim=-1)
        kept = torch.maximum(kept, (wanted + 0.5).floor().long())
    else:
        kept = kept + mass_count(scores, _per_head(how.mass, q), visible & ~forced)
    if how.compares_similarity:
        dissimilar_q = self_similarity(q, how.block_q) < _per_head(how.similarity, q)
        kept = kept.masked_fill(dissimilar_q, nk)
    return top_k_blocks(scores.masked_fill(forced, torch.inf), kept, visible)


def mass_blocks(scores: Tensor, mass: Threshold, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The fewest blocks that hold `mass` of the softmax of every row, the one that reaches it included, at least one.

    Args:
        scores: (..., n) floating point.
        mass: fraction, 0 ... 1; a number, or a tensor broadcastable to (...). 1 keeps every candidate.
        allowed: bool, broadcastable to scores: the candidates.

    Returns:
        index: (..., n) int32, kept blocks in ascending order, 0 after the count; of equal scores the lower block first.
        count: (...) int32.
    """
    allowed = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand(scores.shape)
    return top_k_blocks(scores, mass_count(scores, mass, allowed), allowed)


def mass_count(scores: Tensor, mass: Threshold, allowed: Tensor) -> Tensor:
    """How many of the highest scores `mass_blocks` needs: (...) integers; 0 where nothing is allowed or mass is 0."""
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    if not isinstance(mass, Tensor):
        mass = torch.full((), mass, dtype=torch.float32, device=scores.device)
    return torch.where(mass >= 1, allowed.sum(dim=-1), count_to_mass(weights, mass))


def self_similarity(x: Tensor, block: int) -> Tensor:
    """Mean cosine of all pairs of rows of a block, each with itself included: (B, H, S, D) to (B, H, n) fp32, 0 ... 1.

    It is the squared length of the mean of the rows' directions. A short last block is divided by the rows it has. A
    row of zeros has no direction: its cosine with every row, itself included, is 0, and the others' are unharmed.
    """
    x = x.float()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return block_mean(x / length.masked_fill(length == 0, 1.0), block).square().sum(dim=-1)


def _per_head(threshold: Threshold, q: Tensor) -> Tensor:
    """A threshold as an fp32 tensor that broadcasts to (B, Hq, nq)."""
    if isinstance(threshold, Tensor):
        return threshold.reshape(-1, 1)
    return torch.full((), threshold, dtype=torch.float32, device=q.device)
