"""Which chunks of keys every query attends to: the gates and the selection of VMoBA.

A query's own chunk is always chosen. Everything has a fixed shape and waits for no device; no gradient flows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice
from ..errors import ArgumentError
from ..video_layout import VideoLayout
from .block_index import mask_of
from .tiles import Tiling, tiling_of
from .topk import top_k_blocks

SELECT = ("topk", "threshold")
GROUPS = {"query_head": (3,), "block": (1, 2), "overall": (1, 2, 3), "head_global": (2, 3)}
"""Name -> the axes of the gates (batch, head, query, chunk) within which gates compete."""

NO_TOPK_OF_BLOCKS = 'The best queries of a chunk may leave a query without one: use "query_head".'

_LEAST_RANGE = 1e-6


@dataclass(frozen=True, slots=True)
class ChunkRule:
    """How chunks are chosen: see `vmoba_attention` for the meaning of the fields, which are its parameters."""

    select: str
    topk: int
    threshold: float
    threshold_type: str
    compat: bool

    def check(self, op: str) -> None:
        """Raises ArgumentError, as of the op, if a field is out of range or they contradict each other."""
        check_choice(op, "select", self.select, SELECT)
        check_choice(op, "threshold_type", self.threshold_type, tuple(GROUPS))
        if self.select == "topk" and self.threshold_type == "block":
            raise ArgumentError(op, "threshold_type", 'not be "block" with select="topk"', "it", NO_TOPK_OF_BLOCKS)
        if self.topk < 1:
            raise ArgumentError(op, "topk", "be at least 1", self.topk)
        if not 0.0 <= self.threshold <= 1.0:
            raise ArgumentError(op, "threshold", "be in 0 ... 1", self.threshold)

    @property
    def takes_all(self) -> bool:
        """Whether every query attends to everything, whatever the gates."""
        if self.select == "topk":
            return self.compat and self.topk == 1  # upstream does where nothing is chosen beside the own chunks
        return not self.compat and self.threshold >= 1  # said exactly: the sums would decide it by their rounding

    @property
    def inside(self) -> tuple[int, ...]:
        """The axes of the gates within which they compete. Upstream packs a batch into one sequence."""
        axes = GROUPS[self.threshold_type]
        packs = self.compat and self.threshold_type in ("overall", "head_global")
        return (0, *axes) if packs else axes


class ChunkPlan(NamedTuple):
    """What a kernel of VMoBA is given beside q, k and v."""

    tiling: Tiling
    rule: ChunkRule
    scale: float


def chunk_tiling(op: str, seq: int, *, grid: Sequence[int], chunk: Sequence[int], chunk_tokens: int) -> Tiling:
    """The chunks of a video of `seq` tokens, as tiles: of the grid, or of `chunk_tokens` in a row if that is not 0.

    Raises:
        ArgumentError: as of the op, on a wrong grid or chunk.
    """
    if len(chunk) != 3 or min(chunk) < 0:
        raise ArgumentError(op, "chunk", "be three ints (t, h, w) of at least 0", list(chunk))
    if chunk_tokens < 0:
        raise ArgumentError(op, "chunk_tokens", "be at least 0", chunk_tokens)
    tile = [min(size or tokens, tokens) for size, tokens in zip(chunk, grid, strict=False)]
    tiling = tiling_of(op, seq, grid=grid, tile=tile)
    if not chunk_tokens:
        return tiling
    tokens = tiling.layout.video_tokens
    return Tiling(VideoLayout((tokens, 1, 1)), (min(chunk_tokens, tokens), 1, 1))


def own_chunks(tiling: Tiling, device: torch.device) -> Tensor:
    """(S, C) bool: the chunk that holds each token, in raster order."""
    number = tiling.places(device) // tiling.volume
    return number.unsqueeze(-1) == torch.arange(tiling.tiles, device=device)


def chunk_gates(q: Tensor, keys: Tensor, sizes: Tensor) -> Tensor:
    """The product q . mean(keys of a chunk), unscaled, (B, Hq, S, C) fp32.

    Args:
        q: (B, Hq, S, D).
        keys: (B, Hkv, C * volume, D), in tile order with zeros for padding.
        sizes: (C,) int32, keys of each chunk.
    """
    total = keys.unflatten(2, (len(sizes), -1)).sum(dim=3, dtype=torch.float32)
    mean = total / sizes.unsqueeze(-1)
    grouped: Tensor = q.float().unflatten(1, (keys.shape[1], -1)) @ mean.unsqueeze(2).mT
    return grouped.flatten(1, 2)


def choose_chunks(gates: Tensor, own: Tensor, rule: ChunkRule) -> Tensor:
    """(B, Hq, S, C) bool: the chunks of every query, its own among them.

    Args:
        gates: (B, Hq, S, C) fp32. NaN ranks highest, so that it reaches the output.
        own: (S, C) bool.
        rule: how to choose.
    """
    if rule.takes_all:
        return torch.ones_like(gates, dtype=torch.bool)
    choose = _most if rule.select == "topk" else _enough
    outside = [axis for axis in range(4) if axis not in rule.inside]
    order = [*outside, *rule.inside]
    back = [order.index(axis) for axis in range(4)]
    apart = gates.permute(order)
    groups = apart.flatten(len(outside))
    chosen = choose(groups, own.expand_as(gates).permute(order).reshape(groups.shape), rule, gates.shape[-1])
    return chosen.view(apart.shape).permute(back) | own


def _most(gates: Tensor, own: Tensor, rule: ChunkRule, chunks: int) -> Tensor:
    """The topk best entries for every query of a group, own chunks first: (..., n) bool."""
    queries = gates.shape[-1] // chunks
    most = torch.finfo(gates.dtype).max
    finite = gates.nan_to_num(nan=most, posinf=most)  # below the own chunks, so that every query gets as many as asked
    index, count = top_k_blocks(finite.masked_fill(own, torch.inf), rule.topk * queries)
    return mask_of(index, count, gates.shape[-1])


def _enough(gates: Tensor, own: Tensor, rule: ChunkRule, _chunks: int) -> Tensor:
    """The best entries of a group that, with the own ones, hold `threshold` of its weight: (..., n) bool.

    An entry's weight is its gate, scaled so that the group spans 0 ... 1.
    """
    low, high = gates.amin(dim=-1, keepdim=True), gates.amax(dim=-1, keepdim=True)
    span = (high - low).masked_fill(high - low <= _LEAST_RANGE, 1.0)
    weight = (gates - low) / span
    total = weight.sum(dim=-1, keepdim=True) + _LEAST_RANGE
    need = (rule.threshold - (weight * own).sum(dim=-1, keepdim=True) / total).clamp(min=0)
    weight = weight.masked_fill(own, 0.0)
    # Upstream lets own entries, at weight 0, be picked among the others of that weight.
    order = (weight if rule.compat else weight.masked_fill(own, -1.0)).argsort(dim=-1, descending=True, stable=True)
    enough = weight.gather(-1, order).cumsum(dim=-1) / total >= need
    # Where the sum stays short of the threshold, everything is meant. Upstream takes two entries there.
    last = gates.shape[-1] - 1
    fallback = min(1, last) if rule.compat and rule.threshold_type in ("query_head", "block") else last
    until = torch.where(enough.any(dim=-1, keepdim=True), enough.int().argmax(dim=-1, keepdim=True), fallback)
    picked = torch.arange(gates.shape[-1], device=gates.device) <= until
    return torch.zeros_like(picked).scatter_(-1, order, picked)
