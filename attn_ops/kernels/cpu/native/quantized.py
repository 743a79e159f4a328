"""Rounding of tokens to INT8 and attention with INT8 scores through the native kernels.

Every tensor whose address is in a structure is held by a local name until the call returns.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ....layout import like_query
from ....numerics.quantize import Groups
from .library import DTYPES, Call, Lists, Tokens, check_status, empty_like, unit_stride

_LANE_PAD = 16


class Rounding(ctypes.Structure):
    """The arguments of `sparseattn_round`; mirrors quantized.h."""

    _fields_ = (
        ("x", Tokens),
        *((name, ctypes.c_void_p) for name in ("mean", "along", "integers", "scales", "sums", "products")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "along_heads", "tokens", "pitch")),
        *((name, ctypes.c_int64) for name in ("period", "lanes", "run")),
        *((name, ctypes.c_int32) for name in ("channels", "dtype", "threads")),
    )


class QuantizedCall(ctypes.Structure):
    """The arguments of `sparseattn_quantized_forward`, likewise."""

    _fields_ = (
        ("call", Call),
        *((name, ctypes.c_void_p) for name in ("q", "k", "q_scales", "k_scales", "k_sums", "lse_shift")),
        ("pitch", ctypes.c_int64),
        ("v_dtype", ctypes.c_int32),
    )


class Rounded(NamedTuple):
    """Tokens rounded to INT8.

    Args:
        integers: (B, H, S, P) int8: D channels, then zeros up to a multiple of 16.
        scales: (B, H, S) fp32, one for every token, whatever shares it.
        sums: (B, H, S) int32, of a token's integers.
        products: (B, H, S) fp32, tokens as given times a vector, or None without one.
    """

    integers: Tensor
    scales: Tensor
    sums: Tensor
    products: Tensor | None


def rounded(
    library: ctypes.CDLL, x: Tensor, groups: Groups, *, mean: Tensor | None = None, along: Tensor | None = None
) -> Rounded:
    """Round x: (B, H, S, D) as `quantize_int8` does, without the mean: (B, H, 1, D) fp32 if there is one.

    along: (B, Hkv, 1, D) fp32, the vector of `products`; head h takes that of head h // (H / Hkv).
    """
    x = unit_stride(x)
    mean, along = (None if of is None else of.contiguous() for of in (mean, along))
    batch, heads, seq, dim = x.shape
    pitch = -(-dim // _LANE_PAD) * _LANE_PAD
    integers = x.new_empty((batch, heads, seq, pitch), dtype=torch.int8)
    scales, sums = (x.new_empty((batch, heads, seq), dtype=dtype) for dtype in (torch.float32, torch.int32))
    products = None if along is None else torch.empty_like(scales)
    call = Rounding(
        x=Tokens.of(x),
        mean=_address(mean),
        along=_address(along),
        integers=integers.data_ptr(),
        scales=scales.data_ptr(),
        sums=sums.data_ptr(),
        products=_address(products),
        batch=batch,
        heads=heads,
        along_heads=0 if along is None else along.shape[1],
        tokens=seq,
        pitch=pitch,
        period=groups.period,
        lanes=groups.lanes,
        run=groups.run,
        channels=dim,
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )
    check_status("quantize", library.sparseattn_round(ctypes.byref(call)))
    return Rounded(integers, scales, sums, products)


def given(integers: Tensor, scales: Tensor) -> Rounded:
    """Integers: (B, H, S, D) int8 with the scales of their tokens, (B, H, S) fp32, as the kernel reads them."""
    padding = -integers.shape[3] % _LANE_PAD
    integers = torch.nn.functional.pad(integers, (0, padding)).contiguous() if padding else integers.contiguous()
    return Rounded(integers, scales.contiguous(), integers.sum(dim=-1, dtype=torch.int32), None)


def attention(
    library: ctypes.CDLL,
    q: Tensor,
    queries: Rounded,
    keys: Rounded,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    lse_shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention to the listed blocks, scores from the integers.

    Args:
        library: the native kernels.
        q: (B, Hq, Sq, D); only its shape, dtype and layout are used, for out.
        queries: q rounded.
        keys: k rounded, (B, Hkv, Sk, ...).
        v: (B, Hkv, Sk, D) bf16 or fp16.
        block_index, block_count: as of `block_sparse_attention`.
        block_q, block_k, causal, scale: likewise.
        lse_shift: (B, Hq, Sq) fp32, contiguous, added to the lse.

    Returns:
        out like q and lse (B, Hq, Sq) fp32.
    """
    batch, heads, seq_q, dim = q.shape
    v, block_index = unit_stride(v), unit_stride(block_index)
    out, lse = empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    call = Call(
        v=Tokens.of(v),
        out=Tokens.of(out),
        lse=lse.data_ptr(),
        index=Lists.of(block_index),
        count=Lists.of(block_count),
        batch=batch,
        heads=heads,
        kv_heads=v.shape[1],
        seq_q=seq_q,
        seq_k=v.shape[2],
        block_q=block_q,
        block_k=block_k,
        width=block_index.shape[3],
        channels=dim,
        dtype=DTYPES[q.dtype],
        causal=causal,
        threads=torch.get_num_threads(),
        scale=scale,
    )
    quantized = QuantizedCall(
        call=call,
        q=queries.integers.data_ptr(),
        k=keys.integers.data_ptr(),
        q_scales=queries.scales.data_ptr(),
        k_scales=keys.scales.data_ptr(),
        k_sums=keys.sums.data_ptr(),
        lse_shift=_address(lse_shift),
        pitch=queries.integers.shape[3],
        v_dtype=DTYPES[v.dtype],
    )
    status = library.sparseattn_quantized_forward(ctypes.byref(quantized))
    check_status("quantized attention", status, blocks=-(-v.shape[2] // block_k), width=block_index.shape[3])
    return like_query(out, q), lse


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
