"""sage_sla: SLA for inference, its exact part with INT8 scores and FP16 or FP8 weights and values (SageSLA).

Block choice and linear branch are those of `sla`, so a projection trained with it serves here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..blocks.sla_method import VARIANTS, SlaMethod
from ..call import AttentionCall
from ..capability import Capability
from ..checks import check_choice, default_scale
from ..numerics.linear_attention import FEATURE_MAPS
from ..op import define_op
from ..resolve import AUTO, forward_kernel
from ..spec import TRITON_FORWARD, BackendSpec, Kernel, Param, Provider, Support, later, without_fp8
from ..vendors import spas_sage_attn

NAME, OP = "sage_sla", "sage_sparse_linear_attention"
PV = ("fp16", "fp8")
BLOCKS = (16, 32, 64, 128)

# The sparse part at the default keep_ratio on one CPU core, 4 heads of 64 or 128 channels, fp32: 0.7 to 1.3 times the
# speed of dense at 256 tokens, 1.0 to 3.8 at 512 (measured).
_LEAST_SEQ = 512


def sage_sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    keep_ratio: float = 0.1,
    variant: str = "all",
    feature_map: str = "softmax",
    pv: str = "fp16",
    smooth_k: bool = True,
    block_q: int = 128,
    block_k: int = 64,
    compat: bool = False,
    keep_ratios: Tensor | None = None,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """`sparse_linear_attention` whose softmax part is rounded: INT8 q and k, one scale per block of tokens each.

    Args:
        q: (B, Hq, S, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, S, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv) and chooses its own blocks.
        v: (B, Hkv, S, D).
        weight: (D, D), the trained projection of the linear branch; None means the sparse part alone.
        bias: (D,), or None for 0; only with a weight.
        keep_ratio: fraction of the key blocks to keep, 0 ... 1.
        variant: "all" or "complement", as the weight was trained.
        feature_map: "softmax", "elu" or "relu", likewise.
        pv: "fp16" rounds the weights and v to fp16, where a v beyond 65504 is infinite; "fp8" rounds both to e4m3, v
            with a scale per channel. Sums are fp32.
        smooth_k: round k without its mean over tokens.
        block_q: tokens per block of queries, at least 1; the last block may be short.
        block_k: tokens per block of keys, likewise.
        compat: choose the blocks by scores rounded to q's dtype, as the published code does.
        keep_ratios: () or (Hq,) fp32 on q's device, used instead of keep_ratio: a new value compiles nothing again.
        scale: factor on the scores of the sparse part; None means D ** -0.5.
        provider: "triton", "spas_sage_attn", "cpu", "reference", or "auto": the first of these that can serve the call.

    Returns:
        out: (B, Hq, S, D), q's dtype and stride order.
        lse: (B, Hq, S) fp32, natural logarithm of the softmax denominator over the kept blocks, with what smoothing
            took given back; NaN from "spas_sage_attn", which has none.

    Raises:
        ArgumentError: on wrong shapes, dtypes, strides or values.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.
        GradientError: if a gradient is needed: it has none. Train with `sparse_linear_attention`.

    Paper: https://arxiv.org/abs/2509.24006.
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.sage_sparse_linear_attention(
        *(q, k, v, weight, bias),
        keep_ratio=keep_ratio,
        variant=variant,
        feature_map=feature_map,
        pv=pv,
        smooth_k=smooth_k,
        block_q=block_q,
        block_k=block_k,
        compat=compat,
        keep_ratios=keep_ratios,
        scale=scale,
        provider=provider,
    )
    return result


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    keep_ratio: float = 0.1,
    variant: str = "all",
    feature_map: str = "softmax",
    pv: str = "fp16",
    smooth_k: bool = True,  # noqa: ARG001  (one signature for the op's kernels)
    block_q: int = 128,
    block_k: int = 64,
    compat: bool = False,
    keep_ratios: Tensor | None = None,
    scale: float | None = None,  # noqa: ARG001
    provider: str = AUTO,  # noqa: ARG001
) -> None:
    how = SlaMethod(keep_ratio, variant, feature_map, block_q, block_k, compat, keep_ratios)
    how.check(OP, q, k, v, weight, bias)
    check_choice(OP, "pv", pv, PV)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    keep_ratio: float = 0.1,
    variant: str = "all",
    feature_map: str = "softmax",
    pv: str = "fp16",
    smooth_k: bool = True,
    block_q: int = 128,
    block_k: int = 64,
    compat: bool = False,
    keep_ratios: Tensor | None = None,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    how = SlaMethod(keep_ratio, variant, feature_map, block_q, block_k, compat, keep_ratios)
    how.check(OP, q, k, v, weight, bias)
    check_choice(OP, "pv", pv, PV)
    kernel = forward_kernel(NAME, provider, q, k, block_q=block_q, block_k=block_k, pv=pv, smooth_k=smooth_k)
    result: tuple[Tensor, Tensor] = kernel(
        q, k, v, weight, bias, how, pv=pv, smooth_k=smooth_k, scale=default_scale(scale, q.shape[-1])
    )
    return result


