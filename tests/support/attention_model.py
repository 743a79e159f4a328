"""Small modules whose attention the tests rewrite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class SelfAttention(nn.Module):
    """Fused projection, (B, S, H, D) views transposed, SDPA with the given keyword arguments."""

    def __init__(self, heads: int = 2, head_dim: int = 16, **arguments: Any) -> None:
        super().__init__()
        self.heads, self.arguments = heads, arguments
        self.qkv = nn.Linear(heads * head_dim, 3 * heads * head_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        out = functional.scaled_dot_product_attention(q, k, v, **self.arguments)
        return out.transpose(1, 2).flatten(2)


class Blocks(nn.Module):
    """A stack of residual self-attention."""

    def __init__(self, layers: int = 2, **arguments: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SelfAttention(**arguments) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def tokens(batch: int = 2, length: int = 64, channels: int = 32) -> Tensor:
    """A (B, S, C) input."""
    return torch.randn(batch, length, channels)
