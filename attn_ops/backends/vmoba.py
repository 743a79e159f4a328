"""vmoba: Video Mixture of Block Attention. Every query attends to its own chunk of a video and to those it scores best.

The selection is per query, not per block of queries, and carries no gradient: the backward chooses again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, ops

from ..blocks.chunk_choice import GROUPS, NO_TOPK_OF_BLOCKS, SELECT, ChunkPlan, ChunkRule, chunk_tiling
from ..call import AttentionCall
from ..capability import Capability
from ..checks import check_qkv, default_scale
from ..errors import ArgumentError
from ..op import define_op
from ..resolve import AUTO, backward_kernel, forward_kernel
from ..spec import TRITON, BackendSpec, Param, Provider, Support, later

NAME, OP = "vmoba", "vmoba_attention"

# On CPU in fp32, a quarter of the chunks of 2,048 tokens: 1.1 to 1.5 times the speed of dense for chunks of 64, 1.7 to
# 2.0 of 128, 0.7 to 0.9 of 32; at 1,024 tokens 0.8 to 1.0. A threshold of 0.25 is much the same (measured).
_LEAST_SEQ, _LEAST_CHUNK, _MOST_SHARE = 2048, 64, 0.25


def vmoba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    text_tokens: int = 0,
    text_first: bool = False,
    chunk: Sequence[int] = (2, 0, 0),
    chunk_tokens: int = 0,
    select: str = "topk",
    topk: int = 3,
    threshold: float = 0.25,
    threshold_type: str = "query_head",
    compat: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query to its own chunk and to the chunks with the best gate, q . mean(k of the chunk).

    The published cycle of layers is chunk=(2, 0, 0), (0, 3, 4), (4, 6, 4): temporal, spatial, both; `vmoba_rules`
    writes it as rules of a policy. The last chunk of an axis may be short.

    With select="topk", a group of gates keeps its `topk` best per query, the own chunks first. With "threshold", the
    gates of a group are scaled to 0 ... 1, and the best are kept until, with the own chunks, they hold `threshold` of
    the sum; at least one beside the own is. Among equals the lower number comes first.

    Args:
        q: (B, Hq, S, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, S, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv) and chooses its own chunks.
        v: (B, Hkv, S, D).
        grid: (T, H, W) tokens, in raster order; S is T * H * W.
        text_tokens, text_first: text is refused, for it has no place in the grid, and so no own chunk.
        chunk: (t, h, w) tokens of a chunk; 0 means the whole axis.
        chunk_tokens: if not 0, cut the raster order into chunks of this many tokens instead, whatever `chunk` says. A
            temporal chunk of c frames, c not whole, is int(c * H * W) tokens.
        select: "topk" or "threshold".
        topk: chunks per query, the own one included, at least 1.
        threshold: share of the sum of scaled gates to reach, 0 ... 1; 1 is dense attention.
        threshold_type: the gates that compete, for both ways to select: "query_head", those of one query and head;
            "block" those of one chunk (not with "topk"); "head_global", of one head; "overall", all of one video.
        compat: do as the published code where it differs, for models trained with it: topk=1 is dense attention; in
            "overall" and "head_global" the videos of a batch compete; a threshold out of reach, as where all gates are
            equal, takes two entries of a group, not all. Not copied: "head_global" asked for more chunks than a video
            has attends to other videos there.
        scale: factor on the scores, not on the gates; None means D ** -0.5.
        provider: "triton", "cpu", "reference", or "auto" for the first of these that can serve the call.

    Returns:
        out: (B, Hq, S, D), q's dtype and stride order.
        lse: (B, Hq, S) fp32, natural logarithm of the softmax denominator over the chosen chunks.

    Raises:
        ArgumentError: on wrong shapes, dtypes or strides, or a grid, chunk or way to select that does not fit.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.

    Differentiable in q, k and v through out and lse; the selection carries no gradient. No double backward, no forward
    mode.

    Paper: https://arxiv.org/abs/2506.23858
    """
    result: tuple[Tensor, Tensor] = ops.sparseattn.vmoba_attention(
        *(q, k, v),
        grid=grid,
        text_tokens=text_tokens,
        text_first=text_first,
        chunk=chunk,
        chunk_tokens=chunk_tokens,
        select=select,
        topk=topk,
        threshold=threshold,
        threshold_type=threshold_type,
        compat=compat,
        scale=scale,
        provider=provider,
    )
    return result


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    text_tokens: int = 0,
    text_first: bool = False,  # noqa: ARG001  (one signature for the op's kernels)
    chunk: Sequence[int] = (2, 0, 0),
    chunk_tokens: int = 0,
    select: str = "topk",
    topk: int = 3,
    threshold: float = 0.25,
    threshold_type: str = "query_head",
    compat: bool = False,
    scale: float | None = None,
    provider: str = AUTO,  # noqa: ARG001
) -> ChunkPlan:
    check_qkv(OP, q, k, v)
    if k.shape[2] != q.shape[2]:
        raise ArgumentError(OP, "k", f"have q's {q.shape[2]} tokens", k.shape[2], "Leave cross-attention dense.")
    if text_tokens != 0:
        raise ArgumentError(OP, "text_tokens", "be 0", text_tokens, "Use sta or vsa, or leave joint attention dense.")
    tiling = chunk_tiling(OP, q.shape[2], grid=grid, chunk=chunk, chunk_tokens=chunk_tokens)
    rule = ChunkRule(select, topk, threshold, threshold_type, compat)
    rule.check(OP)
    return ChunkPlan(tiling, rule, default_scale(scale, q.shape[-1]))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    text_tokens: int = 0,
    text_first: bool = False,  # noqa: ARG001
    chunk: Sequence[int] = (2, 0, 0),
    chunk_tokens: int = 0,
    select: str = "topk",
    topk: int = 3,
    threshold: float = 0.25,
    threshold_type: str = "query_head",
    compat: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    chunks: dict[str, Any] = {"grid": grid, "text_tokens": text_tokens, "chunk": chunk, "chunk_tokens": chunk_tokens}
    choice: dict[str, Any] = {"select": select, "threshold_type": threshold_type, "compat": compat}
    plan = _check(q, k, v, **chunks, **choice, topk=topk, threshold=threshold, scale=scale)
    kernel = forward_kernel(NAME, provider, q, k, **choice)
    result: tuple[Tensor, Tensor] = kernel(q, k, v, **plan._asdict())
    return result


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    settings = dict(zip(_SETTINGS, given, strict=True))
    plan = _check(q, k, v, **settings)
    choice = {name: settings[name] for name in ("select", "threshold_type", "compat")}
    kernel = backward_kernel(NAME, settings["provider"], q, k, **choice)
    grads: tuple[Tensor, Tensor, Tensor] = kernel(grad_out, grad_lse, out, lse, q, k, v, **plan._asdict())
    return grads


