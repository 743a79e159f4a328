"""block_topk: attention to the key blocks whose mean scores highest. Training-free, for long self-attention.

The selection carries no gradient: the backward chooses the same blocks again and differentiates attention to them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..blocks.pooled import choose_blocks
from ..call import AttentionCall
from ..capability import Capability
from ..checks import check_per_head, check_qkv, default_scale
from ..errors import ArgumentError
from ..op import define_op
from ..resolve import AUTO, backward_kernel, forward_kernel
from ..spec import TRITON, BackendSpec, Kernel, Param, Provider, Support, later

NAME, OP = "block_topk", "block_topk_attention"
BLOCKS = (16, 32, 64, 128)

Ratio = float | Tensor

# At the default keep_ratio on CPU, 4 heads of 64 or 128 channels, blocks gathered: 0.8 to 1.2 times the speed of dense
# at 256 tokens, 1.4 to 1.8 at 512; causal 0.8 to 1.5 at 512, 1.5 to 1.9 at 1024 (measured). The native kernel pays
# earlier, but where there is no compiler there is none.
_LEAST_SEQ, _LEAST_SEQ_CAUSAL = 512, 1024


def block_topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep_ratio: float = 0.25,
    block_q: int = 64,
    block_k: int = 64,
    keep_ratios: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every block of queries to its best key blocks, by mean(q block) . mean(k block) in fp32.

    Of n candidate blocks, max(1, int(keep_ratio * n + 0.5)) are kept, the lower number first among equals. With
    `causal`, the candidates of a block of queries are those not wholly in its future, and the blocks that hold its own
    tokens are always kept. keep_ratio=1 is dense attention.

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, Sk, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv) and chooses its own blocks.
        v: (B, Hkv, Sk, D).
        keep_ratio: fraction of the candidate blocks to keep, 0 ... 1.
        block_q: tokens per block of queries, at least 1; the last block may be short.
        block_k: tokens per block of keys, likewise.
        keep_ratios: () or (Hq,) fp32 on q's device, used instead of keep_ratio and rounded to six decimals: a new value
            compiles nothing again.
        causal: query i sees keys 0 ... i, aligned top-left.
        scale: factor on the scores; None means D ** -0.5.
        provider: "triton", "cpu", "reference", or "auto" for the first of these that can serve the call.

    Returns:
        out: (B, Hq, Sq, D), q's dtype and stride order.
        lse: (B, Hq, Sq) fp32, natural logarithm of the softmax denominator over the kept blocks.

    Raises:
        ArgumentError: on wrong shapes, dtypes or strides, or a keep_ratio outside 0 ... 1.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.

    Differentiable in q, k and v through out and lse; the selection carries no gradient. No double backward, no forward
    mode.
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.block_topk_attention(
        *(q, k, v),
        keep_ratio=keep_ratio,
        block_q=block_q,
        block_k=block_k,
        keep_ratios=keep_ratios,
        causal=causal,
        scale=scale,
        provider=provider,
    )
    return result


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep_ratio: float = 0.25,
    block_q: int = 64,
    block_k: int = 64,
    keep_ratios: Tensor | None = None,
    causal: bool = False,  # noqa: ARG001  (one signature for the op's kernels)
    scale: float | None = None,  # noqa: ARG001
    provider: str = AUTO,  # noqa: ARG001
) -> None:
    check_qkv(OP, q, k, v)
    if not 0.0 <= keep_ratio <= 1.0:
        raise ArgumentError(OP, "keep_ratio", "be in 0 ... 1", keep_ratio)
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1:
            raise ArgumentError(OP, name, "be at least 1", block)
    if keep_ratios is not None:
        check_per_head(OP, "keep_ratios", keep_ratios, q)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep_ratio: float = 0.25,
    block_q: int = 64,
    block_k: int = 64,
    keep_ratios: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, keep_ratio=keep_ratio, block_q=block_q, block_k=block_k, keep_ratios=keep_ratios)
    scale = default_scale(scale, q.shape[-1])
    kernel = forward_kernel(NAME, provider, q, k, causal=causal)
    ratio = keep_ratio if keep_ratios is None else keep_ratios
    result: tuple[Tensor, Tensor] = kernel(
        q, k, v, keep_ratio=ratio, block_q=block_q, block_k=block_k, causal=causal, scale=scale
    )
    return result


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep_ratio: float,
    block_q: int,
    block_k: int,
    keep_ratios: Tensor | None,
    causal: bool,
    scale: float | None,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = backward_kernel(NAME, provider, q, k, causal=causal)
    grads: tuple[Tensor, Tensor, Tensor] = kernel(
        *(grad_out, grad_lse, out, lse, q, k, v),
        keep_ratio=keep_ratio if keep_ratios is None else keep_ratios,
        block_q=block_q,
        block_k=block_k,
        causal=causal,
        scale=default_scale(scale, q.shape[-1]),
    )
    return grads


def _through(provider: str) -> Callable[[], Kernel]:
    """The selection above, then a provider of block_sparse_attention."""

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, *, keep_ratio: Ratio, block_q: int, block_k: int, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        lists = choose_blocks(q, k, keep_ratio=keep_ratio, block_q=block_q, block_k=block_k, causal=causal)
        result: tuple[Tensor, Tensor] = torch.ops.sparseattn.block_sparse_attention(
            q, k, v, *lists, block_q=block_q, block_k=block_k, causal=causal, scale=scale, provider=provider
        )
        return result

    return lambda: kernel


def _backward_through(provider: str) -> Callable[[], Kernel]:
    def kernel(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        keep_ratio: Ratio,
        block_q: int,
        block_k: int,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lists = choose_blocks(q, k, keep_ratio=keep_ratio, block_q=block_q, block_k=block_k, causal=causal)
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.sparseattn.block_sparse_attention_backward(
            grad_out, grad_lse, out, lse, q, k, v, *lists, None, block_q, block_k, causal, scale, provider
        )
        return grads

    return lambda: kernel


def _break_even(call: AttentionCall, capability: Capability) -> str | None:
    least = _LEAST_SEQ_CAUSAL if call.causal else _LEAST_SEQ
    if capability.device == "cpu" and call.seq_k < least:
        return f"{call.seq_k} tokens: on CPU choosing and gathering blocks pays from {least} tokens (measured)"
    return None


define_op(
    OP,
    "*, float keep_ratio=0.25, int block_q=64, int block_k=64, Tensor? keep_ratios=None, bool causal=False, "
    "float? scale=None, str provider='auto'",
    forward=_forward,
    backward=_backward,
    check=_check,
)

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="sparse",
    summary="the key blocks with the highest mean score, chosen at every call; training-free",
    params=(
        Param("keep_ratio", 0.25, "Fraction of the candidate key blocks to keep.", 0.0, 1.0, tensor="keep_ratios"),
        Param("block_q", 64, "Tokens per block of queries.", choices=BLOCKS),
        Param("block_k", 64, "Tokens per block of keys.", choices=BLOCKS),
    ),
    support=Support(cross=False),
    break_even=_break_even,
    # The median at the defaults over the attention layers of examples/tiny_video in 12 steps; the worst is 0.22.
    tolerance={"typical": 0.15},
    providers=(
        Provider(
            "triton",
            "selection and attention in Triton kernels for sm_80 and newer",
            load=_through("triton"),
            load_backward=_backward_through("triton"),
            support=TRITON,
            detail=later("kernels.triton.tuned_tiles", "detail"),
        ),
        Provider(
            "cpu",
            "selection in PyTorch, attention by block_sparse_attention's provider",
            load=_through("cpu"),
            load_backward=_backward_through("cpu"),
            support=Support(devices=("cpu",)),
            detail=later("kernels.cpu.native.library", "detail"),
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.block_topk", "block_topk_attention"),
            load_backward=later("reference.block_topk", "block_topk_attention_backward"),
        ),
    ),
)
