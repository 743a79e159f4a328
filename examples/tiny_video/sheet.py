"""A contact sheet: frames of several clips, one row each."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_FRAMES, _ZOOM, _CHARACTER = 8, 2, 6


def contact_sheet(clips: dict[str, Tensor]) -> Image.Image:
    """Frames of each named clip, (1, 3, T, H, W) in [-1, 1], at even distances in time."""
    rows, length = [], next(iter(clips.values())).shape[2]
    shown = torch.linspace(0, length - 1, min(_FRAMES, length)).long()
    for clip in clips.values():
        frames = clip[0].clamp(-1, 1).add(1).mul(127.5).byte()
        tile = torch.nn.functional.pad(frames[:, shown], (1, 1, 1, 1), value=60)
        rows.append(tile.permute(2, 1, 3, 0).flatten(1, 2))
    picture = torch.cat(rows).repeat_interleave(_ZOOM, dim=0).repeat_interleave(_ZOOM, dim=1)
    margin = 24 + _CHARACTER * max(map(len, clips))
    sheet = Image.new("RGB", (picture.shape[1] + margin, picture.shape[0]), "white")
    sheet.paste(Image.fromarray(picture.numpy()), (margin, 0))
    for row, name in enumerate(clips):
        ImageDraw.Draw(sheet).text((8, (row + 0.5) * picture.shape[0] / len(clips) - 6), name, fill="black")
    return sheet