def _why_not(call: AttentionCall, _capability: Capability) -> list[str]:
    text = call.layout.text_tokens if call.layout else 0
    reasons = [f"{text} text tokens share the sequence, and they have no chunk of their own"] if text else []
    if (call.param("select"), call.param("threshold_type")) == ("topk", "block"):
        reasons.append(f'threshold_type "block" with select "topk". {NO_TOPK_OF_BLOCKS}')
    return reasons


def _break_even(call: AttentionCall, capability: Capability) -> str | None:
    if capability.device != "cpu" or call.layout is None:
        return None
    chunks: dict[str, Any] = {name: call.param(name) for name in ("chunk", "chunk_tokens")}
    tiling = chunk_tiling(OP, call.layout.video_tokens, grid=call.layout.grid, **chunks)
    share = cast(int, call.param("topk")) / tiling.tiles if call.param("select") == "topk" else 0.0
    if call.seq_k >= _LEAST_SEQ and tiling.volume >= _LEAST_CHUNK and share <= _MOST_SHARE:
        return None
    pays = f"on CPU it pays up to {_MOST_SHARE:.0%} of chunks of {_LEAST_CHUNK} tokens, from {_LEAST_SEQ} on (measured)"
    return f"{share:.0%} of chunks of {tiling.volume} at {call.seq_k} tokens: {pays}"


def _why_not_rows(call: AttentionCall, _capability: Capability) -> list[str]:
    if (call.param("select"), call.param("threshold_type")) == ("topk", "query_head"):
        return []
    return ['needs a fixed number of chunks per query: select "topk" with threshold_type "query_head"']


_op = define_op(
    OP,
    "*, int[] grid, int text_tokens=0, bool text_first=False, int[] chunk=[2,0,0], int chunk_tokens=0, "
    "str select='topk', int topk=3, float threshold=0.25, str threshold_type='query_head', bool compat=False, "
    "float? scale=None, str provider='auto'",
    forward=_forward,
    backward=_backward,
    check=_check,
)
_SETTINGS = [argument.name for argument in _op._schema.arguments[3:]]

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="sparse",
    summary="VMoBA: every query chooses its chunks of space and time; training-free",
    paper="https://arxiv.org/abs/2506.23858",
    params=(
        Param("chunk", (2, 0, 0), "Tokens of a chunk: time, height, width; 0 is the whole axis.", low=0),
        Param("chunk_tokens", 0, "If not 0: tokens of a chunk of the raster order, instead of chunk.", low=0),
        Param("select", "topk", "How chunks are chosen.", choices=SELECT),
        Param("topk", 3, "Chunks per query, its own included.", low=1),
        Param("threshold", 0.25, "Share of the sum of scaled gates to reach.", low=0.0, high=1.0),
        Param("threshold_type", "query_head", "The gates that compete.", choices=tuple(GROUPS)),
        Param("compat", False, "Do as the published code where it differs."),
    ),
    support=Support(layout=True, causal=False, cross=False),
    why_not=_why_not,
    break_even=_break_even,
    # On inputs of benchmarks/harness: 0.12 with 3 of 16 chunks of 2,048 tokens, 0.31 with 6 of 64 of 16,384.
    tolerance={"float32": 0.3, "bfloat16": 0.3, "float16": 0.3},
    providers=(
        Provider(
            "triton",
            "queries regrouped by chunk in PyTorch, attention in the pointer kernel for sm_80 and newer",
            load=lambda: partial(later("kernels.chunk_rows", "attention")(), provider="triton"),
            load_backward=lambda: partial(later("kernels.chunk_rows", "attention_backward")(), provider="triton"),
            support=TRITON,
            why_not=_why_not_rows,
        ),
        Provider(
            "cpu",
            "selection in PyTorch, then PyTorch's CPU flash kernel chunk by chunk",
            load=later("kernels.cpu.vmoba", "attention"),
            load_backward=later("kernels.cpu.vmoba", "attention_backward"),
            support=Support(devices=("cpu",)),
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.vmoba", "vmoba_attention"),
            load_backward=later("reference.vmoba", "vmoba_attention_backward"),
        ),
    ),
)
