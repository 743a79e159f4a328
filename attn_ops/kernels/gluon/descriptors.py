"""Tensor descriptors, on the host: what the copy engine needs to know of a (B, H, S, D) tensor.

It reads 0 beyond the end of a dimension, and writes nothing there, so that lengths need not be multiples of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_ALIGNMENT = 16
_TYPES = {
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe x, (B, H, M, N) and `readable`, copied a tile of (rows, columns) at a time."""
    block = [1, 1, rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, _TYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), [*_strides(x), 1], block, layout)


def readable(x: Tensor) -> Tensor:
    """Return x itself if the copy engine can address it: rows that start at multiples of 16 bytes. Else a copy."""
    steps = [x.data_ptr(), *(stride * x.element_size() for stride in _strides(x))]
    aligned = x.stride(-1) == 1 and all(step > 0 and step % _ALIGNMENT == 0 for step in steps)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _strides(x: Tensor) -> list[int]:
    """Those of all dimensions but the last; that of a single element is never used, and may be any."""
    return [stride if size > 1 else _ALIGNMENT for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
