"""sta: Sliding Tile Attention. Every tile of a video attends to a window of tiles around it; the pattern is fixed.

Any canvas, tile and head_dim: tiles that the border cuts short are padded, and nobody sees the padding.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, ops

from ..blocks.sliding_tiles import check_window, check_windows, fitted, window_density
from ..blocks.tiles import Tiling, tiling_of
from ..call import AttentionCall
from ..capability import Capability
from ..checks import check_qkv, default_scale
from ..errors import ArgumentError
from ..op import define_op
from ..resolve import AUTO, backward_kernel, forward_kernel
from ..schedule import Schedule
from ..spec import TRITON, BackendSpec, Kernel, Param, Provider, Support, later

NAME, OP = "sta", "sliding_tile_attention"

# On CPU, windows of 0.56 of the video run at 1.5 (1,024 tokens) to 2.1 times (16,384) the speed of dense in fp32, those
# of 0.25 at 1.3 times with 512 tokens; padding costs as if it were tokens (measured).
_MOST_WORK = {"cpu": 0.6}


def sliding_tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    text_tokens: int = 0,
    text_first: bool = False,
    tile: Sequence[int] = (6, 8, 8),
    window: Sequence[int] = (3, 3, 3),
    windows: Tensor | None = None,
    text_length: int | None = None,
    tiled: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every tile of a video to a window of tiles around it, and to the text.

    Along an axis of n tiles, tile i sees tiles low ... low + width - 1 with width = min(2 * (window // 2) + 1, n) and
    low = min(max(i - window // 2, 0), n - width): an even window is widened by one, and one at the border slides
    inwards, so that all tiles see equally many. Text queries see all tokens of video and text, video queries all text.

    Args:
        q: (B, Hq, S, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, S, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, S, D).
        grid: (T, H, W) tokens of video, in raster order. S is T * H * W + text_tokens.
        text_tokens: tokens of text in the same sequence.
        text_first: the text comes before the video, not after it.
        tile: (t, h, w) tokens of a tile. The last tile of an axis may be short.
        window: (t, h, w) in tiles; or three numbers per query head, flattened.
        windows: (3,) or (3 * Hq,) whole numbers of any real dtype on q's device, in place of `window`: they change from
            call to call without compiling again. Below 1 counts as 1.
        text_length: valid tokens of text, the first ones; what follows is padding of the prompt that nobody sees. Its
            queries get a row like any other token of text: drop it. None means all.
        tiled: q, k and v are in tile order already, with S = Tiling.padded_tokens, and so are the results. The rows of
            padding are those of queries in their tile; padding of k and v is not read as a key.
        scale: factor on the scores; None means D ** -0.5.
        provider: "triton", "cpu", "reference", or "auto" for the first of these that can serve the call.

    Returns:
        out: (B, Hq, S, D), q's dtype and stride order.
        lse: (B, Hq, S) fp32, natural logarithm of the softmax denominator over the keys a query sees.

    Raises:
        ArgumentError: on wrong shapes, dtypes or strides, or a grid, tile or window that does not fit.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.

    Differentiable in q, k and v through out and lse; no double backward, no forward mode. `window_index` shows the
    pattern. Paper: https://arxiv.org/abs/2502.04507
    """
    result: tuple[Tensor, Tensor] = ops.sparseattn.sliding_tile_attention(
        *(q, k, v),
        grid=grid,
        text_tokens=text_tokens,
        text_first=text_first,
        tile=tile,
        window=window,
        windows=windows,
        text_length=text_length,
        tiled=tiled,
        scale=scale,
        provider=provider,
    )
    return result


