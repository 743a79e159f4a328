"""The package flash-attn (FlashAttention 2) as a provider of flash_attention.

Its tensors are (B, S, H, D) and its causal edge is bottom-right, so it serves causal calls with Sq == Sk only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import like_query
from ..spec import Kernel, Provider, Support


def load() -> Kernel:
    """Import the package and return the forward kernel of flash_attention."""
    from flash_attn import flash_attn_func

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, _ = flash_attn_func(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            softmax_scale=scale,
            causal=causal,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            return_attn_probs=True,
        )
        return like_query(out.transpose(1, 2), q), lse

    return attention


PROVIDER = Provider(
    "flash_attn",
    "FlashAttention 2, the package flash-attn",
    load=load,
    support=Support(
        dtypes=(torch.float16, torch.bfloat16),
        window=True,
        causal_cross=False,
        grad=False,
        devices=("cuda",),
        min_sm=80,
        package="flash_attn",
        min_version="2.7",
    ),
    install="pip install flash-attn --no-build-isolation",
)
