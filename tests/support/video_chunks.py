"""Videos cut into chunks, and ways to choose among them: for the tests of VMoBA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn import VideoLayout
from sparseattn.attn_ops.blocks.chunk_choice import ChunkRule
from sparseattn.attn_ops.blocks.tiles import Tiling

# grid, chunk
CHUNKS = {
    "temporal": ((6, 4, 5), (2, 0, 0)),
    "short last chunk": ((5, 4, 5), (2, 0, 0)),
    "spatial": ((3, 6, 8), (0, 3, 4)),
    "both": ((4, 6, 6), (2, 3, 2)),
    "clipped": ((5, 5, 7), (2, 3, 4)),
    "one chunk": ((2, 4, 4), (2, 0, 0)),
}
CHOICES = {
    "topk": {"select": "topk", "topk": 2},
    "topk 1": {"select": "topk", "topk": 1},
    "topk overall": {"select": "topk", "topk": 2, "threshold_type": "overall"},
    "topk head_global": {"select": "topk", "topk": 2, "threshold_type": "head_global"},
    "0.0 query_head": {"select": "threshold", "threshold": 0.0},
    **{
        f"0.3 {kind}": {"select": "threshold", "threshold": 0.3, "threshold_type": kind}
        for kind in ("query_head", "block", "overall", "head_global")
    },
}


def arguments(chunks: str, choice: str = "topk", **more: Any) -> dict[str, Any]:
    grid, chunk = CHUNKS[chunks]
    return {"grid": grid, "chunk": chunk, **CHOICES[choice], **more}


def inputs(
    chunks: str,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    heads: tuple[int, int] = (2, 2),
    dim: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    length, (q_heads, kv_heads) = VideoLayout(CHUNKS[chunks][0]).tokens, heads
    if strided:
        q, k, v = (torch.randn(2, length, h, dim).to(dtype).transpose(1, 2) for h in (q_heads, kv_heads, kv_heads))
    else:
        q, k, v = (torch.randn(2, h, length, dim).to(dtype) for h in (q_heads, kv_heads, kv_heads))
    return q, k, v


def tiling_of(chunks: str) -> Tiling:
    grid, chunk = CHUNKS[chunks]
    t, h, w = (size or tokens for size, tokens in zip(chunk, grid, strict=True))
    return Tiling(VideoLayout(grid), (t, h, w))


def rule_of(choice: str, compat: bool = False) -> ChunkRule:
    given = {"select": "topk", "topk": 3, "threshold": 0.25, "threshold_type": "query_head", **CHOICES[choice]}
    return ChunkRule(**given, compat=compat)  # type: ignore[arg-type]
