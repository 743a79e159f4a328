"""Tensor descriptors, on the host: what the copy engine of sm_90 and newer needs to know of a (B, H, S, D) tensor.

It reads 0 beyond the end of a dimension, and writes nothing there, so that lengths need not be multiples of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe x, (B, H, M, N) and `addressable`, copied a tile of (rows, columns) at a time."""
    return TensorDescriptor(x, list(x.shape), strides(x), [1, 1, rows, columns])


def addressable(x: Tensor) -> bool:
    """Whether the copy engine can address x: its rows start at multiples of 16 bytes."""
    steps = [x.data_ptr(), *(stride * x.element_size() for stride in strides(x)[:-1])]
    return x.stride(-1) == 1 and all(step > 0 and step % _ALIGNMENT == 0 for step in steps)


def strides(x: Tensor) -> list[int]:
    """Those of x, of unit stride on the last; that of a single element is never used, and may be any."""
    return [*(stride if n > 1 else _ALIGNMENT for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)), 1]


def without_padding(v: Tensor, key_sizes: Tensor, block_k: int) -> Tensor:
    """Return v with 0 for tokens that no block has: what they hold may be NaN, which a weight of 0 does not hide."""
    token = torch.arange(v.shape[2], device=v.device)
    exists = token % block_k < key_sizes.repeat_interleave(block_k)[: v.shape[2]]
    return torch.where(exists.unsqueeze(-1), v, 0)
