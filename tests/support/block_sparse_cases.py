"""Small calls of block_sparse_attention, one of every mode: for the tests of its Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Shapes and modes of one call."""

    heads: tuple[int, int] = (2, 2)
    seq: tuple[int, int] = (128, 128)
    blocks: tuple[int, int] = (32, 32)
    batch: int = 1
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    causal: bool = False
    sizes: bool = False
    scale: float = 0.2
    density: float = 0.5


def lists(case: Case, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """Random ascending lists; the first of several rows is empty, and what follows count is out of range."""
    counts = [-(-seq // block) for seq, block in zip(case.seq, case.blocks, strict=True)]
    kept = torch.rand(batch, heads, *counts) < case.density
    kept[:, :, : counts[0] > 1] = False
    count = kept.sum(dim=-1, dtype=torch.int32)
    index = kept.logical_not().to(torch.int8).argsort(dim=-1, stable=True).to(torch.int32)
    beyond = torch.arange(counts[1]) >= count.unsqueeze(-1)
    return index.masked_fill(beyond, 1 << 20), count


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    shapes = [(case.batch, h, s, case.head_dim) for h, s in zip(case.heads, case.seq, strict=True)]
    q, k, v = (torch.randn(shape).to(case.dtype) for shape in (shapes[0], shapes[1], shapes[1]))
    return q, k, v


MODES = {
    "plain": Case(),
    "gqa_batch": Case(heads=(4, 2), batch=2, seq=(64, 96)),
    "causal": Case(causal=True),
    "causal_cross": Case(causal=True, seq=(96, 160)),
    "causal_more_queries": Case(causal=True, seq=(160, 96)),
    "cross": Case(seq=(64, 192)),
    "short_tails": Case(seq=(100, 77)),
    "causal_short_tails": Case(seq=(100, 77), causal=True),
    "key_sizes": Case(sizes=True),
    "key_sizes_causal_tails": Case(sizes=True, causal=True, seq=(100, 77)),
    "one_short_block": Case(seq=(5, 7), density=1.0),
    "all_empty": Case(density=0.0),
    "negative_scale": Case(scale=-0.3, sizes=True),
    "zero_scale": Case(scale=0.0, sizes=True),
    "unequal_blocks": Case(blocks=(64, 16), seq=(128, 100)),
    "wide_key_blocks": Case(blocks=(16, 128), seq=(48, 300), causal=True),
    "blocks_of_96": Case(blocks=(96, 96), seq=(200, 300), causal=True),
    "wide_key_blocks_key_sizes": Case(blocks=(16, 128), seq=(48, 300), sizes=True),
    "odd_blocks": Case(blocks=(20, 22), seq=(70, 90), causal=True, density=0.9),
    "odd_blocks_key_sizes": Case(blocks=(24, 20), seq=(70, 90), sizes=True),
}
