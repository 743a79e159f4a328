"""vmoba_attention, defined: gate every chunk for every query, choose within groups of gates, attend to the tokens.

The gates are sorted group by group, in plain loops, and everything is fp64 where the inputs are.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..blocks.chunk_choice import GROUPS, ChunkRule
from ..blocks.tiles import Tiling
from ..heads import per_query_head
from .attention import masked_attention, masked_attention_backward


def vmoba_attention(
    q: Tensor, k: Tensor, v: Tensor, *, tiling: Tiling, rule: ChunkRule, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, S, D) to its chunks of k, v: (B, Hkv, S, D). Returns out, lse (B, Hq, S)."""
    return masked_attention(q, k, v, chosen_tokens(q, k, tiling=tiling, rule=rule), scale)


def vmoba_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tiling: Tiling,
    rule: ChunkRule,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `vmoba_attention` with respect to q, k and v, the selection held fixed."""
    allowed = chosen_tokens(q, k, tiling=tiling, rule=rule)
    return masked_attention_backward(grad_out, grad_lse, out, lse, q, k, v, allowed, scale)


def chosen_tokens(q: Tensor, k: Tensor, *, tiling: Tiling, rule: ChunkRule) -> Tensor:
    """(B, Hq, S, S) bool, True where a query may see a key of a chosen chunk."""
    chunk = chunk_of_token(tiling).to(q.device)
    return chosen_chunks(q, k, tiling=tiling, rule=rule)[..., chunk]


def chosen_chunks(q: Tensor, k: Tensor, *, tiling: Tiling, rule: ChunkRule) -> Tensor:
    """(B, Hq, S, C) bool, True where a query attends to a chunk."""
    chunk = chunk_of_token(tiling).to(q.device)
    chunks = int(chunk.max()) + 1
    compute = torch.promote_types(q.dtype, torch.float32)
    keys = per_query_head(k.to(compute), q.shape[1])
    means = torch.stack([keys[:, :, chunk == number].mean(dim=2) for number in range(chunks)], dim=2)
    gates = q.to(compute) @ means.mT
    own = (chunk[:, None] == torch.arange(chunks, device=q.device)).expand_as(gates)
    if rule.takes_all:
        return torch.ones_like(own)
    chosen = own.clone()
    for group in _groups(rule, gates.shape):
        choose = _most if rule.select == "topk" else _enough
        chosen[group] |= choose(gates[group].flatten(), own[group].flatten(), rule, chunks).view(own[group].shape)
    return chosen


def chunk_of_token(tiling: Tiling) -> Tensor:
    """(S,) int64: the chunk of every token in raster order."""
    (_, chunks_h, chunks_w), (t, h, w) = tiling.grid, tiling.tile
    tokens = itertools.product(*(range(size) for size in tiling.layout.grid))
    return torch.tensor([(i // t * chunks_h + j // h) * chunks_w + k // w for i, j, k in tokens])


def _groups(rule: ChunkRule, shape: torch.Size) -> list[tuple[int | slice, ...]]:
    """The index of every group of gates that compete."""
    axes: tuple[int, ...] = GROUPS[rule.threshold_type]
    if rule.compat and rule.threshold_type in ("overall", "head_global"):
        axes = (0, *axes)
    ways = [[slice(None)] if axis in axes else range(size) for axis, size in enumerate(shape)]
    return list(itertools.product(*ways))


def _most(gates: Tensor, own: Tensor, rule: ChunkRule, chunks: int) -> Tensor:
    order = gates.masked_fill(own, torch.inf).sort(descending=True, stable=True).indices
    chosen = torch.zeros_like(own)
    chosen[order[: rule.topk * (len(gates) // chunks)]] = True
    return chosen


def _enough(gates: Tensor, own: Tensor, rule: ChunkRule, _chunks: int) -> Tensor:
    span = gates.max() - gates.min()
    weight = (gates - gates.min()) / (span if span > 1e-6 else 1.0)
    total = weight.sum() + 1e-6
    mass = weight[own].sum() / total
    weight[own] = 0.0
    candidates = weight if rule.compat else weight.masked_fill(own, -1.0)
    order = candidates.sort(descending=True, stable=True).indices
    need, taken = max(0.0, rule.threshold - float(mass)), 0
    sums = (weight[order].cumsum(0) / total >= need).tolist()
    if True in sums:
        taken = sums.index(True) + 1
    else:
        taken = 2 if rule.compat and rule.threshold_type in ("query_head", "block") else len(sums)
    chosen = torch.zeros_like(own)
    chosen[order[:taken]] = True
    return chosen
