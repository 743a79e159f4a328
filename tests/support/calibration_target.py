"""What `sparseattn calibrate` is pointed at in the tests: small models, and functions that return them with samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sparseattn

HEADS, DIM, SEQ = 2, 16, 128


class Attention(nn.Module):
    """Self-attention of smooth tokens, one head flat and one sharp."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.sharpness = torch.tensor([0.1, 4.0]).view(1, HEADS, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q * self.sharpness, k, v)
        return x + out.transpose(1, 2).flatten(2)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention(), Attention()).eval()


def tokens(seed: int) -> Tensor:
    noise = torch.randn(1, SEQ, HEADS * DIM, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(dim=1) / 8


def one() -> tuple[nn.Module, Any]:
    return model(), (tokens(0),)


def keywords() -> tuple[nn.Module, Any]:
    return model(), {"input": tokens(0)}


def several() -> tuple[nn.Module, Any]:
    return model(), [(tokens(0),), {"input": tokens(1)}, sparseattn.Sample((tokens(2),))]


def steps() -> tuple[nn.Module, Any]:
    return model(), [sparseattn.Sample((tokens(step),), step=step) for step in range(4)]


def four() -> tuple[nn.Module, Any]:
    return model(), [(tokens(seed),) for seed in range(4)]


def endless() -> tuple[nn.Module, Any]:
    return model(), [(tokens(0),)] * 5_000


def none() -> tuple[nn.Module, Any]:
    return model(), []


def tensors() -> tuple[nn.Module, Any]:
    return model(), [tokens(0)]


def without_attention() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 4), (torch.randn(2, 4),)


def breaking() -> tuple[nn.Module, Any]:
    return model(), [(tokens(0),), (tokens(1)[..., :3],)]