def _on_lists(module: str) -> Callable[[], Kernel]:
    return lambda: later("kernels.sage_sla", "on_lists")()(later(module, "attention")())


def _on_map() -> Kernel:
    kernel: Kernel = later("kernels.sage_sla", "on_map")()(spas_sage_attn.load())
    return kernel


def _break_even(call: AttentionCall, capability: Capability) -> str | None:
    if capability.device == "cpu" and call.seq_k < _LEAST_SEQ:
        return f"{call.seq_k} tokens: on CPU choosing and rounding blocks pays from {_LEAST_SEQ} tokens (measured)"
    return None


define_op(
    OP,
    "Tensor? weight=None, Tensor? bias=None, *, float keep_ratio=0.1, str variant='all', str feature_map='softmax', "
    "str pv='fp16', bool smooth_k=True, int block_q=128, int block_k=64, bool compat=False, Tensor? keep_ratios=None, "
    "float? scale=None, str provider='auto'",
    forward=_forward,
    check=_check,
    differentiable=("weight", "bias"),
    refusal=f"{OP}: it has no gradient, because rounding to INT8 has none. Train with sparse_linear_attention, whose "
    "weights serve here as they are, or call it under torch.no_grad().",
)

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="sparse",
    summary="sla with INT8 scores, for inference; without a trained projection its sparse part alone",
    paper="https://arxiv.org/abs/2509.24006",
    params=(
        Param("keep_ratio", 0.1, "Fraction of the key blocks to keep.", low=0.0, high=1.0, tensor="keep_ratios"),
        Param("variant", "all", "Tokens of the linear branch: all, or those of the blocks not kept.", choices=VARIANTS),
        Param("feature_map", "softmax", "Feature map of the linear branch.", choices=FEATURE_MAPS),
        Param("pv", "fp16", "What weights and values are rounded to; fp8 needs sm89 or newer.", choices=PV),
        Param("smooth_k", True, "Round k without its mean over tokens."),
        Param("block_q", 128, "Tokens per block of queries.", choices=BLOCKS),
        Param("block_k", 64, "Tokens per block of keys.", choices=BLOCKS),
        Param("compat", False, "Choose blocks by scores rounded to the inputs' dtype, as the published code does."),
    ),
    attached=("weight", "bias"),
    support=Support(causal=False, cross=False, grad=False),
    break_even=_break_even,
    # Of the sparse part, over the self-attention layers of examples/tiny_video: the median; the worst is 0.63.
    tolerance={"typical": 0.35},
    providers=(
        Provider(
            "triton",
            "Triton kernels for sm_80 and newer; the linear branch of the complement in PyTorch",
            load=_on_lists("kernels.triton.sparge"),
            support=TRITON_FORWARD,
            why_not=without_fp8,
            detail=later("kernels.triton.tuned_tiles", "detail"),
        ),
        replace(spas_sage_attn.PROVIDER, load=_on_map),
        Provider(
            "cpu",
            "linear branch in PyTorch, the rest in C++ compiled on first use, else on rounded operands in fp32",
            load=_on_lists("kernels.cpu.sparge"),
            support=Support(grad=False, devices=("cpu",)),
            detail=later("kernels.cpu.native.library", "integer_detail"),
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.sage_sla", "sage_sparse_linear_attention"),
            support=Support(grad=False),
        ),
    ),
)
