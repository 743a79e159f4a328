"""The choice of key blocks where no one holds all tokens: sums of blocks are added up, then every row chooses by means.

Two opaque ops, so that a compiler rounds nothing else than `choose_blocks` does: what is chosen is what one process
chooses that has all tokens, but for ties of scores in their last bits where a block was summed in parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import LIBRARY, NAMESPACE
from .by_device import block_mean
from .pooled import choose_by_means


def block_sums(x: Tensor, block: int) -> Tensor:
    """Sum of every block of tokens, (B, H, S, D) to (B, H, ceil(S / block), D) fp32; no gradient flows."""
    sums = block_mean(x, block) * block
    short = x.shape[2] % block
    return torch.cat([sums[:, :, :-1], sums[:, :, -1:] / block * short], dim=2) if short else sums


def choose_by_sums(
    sum_q: Tensor,
    sum_k: Tensor,
    keep_ratios: Tensor | None,
    keep_ratio: float,
    first_row: int,
    tokens: int,
    block_q: int,
    block_k: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """`choose_blocks` for some rows of a sequence, by the sums of its blocks.

    Args:
        sum_q: (B, Hq, rows, D) fp32, the rows from `first_row` on.
        sum_k: (B, Hkv, nk, D) fp32, all blocks of keys.
        keep_ratios: () or (Hq,) fp32, instead of keep_ratio.
        keep_ratio: fraction of the candidates to keep.
        first_row: number of the first block of queries.
        tokens: queries of the whole sequence, and keys.
        block_q: tokens per block of queries.
        block_k: tokens per block of keys.
        causal: as `choose_blocks`.

    Returns:
        index: (B, Hq, rows, nk) int32, ascending, 0 after the count.
        count: (B, Hq, rows) int32.
    """
    mean_q = sum_q / _sizes(sum_q, first_row, tokens, block_q)
    mean_k = sum_k / _sizes(sum_k, 0, tokens, block_k)
    ratio = keep_ratio if keep_ratios is None else keep_ratios
    return choose_by_means(
        mean_q, mean_k, keep_ratio=ratio, seq_q=tokens, first_row=first_row, block_q=block_q, block_k=block_k,
        causal=causal,
    )  # fmt: skip


def _sizes(sums: Tensor, first: int, tokens: int, block: int) -> Tensor:
    """Tokens of each block from number `first` on, (blocks, 1)."""
    number = torch.arange(first, first + sums.shape[2], device=sums.device)
    return (tokens - number * block).clamp(max=block).unsqueeze(-1)


def _fake_sums(x: Tensor, block: int) -> Tensor:
    return x.new_empty((*x.shape[:2], -(-x.shape[2] // block), x.shape[3]), dtype=torch.float32)


def _fake_choice(sum_q: Tensor, sum_k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = sum_q.shape[:3]
    return sum_q.new_empty((*rows, sum_k.shape[2]), dtype=torch.int32), sum_q.new_empty(rows, dtype=torch.int32)


_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("block_sums(Tensor x, int block) -> Tensor", tags=_TAGS)
LIBRARY.impl("block_sums", block_sums, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::block_sums", _fake_sums, lib=LIBRARY)
LIBRARY.define(
    "choose_by_sums(Tensor sum_q, Tensor sum_k, Tensor? keep_ratios, float keep_ratio, int first_row, int tokens, "
    "int block_q, int block_k, bool causal) -> (Tensor index, Tensor count)",
    tags=_TAGS,
)
LIBRARY.impl("choose_by_sums", choose_by_sums, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::choose_by_sums", _fake_choice, lib=LIBRARY)

BLOCK_SUMS: torch._ops.OpOverload = torch.ops.sparseattn.block_sums.default
CHOOSE_BY_SUMS: torch._ops.OpOverload = torch.ops.sparseattn.choose_by_sums.default
