"""Queries, keys and values with structure, for benchmarks of methods that drop what matters little.

White noise has no structure: every key matters alike, and every sparse method fails on it alike. A trained video model
looks at its neighbourhood in space and time, at things that look alike wherever they are, and at a few keys that
everybody looks at. These inputs do the same, by construction; nothing is learned or downloaded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """Each (1, H, T * H * W, D) fp32."""

    q: Tensor
    k: Tensor
    v: Tensor


def video_like(grid: tuple[int, int, int], heads: int, dim: int, seed: int = 0) -> Inputs:
    """Inputs over a grid of tokens in raster order.

    Per head, half of the channels are random Fourier features of the token's place, so that q . k falls with distance
    as a Gaussian (Rahimi and Recht 2007; its width is drawn per head, 1.5 to 4 tokens). A quarter are a code of one of
    24 things that lie on the canvas as patches and move, an eighth is noise of each token's own, and the rest an offset
    that all keys share, as trained keys have. v is the sum of a smooth field, the thing's code and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in grid))
    parts = [_head(place, grid, dim, generator) for _ in range(heads)]
    return Inputs(*(torch.stack(tensors)[None].contiguous() for tensors in zip(*parts, strict=True)))


def _head(place: Tensor, grid: tuple[int, int, int], dim: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    near, alike, own = dim // 2, dim // 4, dim // 8
    width = 1.5 + 2.5 * torch.rand(1, generator=generator)
    local = _fourier(place, near, width, generator)
    thing = _things(place, grid, generator)
    codes = torch.nn.functional.normalize(torch.randn(24, alike, generator=generator), dim=-1)
    code = codes[thing]
    rest = dim - near - alike - own
    offset = torch.full((len(place), rest), 2.0)

    def noise(size: int) -> Tensor:
        return torch.randn(len(place), size, generator=generator)

    gain = math.sqrt(dim**0.5)  # q . k * dim ** -0.5 is then about 8 for a token and itself
    q = gain * torch.cat([2.4 * local, 1.2 * code, 0.3 * noise(own), 0 * offset], dim=-1)
    k = gain * torch.cat([2.4 * local, 1.2 * code, 0.3 * noise(own), offset], dim=-1)
    smooth = _fourier(place, dim, 4 * width, generator)
    v = smooth * dim**0.5 + codes.repeat(1, 4)[thing, :dim] + 0.3 * noise(dim)
    return q, k, v


def _fourier(place: Tensor, features: int, width: Tensor, generator: torch.Generator) -> Tensor:
    """(tokens, features) with x . y = exp(-|place x - place y|^2 / 2 width^2) in expectation."""
    frequency = torch.randn(3, features // 2, generator=generator) / width
    phase = place @ frequency
    return torch.cat([phase.cos(), phase.sin()], dim=-1) * (features // 2) ** -0.5


def _things(place: Tensor, grid: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """For every token the nearest of 24 centres that move in straight lines: (tokens,) int64."""
    size = torch.tensor(grid[1:], dtype=torch.float32)
    centre = torch.rand(24, 2, generator=generator) * size
    speed = torch.randn(24, 2, generator=generator) * 0.5
    at = centre + speed * place[:, :1, None].transpose(1, 2)
    return (place[:, None, 1:] - at).square().sum(dim=-1).argmin(dim=-1)


def mass_of_best(inputs: Inputs, fraction: float, rows: int = 256) -> float:
    """Mean softmax mass of the best `fraction` of the keys, over some rows: how sparse the attention is."""
    q, k, _ = inputs
    chosen = torch.linspace(0, q.shape[2] - 1, rows).long()
    weights = (q[:, :, chosen] @ k.mT * q.shape[3] ** -0.5).softmax(dim=-1)
    return float(weights.topk(int(fraction * k.shape[2]), dim=-1).values.sum(dim=-1).mean())
