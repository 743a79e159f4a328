"""Which tiles of a video every tile attends to: those with the highest scores, and all tiles of text.

Deterministic, without host synchronization: scores are fp32 and ties go to the lower number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..call import dtype_name
from ..errors import ArgumentError
from .block_index import lists_of, mask_of
from .by_device import top_k_blocks
from .tiles import Tiling
from .topk import decimal


@dataclass(frozen=True)
class TilePlan:
    """One call of video sparse attention, in numbers.

    Args:
        queries: tiles of the queries.
        keys: tiles of the keys; the same tile, and text on the same side.
        tiled: the tensors come and go in tile order.
        sparsity: fraction of the video tiles to leave out.
        scale: factor on the scores.
    """

    queries: Tiling
    keys: Tiling
    tiled: bool
    sparsity: float
    scale: float


def check_sparsity(op: str, q: Tensor, sparsity: float, sparsities: Tensor | None) -> None:
    """Check a sparsity and the tensor in its place, for q: (B, Hq, Sq, D).

    Raises:
        ArgumentError: on a sparsity outside 0 ... 1, or a wrong shape, dtype or device of the tensor.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ArgumentError(op, "sparsity", "be in 0 ... 1", sparsity)
    if sparsities is None:
        return
    shape, device = tuple(sparsities.shape), sparsities.device
    if not sparsities.is_floating_point() or shape not in ((), (q.shape[1],)) or device != q.device:
        must = f"be floating point of shape () or ({q.shape[1]},) on q's device {q.device}"
        raise ArgumentError(op, "sparsities", must, f"{dtype_name(sparsities.dtype)} {shape} on {device}")


def choose_tiles(scores: Tensor, sparsities: Tensor | None, plan: TilePlan) -> tuple[Tensor, Tensor]:
    """The tiles that every tile of queries attends to: the best of the video and all of the text; text sees all.

    Args:
        scores: (B, Hq, nq, nk) floating point.
        sparsities: () or (Hq,), in place of the plan's sparsity; None takes that.
        plan: how the tiles lie.

    Returns:
        index: (B, Hq, nq, nk) int32, ascending, 0 after the count.
        count: (B, Hq, nq) int32.
    """
    queries, keys = plan.queries, plan.keys
    first_q, first_k, videos = queries.first_video_tile, keys.first_video_tile, keys.video_tiles
    video = scores[:, :, first_q : first_q + queries.video_tiles, first_k : first_k + videos]
    keep = kept_tiles(plan.sparsity, videos) if sparsities is None else _kept_tiles(sparsities, videos)
    index, count = top_k_blocks(video, keep)
    if not queries.text_tiles:
        return index, count
    text = first_k, keys.text_tiles - first_k, first_q, queries.text_tiles - first_q
    return lists_of(pad(mask_of(index, count, videos), text, value=True))


def kept_tiles(sparsity: float, tiles: int) -> int:
    """max(1, min(ceil((1 - sparsity) * tiles), tiles)), in doubles as VSA's own code: of 10 at sparsity 0.7, 4."""
    return max(1, min(math.ceil((1 - sparsity) * tiles), tiles))


def _kept_tiles(sparsities: Tensor, tiles: int) -> Tensor:
    """The same from () or (Hq,), as (1 or Hq, 1) int64; `top_k_blocks` clamps it."""
    return ((1 - decimal(sparsities)) * tiles).ceil().long().reshape(-1, 1)


def split_tiles(
    index: Tensor, count: Tensor, sizes: Tensor | None, parts: int, block: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same lists with every tile cut into `parts` of `block` tokens; the last parts of a short tile are empty.

    Args:
        index: (B, H, nq, width) int32.
        count: (B, H, nq) int32.
        sizes: (nk,) int32, tokens of every tile of keys, or None if all are full.
        parts: parts of a tile.
        block: tokens of a part.

    Returns:
        index: (B, H, nq * parts, width * parts), count: (B, H, nq * parts), sizes: (nk * parts,) or None, all int32.
    """
    part = torch.arange(parts, dtype=torch.int32, device=index.device)
    index = (index.unsqueeze(-1) * parts + part).flatten(-2).repeat_interleave(parts, dim=2)
    if sizes is not None:
        sizes = (sizes.unsqueeze(-1) - part * block).clamp(0, block).flatten()
    return index, (count * parts).repeat_interleave(parts, dim=2), sizes
