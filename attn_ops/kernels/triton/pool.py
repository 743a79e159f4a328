"""Means of blocks of tokens in Triton, in one launch: what `blocks/topk.py` defines, for sm_80 and newer.

One program sums one block of one head in fp32, always in the same order: equal blocks have equal means.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import ArgumentError
from .tiles import on_device

_ELEMENTS = 4096  # of a tile: 16 loads of 16 bytes for each of 32 lanes in half precision
_WARPS = 4


def block_mean(x: Tensor, block: int, sizes: Tensor | None = None) -> Tensor:
    """Mean of every block of tokens, (B, H, S, D) to (B, H, ceil(S / block), D) fp32, contiguous.

    Args:
        x: (B, H, S, D) fp32, fp16 or bf16.
        block: tokens of a block; a short last one is divided by the tokens it has.
        sizes: (ceil(S / block),) int32, tokens of every block, the first ones. None: all that there are.

    Raises:
        ArgumentError: if block is not at least 1.
    """
    if block < 1:
        raise ArgumentError("block_mean", "block", "be at least 1", block)
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, seq, head_dim = x.shape
    blocks, dim = triton.cdiv(seq, block), triton.next_power_of_2(head_dim)
    out = x.new_empty((batch, heads, blocks, head_dim), dtype=torch.float32)
    if out.numel() == 0:
        return out
    rows = min(triton.next_power_of_2(block), max(1, _ELEMENTS // dim))
    with on_device(x):
        _block_mean[(blocks * heads * batch,)](
            *(x, x.stride()[:3], sizes, out, block, blocks, heads, seq),
            ROWS=rows,
            HEAD_DIM=head_dim,
            DIM=dim,
            num_warps=_WARPS,
        )
    return out


@triton.jit(do_not_specialize=["Sizes", "Out", "block_size", "blocks", "heads", "seq"])
def _block_mean(
    X,
    strides,
    Sizes,
    Out,
    block_size,
    blocks,
    heads,
    seq,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    first = block * block_size
    tokens = tl.load(Sizes + block) if Sizes is not None else tl.minimum(block_size, seq - first)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    X += batch * strides[0] + head * strides[1] + first.to(tl.int64) * strides[2]
    total = tl.zeros([ROWS, DIM], tl.float32)
    for at in range(0, tokens, ROWS):
        exists = (at + row < tokens)[:, None] & (dim < HEAD_DIM)[None, :]
        offset = (at + row).to(tl.int64)[:, None] * strides[2] + dim[None, :]
        total += tl.load(X + offset, mask=exists, other=0.0).to(tl.float32)
    # Triton's own division of fp32 is not that of IEEE.
    mean = tl.math.div_rn(tl.sum(total, 0), tl.zeros([DIM], tl.float32) + tokens.to(tl.float32))
    tl.store(Out + tl.program_id(0).to(tl.int64) * HEAD_DIM + dim, mean, mask=dim < HEAD_DIM)
