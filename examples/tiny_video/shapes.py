"""Synthetic clips: one to three coloured shapes that move and bounce on a dark canvas, with a caption.

A caption names each shape's kind, colour and size, never its place or speed, so the model must agree with itself across
space and time: its attention has real structure. Everything is made here, from a seed; nothing is downloaded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CANVAS = 64
"""Height and width of a frame, in pixels."""
MAX_SHAPES = 3
CAPTION_DIM = 16
"""Channels of one caption token: kind (3, one-hot), colour (3), radius (1), present (1), zeros."""

_PALETTE = torch.tensor(
    [[1.0, 0.25, 0.2], [0.2, 0.85, 0.35], [0.25, 0.5, 1.0], [1.0, 0.85, 0.2], [0.95, 0.4, 0.9], [0.3, 0.9, 0.95]]
)
_TOP, _BOTTOM = torch.tensor([0.05, 0.05, 0.12]), torch.tensor([0.12, 0.10, 0.22])


def sample_clips(count: int, frames: int, generator: torch.Generator, most: int = MAX_SHAPES) -> tuple[Tensor, Tensor]:
    """Draw clips of one to `most` shapes and their captions.

    Returns:
        video: (count, 3, frames, CANVAS, CANVAS) fp32 in [-1, 1].
        caption: (count, MAX_SHAPES, CAPTION_DIM) fp32.
    """
    caption, kind, colour, radius, present = _sample_captions(count, generator, most)
    centre = _trajectories(count, frames, radius, generator)
    video = _background().expand(count, 3, frames, CANVAS, CANVAS)
    for shape in range(MAX_SHAPES):
        alpha = _coverage(kind[:, shape], centre[:, shape], radius[:, shape])
        alpha = (alpha * present[:, shape, None, None, None]).unsqueeze(1)
        video = torch.lerp(video, colour[:, shape, :, None, None, None], alpha)
    return video * 2 - 1, caption


def sample_captions(count: int, generator: torch.Generator, most: int = MAX_SHAPES) -> Tensor:
    """Draw captions alone: (count, MAX_SHAPES, CAPTION_DIM) fp32."""
    return _sample_captions(count, generator, most)[0]


def _sample_captions(count: int, generator: torch.Generator, most: int) -> tuple[Tensor, ...]:
    kind = torch.randint(0, 3, (count, MAX_SHAPES), generator=generator)
    tint = torch.rand(count, len(_PALETTE), generator=generator).argsort(dim=1)[:, :MAX_SHAPES]
    colour = _PALETTE[tint]
    radius = 7.0 + 5.0 * torch.rand(count, MAX_SHAPES, generator=generator)
    shapes = torch.randint(1, most + 1, (count, 1), generator=generator)
    present = (torch.arange(MAX_SHAPES) < shapes).float()
    one_hot = torch.nn.functional.one_hot(kind, 3).float()
    features = torch.cat([one_hot, colour, radius.unsqueeze(-1) / 12, torch.ones(count, MAX_SHAPES, 1)], dim=-1)
    caption = torch.nn.functional.pad(features * present.unsqueeze(-1), (0, CAPTION_DIM - features.shape[-1]))
    return caption, kind, colour, radius, present


def _trajectories(count: int, frames: int, radius: Tensor, generator: torch.Generator) -> Tensor:
    """Centres (count, MAX_SHAPES, frames, 2): straight lines folded at the walls."""
    angle = 2 * math.pi * torch.rand(count, MAX_SHAPES, generator=generator)
    speed = 1.5 + 2.0 * torch.rand(count, MAX_SHAPES, generator=generator)
    velocity = speed.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], dim=-1)
    room = (CANVAS - 2 * radius)[..., None, None]
    start = torch.rand(count, MAX_SHAPES, 1, 2, generator=generator) * room
    time = torch.arange(frames, dtype=torch.float32)[:, None]
    phase = (start + velocity.unsqueeze(2) * time).remainder(2 * room)
    return radius[..., None, None] + torch.minimum(phase, 2 * room - phase)


def _coverage(kind: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Anti-aliased coverage (count, frames, CANVAS, CANVAS) of one shape, from its signed distance in pixels."""
    axis = torch.arange(CANVAS, dtype=torch.float32) + 0.5
    dy = axis[:, None] - centre[..., 0, None, None]
    dx = axis[None, :] - centre[..., 1, None, None]
    r = radius[:, None, None, None]
    disc = (dx.square() + dy.square()).sqrt() - r
    square = torch.maximum(dx.abs(), dy.abs()) - 0.85 * r
    triangle = torch.maximum(dy - 0.6 * r, dx.abs() * 0.866 - dy * 0.5 - 0.5 * r)
    distance = torch.stack([disc, square, triangle])[kind, torch.arange(len(kind))]
    return (0.5 - distance).clamp(0, 1)


def _background() -> Tensor:
    fade = torch.linspace(0, 1, CANVAS)[None, None, :, None]
    return torch.lerp(_TOP[:, None, None, None], _BOTTOM[:, None, None, None], fade).unsqueeze(0)
