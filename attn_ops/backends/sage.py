"""sage: dense attention with INT8 scores (SageAttention 1 and 2). A rounding of dense attention, not another method."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import AttentionCall
from ..capability import Capability
from ..checks import check_choice, check_qkv, default_scale
from ..op import define_op
from ..quantize import GRANULARITIES
from ..resolve import AUTO, forward_kernel
from ..spec import TRITON_FORWARD, BackendSpec, Param, Provider, Support, later
from ..vendors import sageattention

NAME, OP = "sage", "sage_attention"
PV = ("fp16", "fp8")


def sage_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qk_quant: str = "per_thread",
    pv: str = "fp16",
    smooth_k: bool = True,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Attention with quantized operands: softmax(scale * int8(q) @ int8(k - mean(k)).T) @ v.

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, Sk, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        qk_quant: rows that share an INT8 scale: "per_block" (128 of q, 64 of k), "per_warp" (32, 64) or "per_thread"
            (4, 16).
        pv: "fp16" rounds the weights and v to fp16, where a v beyond 65504 is infinite; "fp8" rounds both to e4m3, v
            with a scale per channel. Sums are fp32.
        smooth_k: quantize k without its mean over tokens. Without it, a k with a large offset loses its details.
        causal: query i sees keys 0 ... i, aligned top-left as in `scaled_dot_product_attention`.
        scale: factor on the scores; None means D ** -0.5.
        provider: "sageattention", "triton", "cpu", "reference", or "auto" for the first of these that can serve it.

    Returns:
        out: (B, Hq, Sq, D), q's dtype and stride order. Without a key it is 0.
        lse: (B, Hq, Sq) fp32, natural logarithm of the softmax denominator, with what smoothing took given back.

    Raises:
        ArgumentError: on wrong shapes, dtypes or strides, or an unknown qk_quant or pv.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.
        GradientError: if a gradient is needed: it has none.

    Papers: https://arxiv.org/abs/2410.02367, https://arxiv.org/abs/2411.10958, https://arxiv.org/abs/2505.21136.
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.sage_attention(
        q, k, v, qk_quant=qk_quant, pv=pv, smooth_k=smooth_k, causal=causal, scale=scale, provider=provider
    )
    return result


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qk_quant: str = "per_thread",
    pv: str = "fp16",
    smooth_k: bool = True,  # noqa: ARG001  (one signature for the op's kernels)
    causal: bool = False,  # noqa: ARG001
    scale: float | None = None,  # noqa: ARG001
    provider: str = AUTO,  # noqa: ARG001
) -> None:
    check_qkv(OP, q, k, v)
    check_choice(OP, "qk_quant", qk_quant, GRANULARITIES)
    check_choice(OP, "pv", pv, PV)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qk_quant: str = "per_thread",
    pv: str = "fp16",
    smooth_k: bool = True,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, qk_quant=qk_quant, pv=pv)
    kernel = forward_kernel(NAME, provider, q, k, causal=causal, qk_quant=qk_quant, pv=pv, smooth_k=smooth_k)
    scale = default_scale(scale, q.shape[-1])
    result: tuple[Tensor, Tensor] = kernel(
        q, k, v, causal=causal, scale=scale, qk_quant=qk_quant, pv=pv, smooth_k=smooth_k
    )
    return result


def _why_not_triton(call: AttentionCall, capability: Capability) -> list[str]:
    if call.param("pv") == "fp8" and capability.sm is not None and not capability.fp8:
        return [f'pv="fp8" needs sm89 or newer, this is {capability}']
    return []


def _break_even(call: AttentionCall, capability: Capability) -> str | None:
    """Measured on one Zen 4 core with pv="fp16", 1024 to 8192 tokens, head_dim 64 and 128; unmeasured on CUDA."""
    if capability.device != "cpu":
        return None
    if call.dtype is not torch.bfloat16 or capability.cpu_isa != "avx512":
        return "on a CPU it takes 1.0 to 1.4 times as long as dense attention (float32; causal: 1.1 to 2.1)"
    least = 2048 if call.causal else 1024
    if min(call.seq_q, call.seq_k) < least:
        return f"{call.seq_q} queries and {call.seq_k} keys; in bfloat16 on a CPU it is faster from {least} on"
    return None


define_op(
    OP,
    "*, str qk_quant='per_thread', str pv='fp16', bool smooth_k=True, bool causal=False, float? scale=None, "
    "str provider='auto'",
    forward=_forward,
    check=_check,
    refusal=f"{OP}: it has no gradient, because rounding to INT8 has none. Use flash_attention or "
    "block_sparse_attention where gradients are needed, or call it under torch.no_grad().",
)

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="quantized",
    summary="dense attention with INT8 scores, FP16 or FP8 weights (SageAttention 1 and 2)",
    paper="https://arxiv.org/abs/2411.10958",
    params=(
        Param("qk_quant", "per_thread", "Rows that share an INT8 scale, from coarse to fine.", choices=GRANULARITIES),
        Param("pv", "fp16", "What weights and values are rounded to; fp8 needs sm89 or newer.", choices=PV),
        Param("smooth_k", True, "Quantize k without its mean over tokens."),
    ),
    support=Support(grad=False),
    break_even=_break_even,
    tolerance={"typical": 0.012},
    providers=(
        sageattention.PROVIDER,
        Provider(
            "triton",
            "pointer kernel for sm_80 and newer",
            load=later("kernels.triton.sage", "attention"),
            support=TRITON_FORWARD,
            why_not=_why_not_triton,
        ),
        Provider(
            "cpu",
            "INT8 scores through oneDNN, softmax in fp32",
            load=later("kernels.cpu.sage", "attention"),
            support=Support(grad=False, devices=("cpu",)),
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.sage", "sage_attention"),
            support=Support(grad=False),
        ),
    ),
)
