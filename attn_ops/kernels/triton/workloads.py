"""What tiles are judged by: for every key of a table calls that are timed, and small ones that show what they compute.

One tile serves plain calls and masked ones (causal, short blocks of keys, grouped heads), so both are made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import block_sparse, block_sparse_backward, sage, sparge
from .tiles import (
    block_sparse_grad_kv_tile,
    block_sparse_grad_q_tile,
    block_sparse_tile,
    padded_head_dim,
    sage_tile,
    sparge_tile,
)
from .tuned_tiles import TileChoice

Call = Callable[[], tuple[Tensor, ...]]

_LEAST_INT8_DIM = 32
_FP8_ARCH = 89
_SHORT = 10  # tokens that the last block of keys lacks in a masked call
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_TOLERANCE_QUANTIZED = 3e-2  # in FP8; the tests allow as much to the definition


@dataclass(frozen=True)
class Sizes:
    """What a call is of; `blocks` are those of queries and of keys, `density` the part of them that a list has."""

    dtype: torch.dtype
    head_dim: int
    blocks: tuple[int, int]
    device: torch.device | str = "cuda"
    heads: int = 16
    seq: int = 8192
    density: float = 0.25


class Mode(NamedTuple):
    """A masked call or a plain one, and how a quantized kernel has its values."""

    masked: bool
    pv: str = ""


_Make = Callable[[Sizes, Mode], Call]
_MODES = (Mode(False), Mode(True))


class Workload(NamedTuple):
    """The calls for one key; `make` makes one.

    With another tile the results of small calls may differ by `tolerance`, relative in the L2 norm: sums have another
    order, and weights are rounded against another largest score.
    """

    choice: TileChoice
    key: tuple[int, ...]
    sizes: Sizes
    make: _Make
    modes: tuple[Mode, ...]
    tolerance: float

    def timed(self) -> list[Call]:
        """Long enough to fill a GPU."""
        return [self.make(self.sizes, mode) for mode in self.modes]

    def small(self) -> list[Call]:
        """Two blocks of two heads, and for the masked ones fewer channels than the kernel computes."""
        small = replace(self.sizes, heads=2, seq=2 * max(self.sizes.blocks), density=0.75)
        narrow = replace(small, head_dim=padded_head_dim(small.head_dim) - 8)
        return [self.make(narrow if mode.masked else small, mode) for mode in self.modes]


def workloads(kernel: str, sizes: Sizes, arch: int) -> list[Workload]:
    """Those of the keys that calls of these sizes have, on an architecture; `kernel` is one of `KERNELS`."""
    return _WORKLOADS[kernel](sizes, arch)


def _of_block_sparse(choice: TileChoice, make: _Make, sizes: Sizes, arch: int) -> list[Workload]:
    key = arch, sizes.dtype.itemsize, padded_head_dim(sizes.head_dim), *sizes.blocks
    return [Workload(choice, key, sizes, make, _MODES, _TOLERANCE[sizes.dtype])]


def _of_sage(sizes: Sizes, arch: int) -> list[Workload]:
    key = arch, padded_head_dim(sizes.head_dim, least=_LEAST_INT8_DIM)
    modes = tuple(itertools.starmap(Mode, itertools.product((False, True), _pvs(arch))))
    return [Workload(sage_tile, key, sizes, _sage, modes, _TOLERANCE_QUANTIZED)]


def _of_sparge(sizes: Sizes, arch: int) -> list[Workload]:
    key = arch, padded_head_dim(sizes.head_dim, least=_LEAST_INT8_DIM), *sizes.blocks
    plain, masked = ([Mode(masked, pv) for pv in _pvs(arch)] for masked in (False, True))
    # The scale of V grows in calls that are causal and have FP8 values.
    by_growing = ((False, (*plain, masked[0])), (True, tuple(masked[1:])))
    return [
        Workload(sparge_tile, (*key, growing), sizes, _sparge, modes, _TOLERANCE_QUANTIZED)
        for growing, modes in by_growing
        if modes
    ]


def _pvs(arch: int) -> tuple[str, ...]:
    return ("fp16", "fp8") if arch >= _FP8_ARCH else ("fp16",)


def _forward(sizes: Sizes, mode: Mode) -> Call:
    operands, options = _block_sparse_call(sizes, mode)
    return partial(block_sparse.attention, *operands, **options)


def _backward(sizes: Sizes, mode: Mode) -> Call:
    """All of it: the kernels that are not judged take the same time with every tile of the one that is."""
    operands, options = _block_sparse_call(sizes, mode)
    out, lse = block_sparse.attention(*operands, **options)
    return partial(block_sparse_backward.attention_backward, out, None, out, lse, *operands, **options)


def _block_sparse_call(sizes: Sizes, mode: Mode) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    q, k, v = _qkv(sizes, mode)
    index, count = _lists(sizes, k.shape[2])
    valid = None
    if mode.masked:
        blocks_k = -(-k.shape[2] // sizes.blocks[1])
        valid = torch.full((blocks_k,), sizes.blocks[1] - 1, dtype=torch.int32, device=sizes.device)
    return (q, k, v, index, count), {"key_sizes": valid, **_blocks(sizes), **_options(sizes, mode)}


def _sage(sizes: Sizes, mode: Mode) -> Call:
    options: dict[str, Any] = {"granularity": "per_thread", "smooth_k": True, "pv": mode.pv, **_options(sizes, mode)}
    return partial(sage.attention, *_qkv(sizes, mode), **options)


def _sparge(sizes: Sizes, mode: Mode) -> Call:
    q, k, v = _qkv(sizes, mode)
    options: dict[str, Any] = {"smooth_k": True, "pv": mode.pv, "pv_threshold": None}
    options |= {**_blocks(sizes), **_options(sizes, mode)}
    return partial(sparge.attention, q, k, v, *_lists(sizes, k.shape[2]), **options)


def _options(sizes: Sizes, mode: Mode) -> dict[str, Any]:
    return {"causal": mode.masked, "scale": sizes.head_dim**-0.5}


def _blocks(sizes: Sizes) -> dict[str, Any]:
    return {"block_q": sizes.blocks[0], "block_k": sizes.blocks[1]}


def _qkv(sizes: Sizes, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
    """The same noise for every tile; two query heads read one of k and v where there are masks."""
    noise = torch.Generator(sizes.device).manual_seed(0)
    shapes = (sizes.heads, sizes.seq), *[(sizes.heads // (1 + mode.masked), sizes.seq - _SHORT * mode.masked)] * 2
    q, k, v = (
        torch.randn(1, *shape, sizes.head_dim, generator=noise, device=sizes.device).to(sizes.dtype) for shape in shapes
    )
    return q, k, v


def _lists(sizes: Sizes, seq_k: int) -> tuple[Tensor, Tensor]:
    """Blocks drawn at random, equally many for every block of queries."""
    blocks_q, blocks_k = -(-sizes.seq // sizes.blocks[0]), -(-seq_k // sizes.blocks[1])
    noise = torch.Generator(sizes.device).manual_seed(1)
    order = torch.rand(1, sizes.heads, blocks_q, blocks_k, generator=noise, device=sizes.device).argsort(-1)
    index = order[..., : max(1, round(sizes.density * blocks_k))].sort(-1).values.int()
    return index, torch.full(index.shape[:-1], index.shape[-1], dtype=torch.int32, device=sizes.device)


_WORKLOADS: dict[str, Callable[[Sizes, int], list[Workload]]] = {
    "block_sparse": partial(_of_block_sparse, block_sparse_tile, _forward),
    "block_sparse_grad_q": partial(_of_block_sparse, block_sparse_grad_q_tile, _backward),
    "block_sparse_grad_kv": partial(_of_block_sparse, block_sparse_grad_kv_tile, _backward),
    "sage": _of_sage,
    "sparge": _of_sparge,
}
KERNELS = tuple(_WORKLOADS)
"""The kernels whose tiles can be tuned."""
