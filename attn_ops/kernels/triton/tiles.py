"""Tile sizes: what a program of a kernel computes at a time, by architecture, element size and head dimension.

The tables hold what compiles without register spills and fits into shared memory; tests compile every entry. Where
`sparseattn tune` has measured, its tile is returned, a neighbour of the table's: see `tuned_tiles`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from .tile import Tile
from .tuned_tiles import tunable

_LEAST_TILE = 16
_LEAST_FP8_KEYS = 32
_LARGE_SHARED_MEMORY = (90, 100, 103)
TENSOR_MEMORY = (100, 103)
_FAST_FP64 = (80, 90)


@tunable(owned="rows", walked="keys")
def block_sparse_tile(arch: int, itemsize: int, dim: int, block_q: int, block_k: int) -> Tile:
    """Return the tile of block-sparse attention for these blocks of queries and keys, and `dim` padded channels."""
    if itemsize == 4:  # without tensor cores: IEEE fp32 products are the contract
        tile = Tile(32, 32, 8 if arch == 100 and dim <= 64 else 4, 2) if dim <= 128 else Tile(32, 16, 8, 2)
    elif dim > 128:
        tile = Tile(64, 32, 8, 2)
    elif block_q % 128 == 0 and not (dim == 128 and arch == 80):
        tile = Tile(128, 64, 8, 3 if dim <= 64 or arch in _LARGE_SHARED_MEMORY else 2)
    elif dim == 128:
        tile = Tile(64, 64, 4, 3 if arch in _LARGE_SHARED_MEMORY else 2)
    else:
        tile = Tile(64, 64, 4, 2 if arch == 100 else 3)
    return tile._replace(rows=_tile_within(block_q, tile.rows), keys=_tile_within(block_k, tile.keys))


@tunable(owned="rows", walked="keys")
def block_sparse_grad_q_tile(arch: int, itemsize: int, dim: int, block_q: int, block_k: int) -> Tile:
    """Return the tile of the gradient of queries, of `block_sparse_tile`'s arguments."""
    large = arch in _LARGE_SHARED_MEMORY
    if itemsize == 4:
        tile = Tile(32, 32 if dim <= 64 else 16, 8, 2) if dim <= 128 else Tile(16, 16, 8, 2)
        if dim == 128 and has_fast_fp64(arch):
            tile = Tile(16, 32, 8, 2)
    elif dim > 128:
        tile = Tile(32, 16, 8, 2)
    elif dim == 128 and not large:
        tile = Tile(64, 64, 8, 2)
    elif block_q % 128 == 0:
        tile = Tile(128, 64, 8, 2)
    else:
        tile = Tile(64, 64, 4, 3 if dim <= 64 else 2)
    return tile._replace(rows=_tile_within(block_q, tile.rows), keys=_tile_within(block_k, tile.keys))


@tunable(owned="keys", walked="rows")
def block_sparse_grad_kv_tile(arch: int, itemsize: int, dim: int, block_q: int, block_k: int) -> Tile:
    """Return the tile of the gradients of keys and values, of `block_sparse_tile`'s arguments."""
    large = arch in _LARGE_SHARED_MEMORY
    if itemsize == 4:
        tile = Tile(32, 32 if dim <= 64 else 16, 8, 2) if dim <= 128 else Tile(16, 16, 8, 1)
    elif dim > 128:
        tile = Tile(64 if large else 32, 32, 8, 2)
    elif dim == 128 and not large:
        tile = Tile(64, 64, 8, 2)
    else:
        rows = 32 if dim == 128 or arch in TENSOR_MEMORY else 64
        tile = Tile(rows, 128, 8, 2) if block_k % 128 == 0 else Tile(rows, 64, 4, 2)
    return tile._replace(rows=_tile_within(block_q, tile.rows), keys=_tile_within(block_k, tile.keys))


@tunable(owned="rows")  # half a tile of keys at the edge would be fewer than FP8 tensor cores sum over
def sage_tile(arch: int, dim: int) -> Tile:  # noqa: ARG001  (it may be tuned for one)
    """Return the tile of quantized attention with `dim` padded channels, on every architecture."""
    return _quantized_tile(dim)


@tunable()  # the second stage of `sparge_attention` judges tiles: which they are is part of the result
def sparge_tile(arch: int, dim: int, block_q: int, block_k: int, growing_scale: bool) -> Tile:
    """Return the tile of quantized attention within these blocks; FP8 tensor cores sum over 32 keys or more.

    A scale of V that grows takes registers, where the accumulator is not in them anyway.
    """
    keys = 32 if dim > 128 or (dim == 128 and growing_scale and arch in TENSOR_MEMORY) else 64
    tile = _quantized_tile(dim)
    rows, keys = _tile_within(block_q, tile.rows), max(_LEAST_FP8_KEYS, _tile_within(block_k, keys))
    return Tile(rows, keys, 8 if rows >= 128 or dim > 128 else 4, tile.stages)


def has_fast_fp64(arch: int) -> bool:
    """Whether Triton has tensor cores for fp64 here: as fast as fp32 without them, elsewhere up to 64 times slower."""
    return arch in _FAST_FP64


def target_arch() -> int:
    """Return the compute capability that Triton compiles for, such as 90: that of the current GPU."""
    return int(triton.runtime.driver.active.get_current_target().arch)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def padded_head_dim(head_dim: int, least: int = _LEAST_TILE) -> int:
    """Return the power of two, at least `least`, that holds head_dim channels."""
    return max(least, int(triton.next_power_of_2(head_dim)))


def _quantized_tile(dim: int) -> Tile:
    return Tile(128, 64, 8, 3) if dim <= 128 else Tile(64, 64, 8, 2)


def _tile_within(block: int, most: int) -> int:
    """Return the largest power of two up to `most` that divides a block of tokens.

    A block that no tile of 16 or more divides takes one that reaches over its end; the kernel masks the rest.
    """
    divisor = min(block & -block, most)
    return divisor if divisor >= _LEAST_TILE else min(padded_head_dim(block), most)
