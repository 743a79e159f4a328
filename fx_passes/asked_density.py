"""Which share of its scores a sparse backend computes, as far as its parameters say it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import cast

from ..attn_ops.blocks.sliding_tiles import window_index
from ..attn_ops.call import ParamValue
from ..attn_ops.param import numbers
from ..attn_ops.video_layout import VideoLayout

_UNKNOWN = (math.nan,)


def asked_density(params: Mapping[str, ParamValue], layout: VideoLayout | None) -> tuple[float, ...]:
    """The share of the scores that is computed.

    Args:
        params: all parameters of a sparse backend, those that differ by step at one step.
        layout: where the video lies, if that is known: sliding tiles are shares of it.

    Returns:
        A share for each head, or one for all; NaN where the data decide it, or the layout does.
    """
    if "window" in params:
        return _of_windows(params, layout)
    if params.get("mass") is not None or max(numbers(params.get("similarity", -1.0))) > 0:
        return _UNKNOWN  # the data decides
    if "keep_ratio" in params:
        return cast(tuple[float, ...], numbers(params["keep_ratio"]))
    if "sparsity" in params:
        return tuple(1.0 - share for share in numbers(params["sparsity"]))
    return _UNKNOWN


def _of_windows(params: Mapping[str, ParamValue], layout: VideoLayout | None) -> tuple[float, ...]:
    """Those of sliding tiles, three numbers for each head or for all; they are shares of a video that must be known."""
    if layout is None:
        return _UNKNOWN
    window, tile = (tuple(map(int, numbers(params[name]))) for name in ("window", "tile"))
    return tuple(_window_density(layout, tile, window[at : at + 3]) for at in range(0, len(window), 3))


@functools.lru_cache(maxsize=1024)
def _window_density(layout: VideoLayout, tile: tuple[int, ...], window: tuple[int, ...]) -> float:
    return window_index(layout, tile, window).density