class _Plan(NamedTuple):
    """What the kernels are given beside q, k and v."""

    tiling: Tiling
    window: tuple[int, ...] | Tensor
    text_length: int | None
    tiled: bool
    scale: float


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    text_tokens: int = 0,
    text_first: bool = False,
    tile: Sequence[int] = (6, 8, 8),
    window: Sequence[int] = (3, 3, 3),
    windows: Tensor | None = None,
    text_length: int | None = None,
    tiled: bool = False,
    scale: float | None = None,
    provider: str = AUTO,  # noqa: ARG001  (one signature for the op's kernels)
) -> _Plan:
    check_qkv(OP, q, k, v)
    if k.shape[2] != q.shape[2]:
        raise ArgumentError(OP, "k", f"have q's {q.shape[2]} tokens", k.shape[2], "Leave cross-attention dense.")
    check_window(OP, window, q.shape[1])
    if windows is not None:
        check_windows(OP, windows, q)
    if text_length is not None and not 0 <= text_length <= text_tokens:
        raise ArgumentError(OP, "text_length", f"be in 0 ... text_tokens = {text_tokens}", text_length)
    tiling = tiling_of(
        *(OP, q.shape[2]), grid=grid, tile=tile, text_tokens=text_tokens, text_first=text_first, tiled=tiled
    )
    tiling = tiling if tiled else fitted(tiling)
    given = tuple(window) if windows is None else windows
    return _Plan(tiling, given, text_length, tiled, default_scale(scale, q.shape[-1]))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    text_tokens: int = 0,
    text_first: bool = False,
    tile: Sequence[int] = (6, 8, 8),
    window: Sequence[int] = (3, 3, 3),
    windows: Tensor | None = None,
    text_length: int | None = None,
    tiled: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    places: dict[str, Any] = {"grid": grid, "text_tokens": text_tokens, "text_first": text_first, "tile": tile}
    settings: dict[str, Any] = {"window": window, "windows": windows, "text_length": text_length, "tiled": tiled}
    plan = _check(q, k, v, **places, **settings, scale=scale)
    kernel = forward_kernel(NAME, provider, q, k)
    result: tuple[Tensor, Tensor] = kernel(q, k, v, **plan._asdict())
    return result


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    settings = dict(zip(_SETTINGS, given, strict=True))
    plan = _check(q, k, v, **settings)
    kernel = backward_kernel(NAME, settings["provider"], q, k)
    grads: tuple[Tensor, Tensor, Tensor] = kernel(grad_out, grad_lse, out, lse, q, k, v, **plan._asdict())
    return grads


def _through(kernel: str, provider: str) -> Callable[[], Kernel]:
    """A kernel of sliding tiles over a provider of block_sparse_attention."""
    load = later("kernels.sliding_tile", kernel)
    return lambda: functools.partial(load(), provider=provider)


def _windows(call: AttentionCall) -> list[tuple[int, ...]]:
    """The window of the call; of a schedule that of every step."""
    given = cast(tuple[int, ...] | Schedule, call.param("window"))
    steps = given.extremes if isinstance(given, Schedule) else (given,)
    return [tuple(map(int, window)) for window in cast(tuple[tuple[float, ...], ...], steps)]


def _why_not(call: AttentionCall, _capability: Capability) -> list[str]:
    heads = len(_windows(call)[0]) // 3
    return [] if heads in (1, call.heads) else [f"window is given for {heads} heads, the call has {call.heads}"]


def _break_even(call: AttentionCall, capability: Capability) -> str | None:
    if call.layout is None:
        return None
    tiling = fitted(Tiling(call.layout, cast(tuple[int, int, int], call.param("tile"))))
    density = statistics.fmean(window_density(tiling, window) for window in _windows(call))
    work = density * (tiling.padded_tokens / call.layout.tokens) ** 2
    most = _MOST_WORK.get(capability.device, 1.0)
    if work < most:
        return None
    return f"the windows are {work:.0%} of dense attention, padding included; it pays below {most:.0%}"


_op = define_op(
    OP,
    "*, int[] grid, int text_tokens=0, bool text_first=False, int[] tile=[6,8,8], int[] window=[3,3,3], "
    "Tensor? windows=None, int? text_length=None, bool tiled=False, float? scale=None, str provider='auto'",
    forward=_forward,
    backward=_backward,
    check=_check,
)
_SETTINGS = [argument.name for argument in _op._schema.arguments[3:]]

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="sparse",
    summary="Sliding Tile Attention: 3-D windows of tiles, per head; training-free",
    paper="https://arxiv.org/abs/2502.04507",
    params=(
        Param("tile", (6, 8, 8), "Tokens of a tile: time, height, width.", low=1),
        Param("window", (3, 3, 3), "Tiles of a window: time, height, width.", low=1, repeats=True, tensor="windows"),
        Param("text_length", None, "Valid tokens of text; what follows is padding.", low=0, kind=int),
    ),
    support=Support(layout=True, causal=False, cross=False),
    why_not=_why_not,
    break_even=_break_even,
    # On structured inputs: 0.05 with windows of 0.56 of 2,048 tokens, 0.36 with 0.39 of 16,384, 0.56 with 0.11.
    tolerance={"float32": 0.4, "bfloat16": 0.4, "float16": 0.4},
    providers=(
        Provider(
            "triton",
            "tiling in PyTorch, attention in the pointer kernel for sm_80 and newer",
            load=_through("attention", "triton"),
            load_backward=_through("attention_backward", "triton"),
            support=TRITON,
        ),
        Provider(
            "cpu",
            "tiling in PyTorch, then the block-sparse CPU kernel",
            load=_through("attention", "cpu"),
            load_backward=_through("attention_backward", "cpu"),
            support=Support(devices=("cpu",)),
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.sta", "sliding_tile_attention"),
            load_backward=later("reference.sta", "sliding_tile_attention_backward"),
        ),
    ),
)
