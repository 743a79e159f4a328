"""vsa: Video Sparse Attention. Every tile of a video attends to its best tiles, and to means of all of them by a gate.

Tokens come and go in raster order: the op tiles them itself. Without a gate it is training-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..blocks.tile_selection import TilePlan, check_sparsity
from ..blocks.tiles import Tiling, tiling_of
from ..call import AttentionCall
from ..capability import Capability
from ..checks import check_qkv, default_scale
from ..errors import ArgumentError
from ..op import define_op
from ..param import numbers
from ..resolve import AUTO, backward_kernel, forward_kernel
from ..spec import TRITON, BackendSpec, Kernel, Param, Provider, Support, later
from ..vendors import fastvideo_kernel

NAME, OP = "vsa", "video_sparse_attention"
TILE = (4, 4, 4)
_FASTVIDEO_BLOCK = 64

# Speed against dense on CPU, 4 heads of 64 or 128 channels, quiet or beside other jobs, by the share of its
# products that is left, padding counted: 0.6 to 2.4 at 250 to 512 tokens with up to 0.4; from 980 tokens on, 1.1 or
# more with up to 0.5, 0.9 to 1.6 with 0.63, 0.6 to 1.0 with 1.05 (measured).
_LEAST_SEQ, _MOST_LEFT = 980, 0.5


def video_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    sparsities: Tensor | None = None,
    *,
    grid: Sequence[int],
    text_tokens: int = 0,
    text_first: bool = False,
    tile: Sequence[int] = TILE,
    kv_grid: Sequence[int] | None = None,
    tiled: bool = False,
    sparsity: float = 0.9,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every tile of tokens to its best tiles, plus a gate times attention to the means of tiles.

    The video is cut into tiles of t x h x w tokens, shorter at the border; m(.) is the mean over the tokens of a tile.
    s = scale * m(q) . m(k) in fp32 is the score of two tiles. The max(1, min(ceil((1 - sparsity) * n), n)) of the n
    tiles with the highest s are kept, the lower number first among equals, and out = softmax attention to their tokens.
    With a gate, gate * (softmax(s) @ m(v)) is added, the same for all tokens of a tile but for the gate. VSA's own code
    adds that part ungated if there is no gate: give a gate of ones for it. Tiles of text are always kept, attend to
    everything, and do not count in n.

    Args:
        q: (B, Hq, S, D) fp32, fp16 or bf16; raster order, time slowest; any strides with unit stride on D.
        k: (B, Hkv, Sk, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        gate: q's shape and dtype, any values; None is a gate of 0, and training-free.
        sparsities: () or (Hq,) floating point on q's device, in place of `sparsity` and rounded to six decimals: a
            schedule or a calibration changes them without compiling again.
        grid: (T, H, W) of the queries, in tokens; T * H * W + text_tokens = S.
        text_tokens: tokens of text among the queries, and among the keys.
        text_first: the text comes before the video.
        tile: (t, h, w), in tokens.
        kv_grid: (T, H, W) of the keys; None means that of the queries.
        tiled: the tensors come and go in tile order, `Tiling.to_tiles`, whatever its padding holds; the padding of
            out is 0, that of lse -inf.
        sparsity: fraction of the video tiles to leave out, 0 ... 1; 0 is dense attention.
        scale: factor on the scores; None means D ** -0.5.
        provider: "triton", "cpu", "fastvideo_kernel", "reference", or "auto": the first of these that can serve it.

    Returns:
        out: (B, Hq, S, D), q's dtype and stride order.
        lse: (B, Hq, S) fp32, natural logarithm of the softmax denominator over the kept tiles.

    Raises:
        ArgumentError: on wrong shapes, dtypes or strides, or a grid that does not make the tokens.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.

    Differentiable in q, k, v and gate through out and lse; the selection carries no gradient. No double backward, no
    forward mode.

    Paper: https://arxiv.org/abs/2505.13389
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.video_sparse_attention(
        *(q, k, v, gate, sparsities),
        grid=grid,
        text_tokens=text_tokens,
        text_first=text_first,
        tile=tile,
        kv_grid=kv_grid,
        tiled=tiled,
        sparsity=sparsity,
        scale=scale,
        provider=provider,
    )
    return result


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    sparsities: Tensor | None = None,
    *,
    grid: Sequence[int],
    text_tokens: int = 0,
    text_first: bool = False,
    tile: Sequence[int] = TILE,
    kv_grid: Sequence[int] | None = None,
    tiled: bool = False,
    sparsity: float = 0.9,
    scale: float | None = None,
    provider: str = AUTO,  # noqa: ARG001  (one signature for the op's kernels)
) -> TilePlan:
    check_qkv(OP, q, k, v)
    if gate is not None and (gate.shape, gate.dtype, gate.device) != (q.shape, q.dtype, q.device):
        raise ArgumentError(OP, "gate", "be like q", f"{gate.dtype} {tuple(gate.shape)} on {gate.device}")
    check_sparsity(OP, q, sparsity, sparsities)
    tiling = partial(tiling_of, OP, tile=tile, text_tokens=text_tokens, text_first=text_first, tiled=tiled)
    queries = tiling(q.shape[2], grid=grid)
    keys = tiling(k.shape[2], grid=kv_grid or grid, name="kv_grid")
    return TilePlan(queries, keys, tiled, sparsity, default_scale(scale, q.shape[-1]))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    sparsities: Tensor | None = None,
    *,
    grid: Sequence[int],
    text_tokens: int = 0,
    text_first: bool = False,
    tile: Sequence[int] = TILE,
    kv_grid: Sequence[int] | None = None,
    tiled: bool = False,
    sparsity: float = 0.9,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    text: dict[str, Any] = {"text_tokens": text_tokens, "text_first": text_first}
    sizes: dict[str, Any] = {"grid": grid, "kv_grid": kv_grid, "tile": tile, "tiled": tiled}
    plan = _check(q, k, v, gate, sparsities, **sizes, **text, sparsity=sparsity, scale=scale)
    kernel = forward_kernel(NAME, provider, q, k, scale=scale, tile=plan.queries.tile)
    result: tuple[Tensor, Tensor] = kernel(q, k, v, gate, sparsities, plan=plan)
    return result


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, settings = given[:5], dict(zip(_SETTINGS, given[5:], strict=True))
    plan = _check(*tensors, **settings)
    kernel = backward_kernel(NAME, settings["provider"], *tensors[:2])
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = kernel(grad_out, grad_lse, out, lse, *tensors, plan=plan)
    return grads


def _through(provider: str, function: str, **options: int) -> Callable[[], Kernel]:
    """A function of the composed kernel, with a provider of block_sparse_attention."""
    load = later("kernels.video_sparse", function)
    return lambda: partial(load(), provider=provider, **options)


def _fastvideo_why_not(call: AttentionCall, capability: Capability) -> list[str]:
    reasons = fastvideo_kernel.PROVIDER.why_not(call, capability)
    tile = call.param("tile")
    if isinstance(tile, tuple) and (volume := math.prod(tile)) % _FASTVIDEO_BLOCK:
        reasons.append(f"tiles of {volume} tokens, its kernel takes multiples of {_FASTVIDEO_BLOCK}")
    return reasons


def _break_even(call: AttentionCall, capability: Capability) -> str | None:
    if capability.device != "cpu" or call.layout is None:
        return None
    tile = cast(tuple[int, int, int], call.param("tile"))
    left = (1 - max(numbers(call.param("sparsity")))) * Tiling(call.layout, tile).padded_tokens / call.layout.tokens
    if left <= _MOST_LEFT and call.seq_k >= _LEAST_SEQ:
        return None
    pays = f"pays from {_LEAST_SEQ} tokens with at most {_MOST_LEFT:.0%}"
    return f"{call.seq_k} tokens, {left:.0%} of the products left with padding: on CPU it {pays} (measured)"


_op = define_op(
    OP,
    "Tensor? gate=None, Tensor? sparsities=None, *, int[] grid, int text_tokens=0, bool text_first=False, "
    "int[] tile=[4,4,4], int[]? kv_grid=None, bool tiled=False, float sparsity=0.9, float? scale=None, "
    "str provider='auto'",
    forward=_forward,
    backward=_backward,
    check=_check,
    differentiable=("gate",),
)
_SETTINGS = [argument.name for argument in _op._schema.arguments if argument.kwarg_only]

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="sparse",
    summary="the 3-D tiles with the highest mean score, chosen at every call; trains with a gate",
    paper="https://arxiv.org/abs/2505.13389",
    params=(
        Param("sparsity", 0.9, "Fraction of the video tiles to leave out.", low=0.0, high=1.0, tensor="sparsities"),
        Param("tile", TILE, "(t, h, w) of a tile, in tokens.", low=1),
    ),
    attached=("gate",),
    support=Support(causal=False, cross=False, layout=True),
    break_even=_break_even,
    # The median over the attention layers of examples/tiny_video at the default sparsity; the worst is 0.79.
    tolerance={"typical": 0.32},
    providers=(
        Provider(
            "triton",
            "tiling in PyTorch, selection and attention in Triton kernels for sm_80 and newer",
            load=_through("triton", "attention"),
            load_backward=_through("triton", "attention_backward"),
            support=TRITON,
        ),
        Provider(
            "cpu",
            "tiling and selection in PyTorch, attention by block_sparse_attention's CPU kernel",
            load=_through("cpu", "attention"),
            load_backward=_through("cpu", "attention_backward"),
            support=Support(devices=("cpu",)),
        ),
        Provider(
            fastvideo_kernel.PROVIDER.name,
            "tiling and selection as with triton, attention in VSA's Hopper kernel, the package fastvideo-kernel",
            load=_through(fastvideo_kernel.PROVIDER.name, "attention", block=_FASTVIDEO_BLOCK),
            support=fastvideo_kernel.PROVIDER.support,
            why_not=_fastvideo_why_not,
            install=fastvideo_kernel.PROVIDER.install,
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.vsa", "video_sparse_attention"),
            load_backward=later("reference.vsa", "video_sparse_attention_backward"),
        ),
    ),
)
