"""Dense attention on CPU through torch's flash operator, and a causal sliding window in chunks of queries.

The window never builds an Sq x Sk mask: a chunk of C queries looks at C + window - 1 keys. Gradients have a precision
of their own, see `precision`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...heads import per_kv_head, per_query_head
from ...layout import empty_result, like_query
from ..lse_gradient import with_lse_gradient
from .precision import exact_operands

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_CHUNK = (64, 512)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, Sq, D), k, v: (B, Hkv, Sk, D). Returns out like q and lse (B, Hq, Sq) fp32."""
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    if window is not None:
        return _windowed(q, k, v, window, scale)
    out, lse = _forward(q, k, v, 0.0, causal, scale=scale)
    return like_query(out, q), lse.contiguous()


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
    given = q, k, v
    attend = partial(attention, causal=causal, window=window, scale=scale)
    grad_out, out, lse, q, k, v = exact_operands(attend, grad_out, out, lse, q, k, v)

    def dense(grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k_, v_ = per_query_head(k, q.shape[1]), per_query_head(v, q.shape[1])
        grads: tuple[Tensor, Tensor, Tensor]
        if window is not None:
            grads = _windowed_backward(grad_out, out, lse, q, k_, v_, window, scale)
        else:
            grads = _backward(grad_out, q, k_, v_, out, lse, 0.0, causal, scale=scale)
        grad_q, grad_k, grad_v = grads
        return grad_q, per_kv_head(grad_k, k.shape[1]), per_kv_head(grad_v, v.shape[1])

    grad_q, grad_k, grad_v = map(like_query, with_lse_gradient(dense, grad_out, grad_lse, out, q, k, v), given)
    return grad_q, grad_k, grad_v


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = empty_result(q)
    for rows, keys, mask in _chunks(q, k.shape[2], window):
        part, part_lse = _forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=mask, scale=scale)
        sees_a_key = (mask > -torch.inf).any(dim=-1)
        out[:, :, rows] = part
        lse[:, :, rows] = torch.where(sees_a_key, part_lse, -torch.inf)
    return out, lse


def _windowed_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = torch.zeros_like(q)
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    # exp(-inf - 0) = 0 in a row with no key, where -inf - -inf would be NaN.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    for rows, keys, mask in _chunks(q, k.shape[2], window):
        part = _backward(
            *(grad_out[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows]),
            *(0.0, False),
            attn_mask=mask,
            scale=scale,
        )
        grad_q[:, :, rows] = part[0]
        grad_k[:, :, keys] += part[1]
        grad_v[:, :, keys] += part[2]
    return grad_q, grad_k, grad_v


def _chunks(q: Tensor, seq_k: int, window: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(query rows, keys they may see, additive mask between them) for every chunk of queries that sees a key."""
    size = min(max(window, _CHUNK[0]), _CHUNK[1])
    for start in range(0, q.shape[2], size):
        stop = min(start + size, q.shape[2])
        first, last = max(0, start - window + 1), min(stop, seq_k)
        if first >= last:
            return
        distance = torch.arange(start, stop, device="cpu")[:, None] - torch.arange(first, last, device="cpu")[None, :]
        hidden = (distance < 0) | (distance >= window)
        mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        yield slice(start, stop), slice(first, last), mask
