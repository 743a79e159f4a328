"""The functions of `blocks/topk.py` through the native kernels: the same lists and counts, means to rounding.

Every tensor whose address is in a structure is held by a local name until the call returns.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ....blocks.topk import UNITS_OF_MASS
from .library import DTYPES, Tokens, check_status, unit_stride


class _BlockMean(ctypes.Structure):
    """Mirrors BlockMean of selection.h, as the others mirror theirs."""

    _fields_ = (
        ("x", Tokens),
        *((name, ctypes.c_void_p) for name in ("sizes", "means")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "block")),
        *((name, ctypes.c_int32) for name in ("channels", "dtype", "threads")),
    )


class _TopK(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "keep", "allowed", "index", "count")),
        *((name, ctypes.c_int64) for name in ("rows", "n")),
        ("threads", ctypes.c_int32),
    )


class _Mass(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "units", "count")),
        *((name, ctypes.c_int64) for name in ("rows", "n")),
        ("threads", ctypes.c_int32),
    )


def block_mean(library: ctypes.CDLL, x: Tensor, block: int, sizes: Tensor | None) -> Tensor:
    """`topk.block_mean` of x: (B, H, S, D), fp32, fp16 or bf16; `block` is at least 1."""
    x, sizes = unit_stride(x), None if sizes is None else sizes.to(torch.int32).contiguous()
    batch, heads, tokens, dim = x.shape
    means = x.new_empty((batch, heads, -(-tokens // block), dim), dtype=torch.float32)
    call = _BlockMean(
        x=Tokens.of(x),
        sizes=None if sizes is None else sizes.data_ptr(),
        means=means.data_ptr(),
        batch=batch,
        heads=heads,
        tokens=tokens,
        block=block,
        channels=dim,
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )
    check_status("block_mean", library.sparseattn_block_mean(ctypes.byref(call)))
    return means


def top_k_blocks(
    library: ctypes.CDLL, scores: Tensor, keep: int | Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`topk.top_k_blocks` of scores: (..., n) fp32, n at least 1; a `keep` that is a number is at least 1."""
    scores, rows = scores.contiguous(), scores.shape[:-1]
    keep = torch.as_tensor(keep, dtype=torch.int64).expand(rows).contiguous()
    allowed = None if allowed is None else allowed.expand(scores.shape).contiguous()
    index, count = (scores.new_empty(shape, dtype=torch.int32) for shape in (scores.shape, rows))
    call = _TopK(
        scores=scores.data_ptr(),
        keep=keep.data_ptr(),
        allowed=None if allowed is None else allowed.data_ptr(),
        index=index.data_ptr(),
        count=count.data_ptr(),
        rows=count.numel(),
        n=scores.shape[-1],
        threads=torch.get_num_threads(),
    )
    check_status("top_k_blocks", library.sparseattn_top_k(ctypes.byref(call)))
    return index, count


def count_to_mass(library: ctypes.CDLL, weights: Tensor, mass: Tensor) -> Tensor:
    """`topk.count_to_mass` of weights: (..., n) fp32."""
    weights, rows = weights.contiguous(), weights.shape[:-1]
    units = (mass * UNITS_OF_MASS).long().expand(rows).contiguous()
    count = weights.new_empty(rows, dtype=torch.int64)
    call = _Mass(
        weights=weights.data_ptr(),
        units=units.data_ptr(),
        count=count.data_ptr(),
        rows=count.numel(),
        n=weights.shape[-1],
        threads=torch.get_num_threads(),
    )
    check_status("count_to_mass", library.sparseattn_count_to_mass(ctypes.byref(call)))
    return count
