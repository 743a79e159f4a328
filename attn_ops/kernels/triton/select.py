"""Exact selection of blocks in Triton: what `blocks/topk.py` defines, without a sort, for sm_80 and newer.

One program finds the least key that its row keeps, bit by bit, by counting how many reach it; prefix sums then put what
is kept in ascending order. Keys are integers and so are all sums: the result is exact, and the same every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...blocks.topk import UNITS_OF_MASS
from ...errors import ArgumentError
from .tiles import on_device

_NO_CANDIDATE = tl.constexpr(-(2**31))  # below the key of -inf
_INFINITY_BITS = tl.constexpr(0x7F800000)
_KEY_BITS = tl.constexpr(32)
_UNITS_OF_MASS = tl.constexpr(UNITS_OF_MASS)
_UNIT_BITS = tl.constexpr(41)


class RowTile(NamedTuple):
    """Entries of a row that a program holds in registers, and its warps. What is beyond them is read again."""

    entries: int
    warps: int


ROW_TILES = (RowTile(256, 1), RowTile(1024, 2), RowTile(4096, 8))


def top_k_blocks(scores: Tensor, keep: int | Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `keep` blocks of the highest score in every row: score descending, then index ascending; NaN is infinite.

    Args:
        scores: (..., n) fp32, fp16 or bf16.
        keep: blocks to keep per row, at least 1: a number, or integers broadcastable to (...).
        allowed: bool, broadcastable to scores: the candidates. A row with fewer of them than `keep` keeps them all.

    Returns:
        index: (..., n) int32, kept blocks in ascending order, 0 after the count; contiguous.
        count: (...) int32, contiguous.

    Raises:
        ArgumentError: if `keep` is a number below 1.
    """
    if isinstance(keep, int) and keep < 1:
        raise ArgumentError("top_k_blocks", "keep", "be at least 1", keep)
    shape = scores.shape
    index, count = scores.new_empty(shape, dtype=torch.int32), scores.new_empty(shape[:-1], dtype=torch.int32)
    if count.numel() == 0:
        return index, count
    numbers = _repeating(keep, shape[:-1]) if isinstance(keep, Tensor) else None
    candidates = None if allowed is None else _repeating(allowed, shape, least=1).view(torch.uint8)
    tile = _tile(shape[-1])
    with on_device(scores):
        _top_k[(count.numel(),)](
            *(scores.contiguous(), candidates, 0 if candidates is None else candidates.numel() // max(1, shape[-1])),
            *(keep if numbers is None else 0, numbers, 0 if numbers is None else numbers.numel()),
            *(index, count, shape[-1]),
            TILE=tile.entries,
            num_warps=tile.warps,
        )
    return index, count


def count_to_mass(weights: Tensor, mass: Tensor) -> Tensor:
    """How many of the largest weights of every row it takes to hold `mass`: (...) int32, contiguous.

    Args:
        weights: (..., n) fp32 of sum 1 in a row, 0 ... 1; NaN counts as 0.
        mass: fp32, 0 ... 1, broadcastable to (...).
    """
    count = weights.new_empty(weights.shape[:-1], dtype=torch.int32)
    if count.numel() == 0:
        return count
    masses, tile = _repeating(mass, count.shape), _tile(weights.shape[-1])
    with on_device(weights):
        _count_to_mass[(count.numel(),)](
            *(weights.contiguous(), masses, masses.numel(), count, weights.shape[-1]),
            TILE=tile.entries,
            num_warps=tile.warps,
        )
    return count


def _repeating(x: Tensor, shape: torch.Size, least: int = 0) -> Tensor:
    """What x, broadcast to `shape`, repeats over and over: contiguous, without the leading dimensions it lacks.

    The last `least` dimensions of `shape` are always there.
    """
    while x.dim() > least and x.shape[0] == 1:
        x = x[0]
    return x.expand(shape[len(shape) - max(least, x.dim()) :]).contiguous()


def _tile(n: int) -> RowTile:
    return next((tile for tile in ROW_TILES if n <= tile.entries), ROW_TILES[-1])


@triton.jit(do_not_specialize=["Scores", "Allowed", "allowed_rows", "keep", "Keep", "keep_rows", "Index", "Count", "n"])
def _top_k(Scores, Allowed, allowed_rows, keep, Keep, keep_rows, Index, Count, n, TILE: tl.constexpr):
    program = tl.program_id(0)
    Scores += program.to(tl.int64) * n
    Index += program.to(tl.int64) * n
    if Allowed is not None:
        Allowed += (program % allowed_rows).to(tl.int64) * n
    if Keep is not None:
        keep = tl.maximum(tl.load(Keep + program % keep_rows), 1)
    row = (Scores, Allowed, n)
    first = _keys(row, 0, TILE)
    least = tl.full([], _NO_CANDIDATE, tl.int32)
    for bit in range(1, _KEY_BITS + 1):
        # The first bit is that of the sign: to take it away is to go up.
        higher = least ^ (tl.full([], 1, tl.int32) << (_KEY_BITS - bit))
        least = tl.where(_reaching(row, first, higher, TILE) >= keep, higher, least)

    ties = keep - _reaching(row, first, least + 1, TILE)
    listed = 0
    tied = 0
    for at in range(0, n, TILE):
        keys = _keys(row, at, TILE)
        tie = ((keys == least) & (keys != _NO_CANDIDATE)).to(tl.int32)
        kept = (keys > least) | ((tie == 1) & (tied + tl.cumsum(tie, 0) <= ties))
        place = listed + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(Index + place, at + tl.arange(0, TILE), mask=kept)
        listed += tl.sum(kept.to(tl.int32))
        tied += tl.sum(tie)
    for at in range(0, n, TILE):
        place = at + tl.arange(0, TILE)
        tl.store(Index + place, tl.zeros([TILE], tl.int32), mask=(place >= listed) & (place < n))
    tl.store(Count + program, listed)


@triton.jit
def _keys(row, at, TILE: tl.constexpr):
    """Integers in the order of the scores at ... at + TILE - 1; `_NO_CANDIDATE` where there is none."""
    Scores, Allowed, n = row
    block = at + tl.arange(0, TILE)
    exists = block < n
    bits = tl.load(Scores + block, mask=exists, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, bits)  # -0 equals 0
    bits = tl.where(magnitude > _INFINITY_BITS, _INFINITY_BITS, bits)
    if Allowed is not None:
        exists = exists & (tl.load(Allowed + block, mask=exists, other=0) != 0)
    return tl.where(exists, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _NO_CANDIDATE)


@triton.jit
def _reaching(row, first, least, TILE: tl.constexpr):
    """How many keys of the row are `least` or more; `first` are those of its first tile."""
    number = tl.sum((first >= least).to(tl.int32))
    for at in range(TILE, row[2], TILE):
        number += tl.sum((_keys(row, at, TILE) >= least).to(tl.int32))
    return number


@triton.jit(do_not_specialize=["Weights", "Mass", "mass_rows", "Count", "n"])
def _count_to_mass(Weights, Mass, mass_rows, Count, n, TILE: tl.constexpr):
    program = tl.program_id(0)
    Weights += program.to(tl.int64) * n
    wanted = (tl.load(Mass + program % mass_rows) * _UNITS_OF_MASS).to(tl.int64)
    first = _units(Weights, 0, n, TILE)
    least = tl.zeros([], tl.int64)
    for bit in range(1, _UNIT_BITS + 1):
        higher = least | (tl.full([], 1, tl.int64) << (_UNIT_BITS - bit))
        held, _ = _held(Weights, first, higher, n, TILE)
        least = tl.where(held >= wanted, higher, least)
    held, number = _held(Weights, first, least + 1, n, TILE)
    # All above `least` are needed, and of its ties those before which not enough is held. It is 0 if all are too few.
    for at in range(0, n, TILE):
        before = held + (at + tl.arange(0, TILE)) * least
        number += tl.sum(((before < wanted) & (least > 0)).to(tl.int32))
    tl.store(Count + program, number)


@triton.jit
def _units(Weights, at, n, TILE: tl.constexpr):
    """The weights at ... at + TILE - 1 in whole units: their sums are exact in any order."""
    block = at + tl.arange(0, TILE)
    weights = tl.load(Weights + block, mask=block < n, other=0.0)
    weights = tl.where(weights == weights, weights, 0.0)  # what integer a NaN becomes is undefined
    return (weights * _UNITS_OF_MASS).to(tl.int64)


@triton.jit
def _held(Weights, first, least, n, TILE: tl.constexpr):
    """Sum and number of the units of a row that are `least` or more; `first` are those of its first tile."""
    held = tl.sum(tl.where(first >= least, first, 0))
    number = tl.sum((first >= least).to(tl.int32))
    for at in range(TILE, n, TILE):
        units = _units(Weights, at, n, TILE)
        held += tl.sum(tl.where(units >= least, units, 0))
        number += tl.sum((units >= least).to(tl.int32))
    return held, number
