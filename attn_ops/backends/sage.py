"""sage: dense attention with INT8 scores (SageAttention 1 and 2). A rounding of dense attention, not another method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import hopper
from ..call import AttentionCall
from ..capability import Capability
from ..checks import check_choice, check_qkv, default_scale
from ..errors import ArgumentError
from ..numerics.quantize import GRANULARITIES, LARGEST
from ..op import define_op
from ..resolve import AUTO, forward_kernel
from ..spec import TRITON_FORWARD, BackendSpec, Param, Provider, Support, later, without_fp8
from ..vendors import sageattention

NAME, OP = "sage", "sage_attention"
BITS = tuple(LARGEST)
PV = ("fp16", "fp8")


def sage_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bits: int = 8,
    granularity: str = "per_thread",
    pv: str = "fp16",
    smooth_q: bool = False,
    smooth_k: bool = True,
    smooth_v: bool = False,
    asymmetric: bool = False,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Attention with quantized operands: softmax(scale * int8(q) @ int8(k - mean(k)).T) @ v.

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, Sk, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        bits: 8, or 4 for integers of -7 ... 7. These are multiplied as INT8, so they save no time: bits=4 tells what
            INT4 would cost in accuracy.
        granularity: rows that share a scale: "per_block" (128 of q, 64 of k), "per_warp" (32, 64) or "per_thread"
            (4, 16).
        pv: "fp16" rounds the weights and v to fp16, where a v beyond 65504 is infinite; "fp8" rounds both to e4m3, v
            with a scale per channel. Sums are fp32.
        smooth_q: quantize q without the mean of its block of 128 tokens, whose scores are added in fp32. It takes 4
            bytes for every 128 queries and key.
        smooth_k: quantize k without its mean over tokens. Without it, a k with a large offset loses its details.
        smooth_v: round v without its mean over tokens, which is added to the output.
        asymmetric: integers span lowest ... highest of a group of rows instead of -amax ... amax.
        causal: query i sees keys 0 ... i, aligned top-left as in `scaled_dot_product_attention`.
        scale: factor on the scores; None means D ** -0.5.
        provider: "sageattention", "triton", "cpu", "reference", or "auto" for the first of these that can serve it.
            Never chosen so: "gluon" and "gluon_overlapped", kernels for Hopper that are not measured yet.

    Returns:
        out: (B, Hq, Sq, D), q's dtype and stride order. Without a key it is 0.
        lse: (B, Hq, Sq) fp32, natural logarithm of the softmax denominator, with what smoothing took given back.

    Raises:
        ArgumentError: on wrong shapes, dtypes or strides, or unknown bits, granularity or pv.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.
        GradientError: if a gradient is needed: it has none.

    Papers: https://arxiv.org/abs/2410.02367, https://arxiv.org/abs/2411.10958, https://arxiv.org/abs/2505.21136.
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.sage_attention(
        *(q, k, v),
        bits=bits,
        granularity=granularity,
        pv=pv,
        smooth_q=smooth_q,
        smooth_k=smooth_k,
        smooth_v=smooth_v,
        asymmetric=asymmetric,
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
    bits: int = 8,
    granularity: str = "per_thread",
    pv: str = "fp16",
    smooth_q: bool = False,  # noqa: ARG001  (one signature for the op's kernels)
    smooth_k: bool = True,  # noqa: ARG001
    smooth_v: bool = False,  # noqa: ARG001
    asymmetric: bool = False,  # noqa: ARG001
    causal: bool = False,  # noqa: ARG001
    scale: float | None = None,  # noqa: ARG001
    provider: str = AUTO,  # noqa: ARG001
) -> None:
    check_qkv(OP, q, k, v)
    if bits not in BITS:
        raise ArgumentError(OP, "bits", "be 8 or 4", bits)
    check_choice(OP, "granularity", granularity, GRANULARITIES)
    check_choice(OP, "pv", pv, PV)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bits: int = 8,
    granularity: str = "per_thread",
    pv: str = "fp16",
    smooth_q: bool = False,
    smooth_k: bool = True,
    smooth_v: bool = False,
    asymmetric: bool = False,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, bits=bits, granularity=granularity, pv=pv)
    params: dict[str, Any] = {
        "bits": bits,
        "granularity": granularity,
        "pv": pv,
        "smooth_q": smooth_q,
        "smooth_k": smooth_k,
        "smooth_v": smooth_v,
        "asymmetric": asymmetric,
    }
    kernel = forward_kernel(NAME, provider, q, k, causal=causal, **params)
    result: tuple[Tensor, Tensor] = kernel(q, k, v, causal=causal, scale=default_scale(scale, q.shape[-1]), **params)
    return result


def _why_not_triton(call: AttentionCall, capability: Capability) -> list[str]:
    reasons = without_fp8(call, capability)
    if call.param("asymmetric"):
        reasons.append("asymmetric=True: it adds no offsets to its scores; smooth_k and smooth_q centre k and q too")
    return reasons


def _why_not_gluon(call: AttentionCall, _capability: Capability) -> list[str]:
    return [f"{name}=True is not in its kernel" for name in ("smooth_q", "smooth_v", "asymmetric") if call.param(name)]


# On a Zen 4 CPU, one and two threads, 4 heads of 64 or 128 channels, fp32, fp16 and bf16, causal or not, through the
# native kernels: 0.8 to 3.0 times the speed of dense at 256 tokens, 1.1 to 3.8 at 512, 1.3 to 3.4 at 1024 and more;
# compiled without VNNI, on two threads: 0.8 to 1.7 at 1024, 1.1 to 1.4 at 4096.
_LEAST_SEQ = {"avx512_bf16": 512, "avx512_vnni": 512, "avx512": 4096, "avx2": 4096}
_IN_CHUNKS = ("smooth_q", "smooth_v", "asymmetric")
"""Options that the native CPU kernels do not have, beside bits=4 and pv="fp8"."""


def _break_even(call: AttentionCall, capability: Capability) -> str | None:
    """Unmeasured on CUDA."""
    if capability.device != "cpu":
        return None
    least = _LEAST_SEQ.get(capability.cpu_kernels)
    if least is None or call.param("pv") == "fp8" or call.param("bits") != 8 or any(map(call.param, _IN_CHUNKS)):
        return _break_even_in_chunks(call, capability)
    if min(call.seq_q, call.seq_k) < least:
        return f"{call.seq_q} queries and {call.seq_k} keys; on this CPU it is faster from {least} on (measured)"
    return None


def _break_even_in_chunks(call: AttentionCall, capability: Capability) -> str | None:
    """Measured on one Zen 4 core, 1024 to 8192 tokens, head_dim 64 and 128.

    Options: in bfloat16, not causal, 2048 and 4096 tokens; bits and asymmetric cost little.
    """
    if call.dtype is not torch.bfloat16 or capability.cpu_isa != "avx512":
        how = "without native kernels, or with such options, a CPU takes"
        return f"{how} 1.0 to 1.4 times as long as for dense attention (float32; causal: 1.1 to 2.1)"
    if call.param("pv") == "fp8":
        return 'pv="fp8" on a CPU takes 1.1 to 1.7 times as long as dense attention'
    if call.param("smooth_q") or call.param("smooth_v"):
        return "with smooth_q or smooth_v it takes 0.7 to 1.4 times as long as dense attention on a CPU"
    least = 2048 if call.causal else 1024
    if min(call.seq_q, call.seq_k) < least:
        return f"{call.seq_q} queries and {call.seq_k} keys; in bfloat16 on a CPU it is faster from {least} on"
    return None


define_op(
    OP,
    "*, int bits=8, str granularity='per_thread', str pv='fp16', bool smooth_q=False, bool smooth_k=True, "
    "bool smooth_v=False, bool asymmetric=False, bool causal=False, float? scale=None, str provider='auto'",
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
        Param("bits", 8, "Bits of an integer of q and k; 4 is for accuracy studies, it saves no time.", choices=BITS),
        Param("granularity", "per_thread", "Rows that share a scale, from coarse to fine.", choices=GRANULARITIES),
        Param("pv", "fp16", "What weights and values are rounded to; fp8 needs sm89 or newer.", choices=PV),
        Param("smooth_q", False, "Quantize q without the mean of every 128 tokens."),
        Param("smooth_k", True, "Quantize k without its mean over tokens."),
        Param("smooth_v", False, "Round v without its mean over tokens."),
        Param("asymmetric", False, "Integers span lowest ... highest of their group instead of -amax ... amax."),
    ),
    support=Support(grad=False),
    break_even=_break_even,
    tolerance={"typical": 0.012},
    integer_qk=True,
    providers=(
        sageattention.PROVIDER,
        Provider(
            "triton",
            "pointer kernel for sm_80 and newer",
            load=later("kernels.triton.sage", "attention"),
            support=TRITON_FORWARD,
            why_not=_why_not_triton,
            detail=later("kernels.triton.tuned_tiles", "detail"),
        ),
        *hopper.providers(lambda function: later("kernels.gluon.sage", function), why_not=_why_not_gluon),
        Provider(
            "cpu",
            "C++ kernel compiled on first use, else INT8 scores through oneDNN, softmax in fp32",
            load=later("kernels.cpu.sage", "attention"),
            support=Support(grad=False, devices=("cpu",)),
            detail=later("kernels.cpu.native.library", "integer_detail"),
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.sage", "sage_attention"),
            support=Support(grad=False),
        ),
    ),
)
