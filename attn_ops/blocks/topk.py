"""What selection is made of, in PyTorch and by definition: block means, exact top-k, and how many hold a mass.

All are deterministic and wait for no device. Ties go to the lower index, so that every implementation agrees.
`by_device` has the same functions, in Triton on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from .block_index import lists_of

UNITS_OF_MASS = 2.0**40
"""Whole units that a mass of 1 is counted in, so that sums are exact."""
_DECIMALS = 1e6


def block_mean(x: Tensor, block: int, sizes: Tensor | None = None) -> Tensor:
    """Mean of every block of tokens, (B, H, S, D) to (B, H, ceil(S / block), D) fp32.

    Args:
        x: (B, H, S, D) floating point.
        block: tokens of a block; a short last one is divided by the tokens it has.
        sizes: (S / block,) int32, how many tokens a block has, the first ones; the others must be 0. None: all.

    Raises:
        ArgumentError: if block is not at least 1.
    """
    if block < 1:
        raise ArgumentError("block_mean", "block", "be at least 1", block)
    whole = x.shape[2] // block * block
    blocks = x[:, :, :whole].reshape(*x.shape[:2], whole // block, block, x.shape[3])
    if sizes is not None:
        return blocks.sum(dim=3, dtype=torch.float32) / sizes.unsqueeze(-1)
    means = blocks.mean(dim=3, dtype=torch.float32)
    if whole == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole:].mean(dim=2, keepdim=True, dtype=torch.float32)], dim=2)


def top_k_blocks(scores: Tensor, keep: int | Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `keep` blocks of the highest score in every row, exactly: score descending, then index ascending.

    Args:
        scores: (..., n) floating point. NaN ranks highest, so that it reaches the output instead of vanishing.
        keep: blocks to keep per row, at least 1: a number, or a tensor broadcastable to (...).
        allowed: bool, broadcastable to scores: the candidates. A row with fewer of them than `keep` keeps them all.

    Returns:
        index: (..., n) int32, kept blocks in ascending order, 0 after the count.
        count: (...) int32.

    Raises:
        ArgumentError: if `keep` is a number below 1.
    """
    if isinstance(keep, int) and keep < 1:
        raise ArgumentError("top_k_blocks", "keep", "be at least 1", keep)
    n = scores.shape[-1]
    if n == 0:
        return lists_of(scores.isnan())
    scores = scores.masked_fill(scores.isnan(), torch.inf)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if isinstance(keep, int):
        wanted = torch.full((), min(keep, n), device=scores.device)
        last = scores.topk(min(keep, n), dim=-1).values[..., -1:]
    else:
        wanted = keep.clamp(1, n).expand(scores.shape[:-1]).unsqueeze(-1).long()
        last = scores.sort(dim=-1, descending=True).values.gather(-1, wanted - 1)
    above = scores > last
    ties = scores == last
    if allowed is not None:
        ties &= allowed
    kept = above | (ties & (ties.cumsum(dim=-1) <= wanted - above.sum(dim=-1, keepdim=True)))
    return lists_of(kept)


def decimal(ratios: Tensor) -> Tensor:
    """Ratios in fp64, rounded to six decimals: what was meant. The fp32 number nearest to 0.9 is below it."""
    return (ratios.double() * _DECIMALS).round() / _DECIMALS


def count_to_mass(weights: Tensor, mass: Tensor) -> Tensor:
    """How many of the largest weights of every row it takes to hold `mass`: (...) integers, 0 for a mass of 0.

    The running sum is one of integers: exact, and the same in whatever order a device adds.

    Args:
        weights: (..., n) fp32 of sum 1 in a row, 0 ... 1; NaN counts as 0.
        mass: fp32, 0 ... 1, broadcastable to (...).
    """
    units = (weights.nan_to_num(0.0).sort(dim=-1, descending=True).values * UNITS_OF_MASS).long()
    before = units.cumsum(dim=-1) - units
    return ((units > 0) & (before < (mass * UNITS_OF_MASS).long().unsqueeze(-1))).sum(dim=-1)
