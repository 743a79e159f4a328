"""sage_fp4: what SageAttention 3 computes in FP4, emulated to study accuracy. It is slow, and never chosen unasked.

Its one provider is the reference, which a policy takes only where a rule names it: provider = "reference".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_qkv, default_scale
from ..op import define_op
from ..resolve import AUTO, forward_kernel
from ..spec import BackendSpec, Param, Provider, Support, later

NAME, OP = "sage_fp4", "sage_fp4_attention"


def sage_fp4_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    smooth_q: bool = True,
    smooth_k: bool = True,
    two_level: bool = True,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Attention with operands in NVFP4, emulated: e2m1 numbers with an e4m3 scale for every 16 of them.

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, Sk, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D). Its groups are 16 tokens, those of q and k 16 channels. Numbers beyond 2688 saturate.
        smooth_q: round q without the mean of its block of 128 tokens, whose scores are added in fp32.
        smooth_k: round k without its mean over tokens.
        two_level: multiply weights by 448 * 6 before rounding, so that their scales fill the range of e4m3.
        causal: query i sees keys 0 ... i, aligned top-left as in `scaled_dot_product_attention`.
        scale: factor on the scores; None means D ** -0.5.
        provider: "reference", or "auto", which is the same.

    Returns:
        out: (B, Hq, Sq, D), q's dtype and stride order. Without a key it is 0.
        lse: (B, Hq, Sq) fp32, natural logarithm of the softmax denominator, with what smoothing took given back.

    Raises:
        ArgumentError: on wrong shapes, dtypes or strides.
        GradientError: if a gradient is needed: it has none.

    Paper: https://arxiv.org/abs/2505.11594.
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.sage_fp4_attention(
        *(q, k, v),
        smooth_q=smooth_q,
        smooth_k=smooth_k,
        two_level=two_level,
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
    smooth_q: bool = True,  # noqa: ARG001  (one signature for the op's kernels)
    smooth_k: bool = True,  # noqa: ARG001
    two_level: bool = True,  # noqa: ARG001
    causal: bool = False,  # noqa: ARG001
    scale: float | None = None,  # noqa: ARG001
    provider: str = AUTO,  # noqa: ARG001
) -> None:
    check_qkv(OP, q, k, v)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    smooth_q: bool = True,
    smooth_k: bool = True,
    two_level: bool = True,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v)
    params: dict[str, Any] = {"smooth_q": smooth_q, "smooth_k": smooth_k, "two_level": two_level}
    kernel = forward_kernel(NAME, provider, q, k, causal=causal, **params)
    result: tuple[Tensor, Tensor] = kernel(q, k, v, causal=causal, scale=default_scale(scale, q.shape[-1]), **params)
    return result


define_op(
    OP,
    "*, bool smooth_q=True, bool smooth_k=True, bool two_level=True, bool causal=False, float? scale=None, "
    "str provider='auto'",
    forward=_forward,
    check=_check,
    refusal=f"{OP}: it has no gradient, because rounding to FP4 has none. Use flash_attention or "
    "block_sparse_attention where gradients are needed, or call it under torch.no_grad().",
)

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="quantized",
    summary="dense attention in FP4, emulated for its accuracy (SageAttention 3)",
    paper="https://arxiv.org/abs/2505.11594",
    params=(
        Param("smooth_q", True, "Round q without the mean of every 128 tokens."),
        Param("smooth_k", True, "Round k without its mean over tokens."),
        Param("two_level", True, "Scale weights up before rounding, so that their scales fill the range of e4m3."),
    ),
    support=Support(grad=False),
    providers=(
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.sage_fp4", "sage_fp4_attention"),
            support=Support(grad=False),
        ),
    ),
)
