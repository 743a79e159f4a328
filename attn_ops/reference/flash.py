"""flash_attention, defined: dense attention with a causal edge and a sliding window."""

from __future__ import annotations

from torch import Tensor

from .attention import masked_attention, masked_attention_backward, token_mask


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, Sq, D) to k, v: (B, Hkv, Sk, D). Returns out like q and lse (B, Hq, Sq)."""
    allowed = token_mask(q.shape[2], k.shape[2], causal=causal, window=window, device=q.device)
    return masked_attention(q, k, v, allowed, scale)


def flash_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `flash_attention` with respect to q, k and v."""
    allowed = token_mask(q.shape[2], k.shape[2], causal=causal, window=window, device=q.device)
    return masked_attention_backward(grad_out, grad_lse, out, lse, q, k, v, allowed, scale)
