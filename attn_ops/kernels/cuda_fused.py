"""Dense attention on CUDA through torch's own fused operators: FlashAttention 2 and memory-efficient.

FlashAttention aligns a causal edge bottom-right and takes no fp32: causal cross-attention and fp32 use the
memory-efficient operator, which aligns top-left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import per_kv_head, per_query_head
from ..layout import empty_result, like_query
from .lse_gradient import with_lse_gradient

_aten = torch.ops.aten
_ALIGNMENT = 8


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, Sq, D), k, v: (B, Hkv, Sk, D). Returns out like q and lse (B, Hq, Sq) fp32."""
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    dim = q.shape[-1]
    q_, k_, v_ = (_aligned(tensor) for tensor in (q, k, v))
    if takes_flash(q.dtype, causal, q.shape[2], k.shape[2]):
        sizes = (None, None, q.shape[2], k.shape[2])
        left, right = _window_sides(window)
        out, lse, *_ = _aten._flash_attention_forward(
            *(q_.transpose(1, 2), k_.transpose(1, 2), v_.transpose(1, 2), *sizes, 0.0, causal, False),
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return like_query(out.transpose(1, 2)[..., :dim], q), lse.contiguous()
    k_, v_ = per_query_head(k_, q.shape[1]), per_query_head(v_, q.shape[1])
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q_, k_, v_, None, True, 0.0, causal, scale=scale)
    return like_query(out[..., :dim], q), lse[..., : q.shape[2]].contiguous()


def attention_backward(
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
    """Gradients of `attention` for q, k and v, in their layouts."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def fused(grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dim = q.shape[-1]
        tensors = [_aligned(tensor) for tensor in (grad_out, q, k, v, out)]
        if takes_flash(q.dtype, causal, q.shape[2], k.shape[2]):
            grads = _flash_backward(tensors, lse, causal, window, scale)
        else:
            grads = _efficient_backward(tensors, lse, causal, scale)
        return grads[0][..., :dim], grads[1][..., :dim], grads[2][..., :dim]

    grads = with_lse_gradient(fused, grad_out, grad_lse, out, q, k, v)
    return like_query(grads[0], q), like_query(grads[1], k), like_query(grads[2], v)


def takes_flash(dtype: torch.dtype, causal: bool, seq_q: int, seq_k: int) -> bool:
    """Whether the FlashAttention operator serves the call exactly."""
    return dtype in (torch.float16, torch.bfloat16) and not (causal and seq_q != seq_k)


def _flash_backward(
    tensors: list[Tensor], lse: Tensor, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, q, k, v, out = (tensor.transpose(1, 2) for tensor in tensors)
    left, right = _window_sides(window)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = _aten._flash_attention_backward(
        *(grad_out, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, no_dropout, no_dropout),
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


def _efficient_backward(
    tensors: list[Tensor], lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, q, k, v, out = tensors
    k_, v_ = per_query_head(k, q.shape[1]), per_query_head(v, q.shape[1])
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    # The operator keeps lse in rows of a multiple of 32.
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    grad_q, grad_k, grad_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
        *(grad_out, q, k_, v_, None, out, lse, no_dropout, no_dropout, 0.0, [True, True, True, False], causal),
        scale=scale,
    )
    return grad_q, per_kv_head(grad_k, k.shape[1]), per_kv_head(grad_v, v.shape[1])


def _window_sides(window: int | None) -> tuple[int | None, int | None]:
    """Keys visible to the left and to the right of the diagonal."""
    return (None, None) if window is None else (window - 1, 0)


def _aligned(tensor: Tensor) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % _ALIGNMENT))
