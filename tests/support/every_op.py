"""A module that calls every op once, on tokens whose number may change and on a video whose grid may not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseattn.attn_ops.backends.sage_quantized import quantize_and_attend

SMALL = {"block_q": 16, "block_k": 16, "keep_ratio": 0.5}
GRID = {"grid": [4, 4, 4]}
ON_TOKENS: dict[str, dict[str, Any]] = {
    "flash_attention": {"causal": True, "window": 7},
    "block_topk_attention": SMALL,
    "sage_attention": {"smooth_v": True},
    "sage_fp4_attention": {"provider": "reference"},
    "sparge_attention": {**SMALL, "mass": 0.5, "scale": 0.3},
    "sparse_linear_attention": SMALL,
    "sage_sparse_linear_attention": SMALL,
}
ON_VIDEO: dict[str, dict[str, Any]] = {
    "video_sparse_attention": {**GRID, "tile": [2, 2, 2], "sparsity": 0.5},
    "sliding_tile_attention": {**GRID, "tile": [2, 2, 2], "window": [1, 1, 2]},
    "vmoba_attention": {**GRID, "chunk": [1, 0, 0], "topk": 2},
}
OPS = ("block_sparse_attention", "sage_attention_quantized", *ON_TOKENS, *ON_VIDEO)
"""In the order of the outputs, each (out, lse)."""


class EveryOp(nn.Module):
    """Queries (B, 2, S, 16) of tokens, block lists that do not depend on S, and queries (B, 2, 64, 16) of a video."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.bias = nn.Parameter(torch.randn(16))
        self.register_buffer("ratios", torch.tensor([0.25, 1.0]))

    def forward(self, q: Tensor, index: Tensor, count: Tensor, video: Tensor) -> list[Tensor]:
        ops = torch.ops.sparseattn
        k, v = q.flip(2), q + 1
        pairs = [ops.block_sparse_attention(video, video, video, index, count, block_q=16, block_k=16, causal=True)]
        pairs.append(quantize_and_attend(q, k, v))
        for name, arguments in ON_TOKENS.items():
            given = {**arguments, "keep_ratios": self.ratios} if name == "block_topk_attention" else arguments
            more = (self.weight, self.bias) if "linear" in name else ()
            pairs.append(getattr(ops, name)(q, k, v, *more, **given))
        for name, arguments in ON_VIDEO.items():
            more = (video,) if name == "video_sparse_attention" else ()  # its gate
            pairs.append(getattr(ops, name)(video, video, video + 1, *more, **arguments))
        return [tensor for pair in pairs for tensor in pair]


def inputs(length: int = 64, batch: int = 1) -> tuple[Tensor, ...]:
    """Its inputs, with so many tokens."""
    torch.manual_seed(length)
    index = torch.arange(4, dtype=torch.int32).expand(batch, 2, 4, 4).contiguous()
    count = torch.arange(1, 5, dtype=torch.int32).expand(batch, 2, 4).contiguous()
    return torch.randn(batch, 2, length, 16), index, count, torch.randn(batch, 2, 64, 16)


def every_op(**options: Any) -> tuple[EveryOp, torch.export.ExportedProgram]:
    """The module and its program, with any number of tokens."""
    torch.manual_seed(0)
    model = EveryOp().eval().requires_grad_(False)
    length = torch.export.Dim("length", min=2, max=4096)
    return model, torch.export.export(model, inputs(), dynamic_shapes=({2: length}, None, None, None), **options)
