"""sparge: attention to the key blocks that score highest, with SageAttention's rounding (SpargeAttention).

Training-free: the blocks are predicted from the means of blocks, at every call. The selection alone is
`sparge_block_map`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import hopper
from ..blocks import sparge_map  # noqa: F401  (registers sparge_block_map)
from ..blocks.sparge_arguments import ATTENTION, MAX_PV_THRESHOLD, PV, SELECTION
from ..blocks.sparge_arguments import check_attention as _check
from ..call import AttentionCall
from ..capability import Capability
from ..layout import empty_result
from ..op import define_op
from ..resolve import AUTO, forward_kernel
from ..spec import TRITON_FORWARD, BackendSpec, Kernel, Param, Provider, Support, later, without_fp8
from ..vendors import spas_sage_attn

NAME, OP = "sparge", ATTENTION
BLOCKS = (16, 32, 64, 128)
_WHOLE_TILES = tuple((block_q, block_k) for block_q in BLOCKS for block_k in (32, 64))

# At the default keep_ratio on a Zen 4 CPU, one and two threads, 4 heads of 64 or 128 channels, fp32, fp16 and bf16,
# causal or not, through the native kernels: 0.6 to 2.4 times the speed of dense at 256 tokens, 1.2 to 4.1 at 512;
# compiled without VNNI, on two threads, 1.0 at 512, 1.3 to 2.6 at 1024; without a compiler, 1.0 to 1.3 at 4096.
_LEAST_SEQ = {"avx512_bf16": 512, "avx512_vnni": 512, "avx512": 1024, "avx2": 1024, "": 4096}


def sparge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep_ratio: float = 0.5,
    mass: float | None = None,
    similarity: float = -1.0,
    sink: bool = False,
    smooth_k: bool = True,
    block_q: int = 128,
    block_k: int = 64,
    keep_ratios: Tensor | None = None,
    masses: Tensor | None = None,
    similarities: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    pv_threshold: float | None = None,
    pv_thresholds: Tensor | None = None,
    pv: str = "fp16",
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Attention of every block of queries to its best key blocks, by scale * mean(q block) . mean(k block) in fp32.

    Scores are products of INT8 numbers as in `sage_attention`, with one scale per block. `sparge_block_map` returns
    the blocks, and so the density.

    With `causal`, what is at or after token t changes no output, bit for bit, of the blocks of queries before the one
    that holds t: k has a scale per token then, and loses the mean of the first block_q tokens instead of that of all.
    (With pv="fp8", v has scales per key block, of the blocks up to it: there it is the key block too. In FP16, later k
    and v change no earlier row at all from the second block of queries on; later q may, through the choice of blocks.)

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, Sk, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv) and chooses its own blocks.
        v: (B, Hkv, Sk, D).
        keep_ratio: of n candidate blocks keep int(keep_ratio * n + 0.5), computed in fp32, at least 1, those that are
            always kept included; 0 ... 1. Not used if a mass is given.
        mass: keep the fewest blocks whose softmax over the candidates reaches this, 0 ... 1; 1 keeps all.
        similarity: mean cosine of a block's pairs of rows below which its mean does not represent it: such a block of
            queries keeps all candidates, such a block of keys (smoothed if smooth_k) is always kept. Such means lie in
            0 ... 1, so -1 is no test.
        sink: always keep block 0 of the keys.
        smooth_k: round k without its mean over tokens.
        block_q: tokens per block of queries, at least 1; the last block may be short.
        block_k: tokens per block of keys, likewise.
        keep_ratios, masses, similarities, pv_thresholds: fp32 () or (Hq,) on q's device, instead of the number: a
            schedule or a calibration changes them without compiling again.
        causal: query i sees keys 0 ... i, token by token, top-left. Candidates are the blocks not wholly in the future
            of a block of queries; those that hold its own tokens are always kept, and have no part in the mass.
        scale: factor on the scores; None means D ** -0.5.
        pv_threshold: the second stage, in powers of two, at least 0; None is none. In ascending order, a kept block is
            skipped, in the softmax denominator too, if in every row of the block of queries its highest score lies so
            far or farther below the highest before it. The last two kept blocks are never skipped.
        pv: "fp16" rounds the weights and v to fp16, "fp8" both to e4m3, as in `sage_attention`.
        provider: "triton", "spas_sage_attn" (without lse: NaN), "cpu", "reference", or "auto". Never chosen so: "gluon"
            and "gluon_overlapped", kernels for Hopper that are not measured yet.

    Returns:
        out: (B, Hq, Sq, D), q's dtype and stride order. Without a key it is 0.
        lse: (B, Hq, Sq) fp32, natural logarithm of the softmax denominator over the blocks used.

    Raises:
        ArgumentError: on wrong shapes, dtypes, strides or thresholds, or an unknown pv.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.
        GradientError: if a gradient is needed: it has none.

    Paper: https://arxiv.org/abs/2502.18137.
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.sparge_attention(
        *(q, k, v),
        keep_ratio=keep_ratio,
        mass=mass,
        similarity=similarity,
        sink=sink,
        smooth_k=smooth_k,
        block_q=block_q,
        block_k=block_k,
        keep_ratios=keep_ratios,
        masses=masses,
        similarities=similarities,
        causal=causal,
        scale=scale,
        pv_threshold=pv_threshold,
        pv_thresholds=pv_thresholds,
        pv=pv,
        provider=provider,
    )
    return result


@functools.wraps(_check, assigned=())
def _forward(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    # The defaults are those of `_check`.
    how, threshold, pv, scale, provider = _check(q, k, v, **given)
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    kernel = forward_kernel(
        *(NAME, provider, q, k),
        causal=how.causal,
        scale=scale,
        block_q=how.block_q,
        block_k=how.block_k,
        smooth_k=how.smooth_k,
        pv=pv,
        pv_threshold=0.0 if isinstance(threshold, Tensor) else threshold,
    )
    result: tuple[Tensor, Tensor] = kernel(q, k, v, how=how, pv_threshold=threshold, pv=pv, scale=scale)
    return result


def _on_lists(module: str, function: str = "attention") -> Callable[[], Kernel]:
    return lambda: later("kernels.sparge", "on_lists")()(later(module, function)())


def _on_map() -> Kernel:
    kernel: Kernel = later("kernels.sparge", "on_map")()(spas_sage_attn.load())
    return kernel


def _why_not_triton(call: AttentionCall, capability: Capability) -> list[str]:
    reasons = without_fp8(call, capability)
    blocks, largest = (call.param("block_q"), call.param("block_k")), 64 if capability.sm in (100, 103) else 128
    if call.param("pv_threshold") is not None and (call.head_dim > largest or blocks not in _WHOLE_TILES):
        reasons.append(
            f"pv_threshold with blocks of {blocks[0]} x {blocks[1]} and head_dim {call.head_dim}: "
            f"it skips tiles, of 128 or fewer x 32 or 64 tokens, and head_dim up to {largest}"
        )
    return reasons


def _why_not_gluon(call: AttentionCall, _capability: Capability) -> list[str]:
    return ["pv_threshold is not in its kernel"] if call.param("pv_threshold") is not None else []


def _break_even(call: AttentionCall, capability: Capability) -> str | None:
    if capability.device != "cpu":
        return None
    if call.param("pv") == "fp8" or call.param("pv_threshold") is not None:
        return 'with pv="fp8" or pv_threshold it is slower than dense attention on CPU, up to 4096 tokens (measured)'
    least = _LEAST_SEQ[capability.cpu_kernels]
    if call.seq_k < least:
        return f"{call.seq_k} tokens: on this CPU choosing and rounding pays from {least} tokens (measured)"
    return None


define_op(
    OP,
    f"*, {SELECTION}, float? pv_threshold=None, Tensor? pv_thresholds=None, str pv='fp16', str provider='auto'",
    forward=_forward,
    check=_check,
    refusal=f"{OP}: it has no gradient, because rounding to INT8 has none. Use block_topk_attention or "
    "block_sparse_attention where gradients are needed, or call it under torch.no_grad().",
)

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="sparse",
    summary="the best key blocks by number or by mass, with INT8 scores (SpargeAttention); training-free",
    paper="https://arxiv.org/abs/2502.18137",
    params=(
        Param("keep_ratio", 0.5, "Fraction of the candidate key blocks to keep.", 0.0, 1.0, tensor="keep_ratios"),
        Param(
            *("mass", None, "Keep the blocks that hold this share of the softmax instead.", 0.0, 1.0),
            kind=float,
            tensor="masses",
        ),
        Param(
            *("similarity", -1.0, "Mean cosine of a block's rows below which it is not predicted.", -1.0, 1.0),
            tensor="similarities",
        ),
        Param("sink", False, "Always keep the first block of keys."),
        Param("smooth_k", True, "Round k without its mean over tokens."),
        Param(
            *("pv_threshold", None, "Powers of two below which a block is skipped.", 0.0, MAX_PV_THRESHOLD),
            kind=float,
            tensor="pv_thresholds",
        ),
        Param("pv", "fp16", "What weights and values are rounded to; fp8 needs sm89 or newer.", choices=PV),
        Param("block_q", 128, "Tokens per block of queries.", choices=BLOCKS),
        Param("block_k", 64, "Tokens per block of keys.", choices=BLOCKS),
    ),
    support=Support(cross=False, grad=False),
    break_even=_break_even,
    # The median at the defaults over the attention layers of examples/tiny_video in 12 steps; the worst is 0.15.
    tolerance={"typical": 0.08},
    integer_qk=True,
    providers=(
        Provider(
            "triton",
            "selection and attention in Triton kernels for sm_80 and newer",
            load=_on_lists("kernels.triton.sparge"),
            support=TRITON_FORWARD,
            why_not=_why_not_triton,
            detail=later("kernels.triton.tuned_tiles", "detail"),
        ),
        *hopper.providers(lambda function: _on_lists("kernels.gluon.sparge", function), why_not=_why_not_gluon),
        replace(spas_sage_attn.PROVIDER, load=_on_map),
        Provider(
            "cpu",
            "C++ kernels compiled on first use, else attention on the rounded operands in fp32",
            load=_on_lists("kernels.cpu.sparge"),
            support=Support(grad=False, devices=("cpu",)),
            detail=later("kernels.cpu.native.library", "integer_detail"),
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.sparge", "sparge_attention"),
            support=Support(grad=False),
        ),
    ),
)
