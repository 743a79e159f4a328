"""Tensor descriptors of the Hopper kernels, on the host: those of `triton.descriptors`, with the layout of a tile."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..triton.descriptors import addressable, strides

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
    return TensorDescriptor(x, list(x.shape), strides(x), block, layout)


def readable(x: Tensor) -> Tensor:
    """Return x itself if the copy engine can address it, else a copy."""
    return x if addressable(x) else x.clone(memory_format=torch.contiguous_format)
