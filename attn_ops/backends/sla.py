"""sla: exact attention to few key blocks, and a projected linear attention for the rest (SLA).

Without a projection, which only training gives, it is the sparse part alone. The choice of blocks carries no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..blocks.sla_method import VARIANTS, SlaMethod
from ..call import AttentionCall
from ..capability import Capability
from ..checks import default_scale
from ..numerics.linear_attention import FEATURE_MAPS
from ..op import define_op
from ..resolve import AUTO, backward_kernel, forward_kernel
from ..spec import TRITON, BackendSpec, Kernel, Param, Provider, Support, later

NAME, OP = "sla", "sparse_linear_attention"
BLOCKS = (16, 32, 64, 128)

# The sparse part at the default keep_ratio on one CPU core, 4 heads of 64 or 128 channels, fp32: 0.6 to 0.9 times the
# speed of dense at 128 tokens, 1.6 to 2.1 at 256 (measured).
_LEAST_SEQ = 256


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    keep_ratio: float = 0.1,
    variant: str = "all",
    feature_map: str = "softmax",
    block_q: int = 64,
    block_k: int = 64,
    compat: bool = False,
    keep_ratios: Tensor | None = None,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Softmax attention to the best key blocks, plus `weight @ o_l + bias` with o_l a linear attention.

    Every block of queries attends exactly to the max(1, int(keep_ratio * n)) of n key blocks with the highest
    mean(q block) . mean(k block - mean of k), the lower number first among equals. o_l = phi(q) H / (phi(q) . z) with
    H = sum phi(k) v.T and z = sum phi(k), in fp32. There is no causal form.

    Args:
        q: (B, Hq, S, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, S, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv) and chooses its own blocks.
        v: (B, Hkv, S, D).
        weight: (D, D) fp32, fp16 or bf16, the trained projection of all heads. None means that there is none: the
            result is the sparse part alone, and feature_map and variant do nothing.
        bias: (D,), or None for 0; only with a weight.
        keep_ratio: fraction of the key blocks to keep, 0 ... 1.
        variant: tokens of H and z: "all", with 1e-5 added to the denominator, or the "complement" of the kept blocks,
            0 where no block is left. A projection is trained for one of them and is wrong for the other.
        feature_map: phi: "softmax" over channels, "elu" (plus 1) or "relu".
        block_q: tokens per block of queries, at least 1; the last block may be short.
        block_k: tokens per block of keys, likewise.
        compat: round the means and scores that choose the blocks to q's dtype, as the published code does, instead of
            keeping them in fp32. Other blocks may be chosen for fp16 and bf16.
        keep_ratios: () or (Hq,) fp32 on q's device, used instead of keep_ratio: a new value compiles nothing again.
        scale: factor on the scores of the sparse part; None means D ** -0.5.
        provider: "triton", "cpu", "reference", or "auto" for the first of these that can serve the call.

    Returns:
        out: (B, Hq, S, D), q's dtype and stride order.
        lse: (B, Hq, S) fp32, natural logarithm of the softmax denominator over the kept blocks.

    Raises:
        ArgumentError: on wrong shapes, dtypes, strides or values.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.

    Differentiable in q, k, v, weight and bias through out and lse; the selection carries no gradient. No double
    backward, no forward mode.
    Paper: https://arxiv.org/abs/2509.24006.
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.sparse_linear_attention(
        *(q, k, v, weight, bias),
        keep_ratio=keep_ratio,
        variant=variant,
        feature_map=feature_map,
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
    block_q: int = 64,
    block_k: int = 64,
    compat: bool = False,
    keep_ratios: Tensor | None = None,
    scale: float | None = None,  # noqa: ARG001  (one signature for the op's kernels)
    provider: str = AUTO,  # noqa: ARG001
) -> None:
    how = SlaMethod(keep_ratio, variant, feature_map, block_q, block_k, compat, keep_ratios)
    how.check(OP, q, k, v, weight, bias)


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
    block_q: int = 64,
    block_k: int = 64,
    compat: bool = False,
    keep_ratios: Tensor | None = None,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    how = SlaMethod(keep_ratio, variant, feature_map, block_q, block_k, compat, keep_ratios)
    how.check(OP, q, k, v, weight, bias)
    kernel = forward_kernel(NAME, provider, q, k)
    result: tuple[Tensor, Tensor] = kernel(q, k, v, weight, bias, how, scale=default_scale(scale, q.shape[-1]))
    return result


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    keep_ratio: float,
    variant: str,
    feature_map: str,
    block_q: int,
    block_k: int,
    compat: bool,
    keep_ratios: Tensor | None,
    scale: float | None,
    provider: str,
) -> tuple[Tensor, ...]:
    how = SlaMethod(keep_ratio, variant, feature_map, block_q, block_k, compat, keep_ratios)
    kernel = backward_kernel(NAME, provider, q, k)
    grads: tuple[Tensor, ...] = kernel(
        *(grad_out, grad_lse, out, lse, q, k, v, weight, bias, how), scale=default_scale(scale, q.shape[-1])
    )
    return grads


def _through(function: str, provider: str) -> Callable[[], Kernel]:
    """A function of `kernels.sla` with this provider of block_sparse_attention."""
    load = later("kernels.sla", function)
    return lambda: functools.partial(load(), provider=provider)


def _break_even(call: AttentionCall, capability: Capability) -> str | None:
    if capability.device == "cpu" and call.seq_k < _LEAST_SEQ:
        return f"{call.seq_k} tokens: on CPU choosing and attending to blocks pays from {_LEAST_SEQ} tokens (measured)"
    return None


define_op(
    OP,
    "Tensor? weight=None, Tensor? bias=None, *, float keep_ratio=0.1, str variant='all', str feature_map='softmax', "
    "int block_q=64, int block_k=64, bool compat=False, Tensor? keep_ratios=None, float? scale=None, "
    "str provider='auto'",
    forward=_forward,
    backward=_backward,
    check=_check,
    differentiable=("weight", "bias"),
)

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="sparse",
    summary="few key blocks exactly, the rest by linear attention; without a trained projection the former alone",
    paper="https://arxiv.org/abs/2509.24006",
    params=(
        Param("keep_ratio", 0.1, "Fraction of the key blocks to keep.", low=0.0, high=1.0, tensor="keep_ratios"),
        Param("variant", "all", "Tokens of the linear branch: all, or those of the blocks not kept.", choices=VARIANTS),
        Param("feature_map", "softmax", "Feature map of the linear branch.", choices=FEATURE_MAPS),
        Param("block_q", 64, "Tokens per block of queries.", choices=BLOCKS),
        Param("block_k", 64, "Tokens per block of keys.", choices=BLOCKS),
        Param("compat", False, "Choose blocks by scores rounded to the inputs' dtype, as the published code does."),
    ),
    attached=("weight", "bias"),
    support=Support(causal=False, cross=False),
    break_even=_break_even,
    # Of the sparse part, over the self-attention layers of examples/tiny_video: the median; the worst is 0.51.
    tolerance={"typical": 0.29},
    providers=(
        Provider(
            "triton",
            "Triton kernels for sm_80 and newer; the linear branch of the complement in PyTorch",
            load=_through("attention", "triton"),
            load_backward=_through("attention_backward", "triton"),
            support=TRITON,
        ),
        Provider(
            "cpu",
            "blocks and linear branch in PyTorch, attention in the CPU kernel of block_sparse_attention",
            load=_through("attention", "cpu"),
            load_backward=_through("attention_backward", "cpu"),
            support=Support(devices=("cpu",)),
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.sla", "sparse_linear_attention"),
            load_backward=later("reference.sla", "sparse_linear_attention_backward"),
        ),
    ),
)
