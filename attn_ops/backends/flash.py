"""flash: exact attention, `softmax(scale * q @ k.T) @ v`, through the best dense kernel of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..call import AttentionCall
from ..capability import Capability
from ..checks import check_qkv, default_scale
from ..errors import ArgumentError
from ..op import define_op
from ..resolve import AUTO, backward_kernel, forward_kernel
from ..spec import BackendSpec, Kernel, Provider, Support, later
from ..vendors import flash_attn

if TYPE_CHECKING:
    from collections.abc import Callable

NAME, OP = "flash", "flash_attention"
HALVES = (torch.float16, torch.bfloat16)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Exact attention, softmax(scale * q @ k.T) @ v.

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, Sk, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        causal: query i sees keys 0 ... i, aligned top-left as in `scaled_dot_product_attention`.
        window: query i sees keys i - window + 1 ... i; needs `causal`.
        scale: factor on the scores; None means D ** -0.5.
        provider: "torch", "flash_attn", "reference", or "auto" for the first of these that can serve the call.

    Returns:
        out: (B, Hq, Sq, D), q's dtype and stride order. A row that sees no key is 0.
        lse: (B, Hq, Sq) fp32, natural logarithm of the softmax denominator; -inf for a row that sees no key.

    Raises:
        ArgumentError: on wrong shapes, dtypes or strides, or a window without causal.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.

    Differentiable in q, k and v through out and lse; double backward and forward mode are refused.
    Paper: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691.
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.flash_attention(
        q, k, v, causal=causal, window=window, scale=scale, provider=provider
    )
    return result


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,  # noqa: ARG001  (one signature for the op's kernels)
    provider: str = AUTO,  # noqa: ARG001
) -> None:
    check_qkv(OP, q, k, v)
    if window is not None and window < 1:
        raise ArgumentError(OP, "window", "be at least 1, or None", window)
    if window is not None and not causal:
        raise ArgumentError(OP, "window", "come with causal=True", window, "Pass causal=True.")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, causal=causal, window=window)
    kernel = forward_kernel(NAME, provider, q, k, causal=causal, window=window)
    result: tuple[Tensor, Tensor] = kernel(
        q, k, v, causal=causal, window=window, scale=default_scale(scale, q.shape[-1])
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
    causal: bool,
    window: int | None,
    scale: float | None,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = backward_kernel(NAME, provider, q, k, causal=causal, window=window)
    scale = default_scale(scale, q.shape[-1])
    grads: tuple[Tensor, Tensor, Tensor] = kernel(
        grad_out, grad_lse, out, lse, q, k, v, causal=causal, window=window, scale=scale
    )
    return grads


def _fused(name: str) -> Callable[[], Kernel]:
    def load() -> Kernel:
        from ..kernels import cuda_fused
        from ..kernels.cpu import flash

        on_cpu, on_cuda = getattr(flash, name), getattr(cuda_fused, name)

        def kernel(first: Tensor, *args: object, **kwargs: object) -> object:
            return (on_cuda if first.is_cuda else on_cpu)(first, *args, **kwargs)

        return kernel

    return load


def _why_not_fused(call: AttentionCall, capability: Capability) -> list[str]:
    on_flash = call.dtype in HALVES and call.head_dim <= 256 and not (call.causal and call.kind == "cross")
    if capability.device == "cuda" and call.window is not None and not on_flash:
        return ["a sliding window on CUDA needs float16 or bfloat16, head_dim up to 256 and as many keys as queries"]
    return []


define_op(
    OP,
    "*, bool causal=False, int? window=None, float? scale=None, str provider='auto'",
    forward=_forward,
    backward=_backward,
    check=_check,
)

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="exact",
    summary="exact attention through the best dense kernel",
    paper="https://arxiv.org/abs/2307.08691",
    support=Support(window=True),
    tolerance={"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3},
    providers=(
        Provider(
            "torch",
            "PyTorch's own fused kernels (CPU flash; CUDA flash and memory-efficient)",
            load=_fused("attention"),
            load_backward=_fused("attention_backward"),
            support=Support(window=True, devices=("cpu", "cuda")),
            why_not=_why_not_fused,
        ),
        flash_attn.PROVIDER,
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.flash", "flash_attention"),
            load_backward=later("reference.flash", "flash_attention_backward"),
            support=Support(window=True),
        ),
    ),
)
