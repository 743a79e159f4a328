"""sage_quantized: sage_attention from a q and a k that are INT8 already.

No rule names it: no graph has integers. It stands for `sage_attention` where a graph quantizes with PyTorch's own
operators, which Inductor fuses with the norm and the rotary embedding that make q and k.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..call import AttentionCall
from ..capability import Capability
from ..checks import check_choice, check_quantized_qk, default_scale
from ..numerics.quantize import mean_scores, quantize_qk
from ..op import define_op
from ..resolve import AUTO, forward_kernel
from ..spec import TRITON_FORWARD, BackendSpec, Prologue, Provider, Support, later, without_fp8

NAME, OP = "sage_quantized", "sage_attention_quantized"
PV = ("fp16", "fp8")


def sage_attention_quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    *,
    pv: str = "fp16",
    smooth_v: bool = False,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Attention with quantized operands, given: softmax(scale * (q_scale * q) @ (k_scale * k).T) @ v.

    Args:
        q: (B, Hq, Sq, D) int8, -127 ... 127; any strides with unit stride on D.
        k: (B, Hkv, Sk, D) int8, Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv). A mean that was taken
            from all keys is not missed by the output, only by the lse.
        v: (B, Hkv, Sk, D) fp32, fp16 or bf16.
        q_scale: (B, Hq, Sq) fp32, what 1 stands for in each token of q.
        k_scale: (B, Hkv, Sk) fp32, likewise.
        pv: what weights and v are rounded to, "fp16" or "fp8", as in `sage_attention`.
        smooth_v: round v without its mean over tokens, which is added to the output.
        causal: query i sees keys 0 ... i, aligned top-left as in `scaled_dot_product_attention`.
        scale: factor on the scores; None means D ** -0.5.
        provider: "triton", "cpu", "reference", or "auto" for the first of these that can serve it.

    Returns:
        out: (B, Hq, Sq, D), v's dtype and q's stride order. Without a key it is 0.
        lse: (B, Hq, Sq) fp32, natural logarithm of the softmax denominator of these scores.

    Raises:
        ArgumentError: on wrong shapes, dtypes or strides, an unknown pv, or a scale that requires a gradient.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.
        GradientError: if a gradient is needed: it has none.

    Papers: https://arxiv.org/abs/2410.02367, https://arxiv.org/abs/2411.10958.
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.sage_attention_quantized(
        *(q, k, v, q_scale, k_scale),
        pv=pv,
        smooth_v=smooth_v,
        causal=causal,
        scale=scale,
        provider=provider,
    )
    return result


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    *,
    pv: str = "fp16",
    smooth_v: bool = False,  # noqa: ARG001  (one signature for the op's kernels)
    causal: bool = False,  # noqa: ARG001
    scale: float | None = None,  # noqa: ARG001
    provider: str = AUTO,  # noqa: ARG001
) -> None:
    check_quantized_qk(OP, q, k, v, q_scale, k_scale)
    check_choice(OP, "pv", pv, PV)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    *,
    pv: str = "fp16",
    smooth_v: bool = False,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, q_scale, k_scale, pv=pv)
    kernel = forward_kernel(NAME, provider, q, k, causal=causal, pv=pv, smooth_v=smooth_v)
    scale = default_scale(scale, q.shape[-1])
    result: tuple[Tensor, Tensor] = kernel(
        q, k, v, q_scale, k_scale, causal=causal, scale=scale, pv=pv, smooth_v=smooth_v
    )
    return result


def quantize_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bits: int = 8,
    granularity: str = "per_thread",
    pv: str = "fp16",
    smooth_q: bool = False,  # noqa: ARG001  (the signature of sage_attention; a site with these keeps it)
    smooth_k: bool = True,
    smooth_v: bool = False,
    asymmetric: bool = False,  # noqa: ARG001
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """`sage_attention` in two: PyTorch's operators make the integers, the op attends."""
    qk = quantize_qk(q, k, granularity=granularity, smooth_k=smooth_k, bits=bits)
    scale = default_scale(scale, q.shape[-1])
    out, lse = torch.ops.sparseattn.sage_attention_quantized(
        *(qk.q, qk.k, v, qk.q_scale, qk.k_scale),
        pv=pv,
        smooth_v=smooth_v,
        causal=causal,
        scale=scale,
        provider=provider,
    )
    return out, lse if qk.k_mean is None else lse + mean_scores(q, qk.k_mean, scale)


def _why_not_fused(call: AttentionCall, _capability: Capability) -> list[str]:
    checks = (
        (call.param("smooth_q"), "smooth_q: the scores of the means are a product, which nothing fuses with"),
        (call.param("asymmetric"), "asymmetric: the op on integers takes no offsets"),
    )
    return [reason for asked, reason in checks if asked]


def _break_even(call: AttentionCall, capability: Capability) -> str | None:
    """Measured on one Zen 4 core, 4 heads of 128 channels, 512 to 2048 tokens: RMSNorm, RoPE and attention of a layer.

    Fused, fp32 takes 0.80 to 0.89 of the time with bits=4 and 0.96 to 0.97 with pv="fp8".
    """
    if capability.device != "cpu":
        return f"not measured on {capability.device}"
    if call.param("bits") == 8 and call.param("pv") == "fp16":
        return "the native CPU kernel quantizes by itself: fused, a layer takes 0.98 to 1.08 of the time (measured)"
    return None


define_op(
    OP,
    "Tensor q_scale, Tensor k_scale, *, str pv='fp16', bool smooth_v=False, bool causal=False, float? scale=None, "
    "str provider='auto'",
    forward=_forward,
    check=_check,
    refusal=f"{OP}: it has no gradient, because rounding to INT8 has none. Use flash_attention where gradients are "
    "needed, or call it under torch.no_grad().",
)

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="quantized",
    summary="sage on a q and a k that are INT8 already; what a fused prologue leaves of it",
    paper="https://arxiv.org/abs/2411.10958",
    selectable=False,
    support=Support(grad=False, dtypes=(torch.int8,)),
    prologue=Prologue("sage", quantize_and_attend, _why_not_fused, _break_even),
    tolerance={"typical": 0.012},
    providers=(
        Provider(
            "triton",
            "pointer kernel for sm_80 and newer",
            load=later("kernels.triton.sage", "quantized_attention"),
            support=replace(TRITON_FORWARD, dtypes=(torch.int8,)),
            why_not=without_fp8,
        ),
        Provider(
            "cpu",
            "INT8 scores through oneDNN, softmax in fp32",
            load=later("kernels.cpu.sage", "quantized_attention"),
            support=Support(grad=False, devices=("cpu",), dtypes=(torch.int8,)),
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.sage", "sage_attention_quantized"),
            support=Support(grad=False, dtypes=(torch.int8,)),
        ),
    ),
)
