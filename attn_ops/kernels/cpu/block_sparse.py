"""Block-sparse attention on CPU: the native kernel where there is one, else blocks gathered for torch's flash operator.

The native kernel serves every call, but for gradients that need fp64; whether it is there is decided once per process,
by `native.library.kernel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import empty_result
from . import gathered, gathered_backward
from .native import block_sparse as native
from .native.library import kernel
from .precision import gradient_dtype


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, Sq, D), k, v: (B, Hkv, Sk, D). Returns out like q and lse (B, Hq, Sq) fp32."""
    if q.numel() == 0 or k.numel() == 0 or block_index.numel() == 0:
        return empty_result(q)
    lists = block_index, block_count, key_sizes
    library = kernel().library
    if library is None:
        return gathered.attention(q, k, v, *lists, block_q=block_q, block_k=block_k, causal=causal, scale=scale)
    return native.attention(library, q, k, v, *lists, block_q=block_q, block_k=block_k, causal=causal, scale=scale)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` for q, k and v, in their layouts."""
    if q.numel() == 0 or k.numel() == 0 or block_index.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    tensors = grad_out, grad_lse, out, lse, q, k, v, block_index, block_count, key_sizes
    library = kernel().library
    if library is None or gradient_dtype(q, lse) is torch.float64:
        return gathered_backward.attention_backward(
            *tensors, block_q=block_q, block_k=block_k, causal=causal, scale=scale
        )
    return native.attention_backward(library, *tensors, block_q=block_q, block_k=block_k, causal=causal, scale=scale)
