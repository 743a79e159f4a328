"""Lists of blocks, transposed in Triton: of each query block's key blocks, to those of each key block's query blocks.

One kernel marks the pairs in a byte matrix, another writes each of its rows as a list. What is written depends on the
input alone, no order of programs matters, and the host is not asked how long a list is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import on_device

_LISTED = tl.constexpr(128)
_MARKS = tl.constexpr(512)


def transposed_lists(index: Tensor, count: Tensor, nk: int, group: int = 1) -> tuple[Tensor, Tensor]:
    """The query blocks that list each key block, in ascending order; those of `group` heads that share keys, in one.

    Head h of a group lists block i as i * group + h. Takes five bytes for every pair of blocks, listed or not, of which
    one is given back.

    Args:
        index: (B or 1, H or 1, nq, width) int32, key blocks, unique within count; unit stride on width.
        count: (B or 1, H or 1, nq) int32.
        nk: number of key blocks.
        group: consecutive query heads that read one head of keys.

    Returns:
        index: (B or 1, H / group or 1, nk, nq * group) int32, contiguous; what follows count is not written.
        count: (B or 1, H / group or 1, nk) int32, contiguous.
    """
    if index.shape[1] == 1:
        index, count = index.expand(-1, group, -1, -1), count.expand(-1, group, -1)
    batch, heads, nq, _ = index.shape
    marks = torch.zeros((batch, heads // group, nk, nq * group), dtype=torch.uint8, device=index.device)
    transposed = torch.empty_like(marks, dtype=torch.int32)
    counts = transposed.new_empty(transposed.shape[:3])
    with on_device(index):
        _mark[(batch * heads * nq,)](index, *index.stride()[:3], count, *count.stride(), marks, heads, group, nq, nk)
        _list_rows[(counts.numel(),)](marks, transposed, counts, nq * group)
    return transposed, counts


@triton.jit(
    do_not_specialize=[
        *("Index", "index_batch", "index_head", "index_row", "Count", "count_batch", "count_head", "count_row"),
        *("heads", "group", "nq", "nk"),
    ]
)
def _mark(
    Index,
    index_batch,
    index_head,
    index_row,
    Count,
    count_batch,
    count_head,
    count_row,
    Marks,
    heads,
    group,
    nq,
    nk,
):
    """Mark, for one query block, the key blocks that it lists."""
    row = tl.program_id(0) % nq
    batch = (tl.program_id(0) // nq // heads).to(tl.int64)
    head = (tl.program_id(0) // nq % heads).to(tl.int64)
    Index += batch * index_batch + head * index_head + row.to(tl.int64) * index_row
    count = tl.load(Count + batch * count_batch + head * count_head + row * count_row)
    Marks += (batch * heads + head) // group * nk * nq * group + row * group + head % group
    for at in range(0, count, _LISTED):
        entry = at + tl.arange(0, _LISTED)
        block = tl.load(Index + entry, mask=entry < count, other=0).to(tl.int64)
        tl.store(Marks + block * nq * group, tl.full([_LISTED], 1, tl.uint8), mask=entry < count)


@triton.jit(do_not_specialize=["width"])
def _list_rows(Marks, Index, Count, width):
    """Write the list of one key block."""
    row = tl.program_id(0).to(tl.int64)
    Marks += row * width
    Index += row * width
    count = 0
    for at in range(0, width, _MARKS):
        entry = at + tl.arange(0, _MARKS)
        marked = tl.load(Marks + entry, mask=entry < width, other=0).to(tl.int32)
        tl.store(Index + count + tl.cumsum(marked, 0) - 1, entry, mask=marked != 0)
        count += tl.sum(marked, 0)
    tl.store(Count + row, count)
