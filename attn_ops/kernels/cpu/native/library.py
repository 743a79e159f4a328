"""The compiled kernel as a ctypes library: loaded once per process, or the reason why not.

The structures mirror those of block_sparse.h, field by field.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ....errors import ArgumentError
from .build import SWITCH, BuildError, library_path

DONE, BAD_LISTS = 0, 1

_log = logging.getLogger(__name__)


class Tokens(ctypes.Structure):
    """(batch, heads, tokens, channels), unit stride on channels."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )

    @classmethod
    def of(cls, tensor: Tensor) -> Tokens:
        """A view of the tensor, which must outlive it."""
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class Lists(ctypes.Structure):
    """(batch or 1, heads or 1, rows), each row a list with unit stride, or one number."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    )

    @classmethod
    def of(cls, tensor: Tensor) -> Lists:
        """A view of the tensor, which must outlive it; what has one batch or head is shared by all."""
        batch, head, row = tensor.stride()[:3]
        return cls(tensor.data_ptr(), batch * (tensor.shape[0] > 1), head * (tensor.shape[1] > 1), row)


class Call(ctypes.Structure):
    """The arguments of both entry points."""

    _fields_ = (
        *((name, Tokens) for name in ("q", "k", "v", "out", "grad_out", "grad_q")),
        *((name, ctypes.c_void_p) for name in ("lse", "grad_lse", "grad_k", "grad_v")),
        *((name, Lists) for name in ("index", "count")),
        ("key_sizes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "seq_q", "seq_k", "block_q", "block_k")),
        *((name, ctypes.c_int64) for name in ("width", "splits")),
        *((name, ctypes.c_int32) for name in ("channels", "dtype", "causal", "threads")),
        ("scale", ctypes.c_float),
    )


class Kernel(NamedTuple):
    """The library, or None, and in words what is used and why."""

    library: ctypes.CDLL | None
    detail: str


@functools.cache
def kernel() -> Kernel:
    """Load the kernel, compiling it if need be. Never raises; logs the outcome once."""
    if os.environ.get(SWITCH) == "0":
        found = Kernel(None, f"gathered blocks: {SWITCH}=0")
        _log.info("CPU kernel: %s", found.detail)
        return found
    try:
        path, name = library_path()
        found = Kernel(ctypes.CDLL(str(path)), f"native kernel, {name}")
        _log.info("CPU kernel: %s, %s", found.detail, path)
    except (BuildError, OSError) as error:
        found = Kernel(None, f"gathered blocks: no native kernel, because {error}")
        _log.warning("CPU kernel: %s", found.detail)
    return found


def library_for(x: Tensor) -> ctypes.CDLL | None:
    """The library; None where there is none, or for a tensor that is traced and has no address."""
    return kernel().library if type(x) in (Tensor, torch.nn.Parameter) else None


def detail() -> str:
    """One line for `sparseattn backends`."""
    return kernel().detail


def integer_detail() -> str:
    """Likewise, of what has INT8 scores."""
    found = kernel()
    if found.library is None:
        return found.detail.replace("gathered blocks", "operators of torch")
    how = "INT8 products by VNNI" if found.library.sparseattn_has_vnni() else "INT8 products in 16 bits, without VNNI"
    return f"{found.detail}; {how}"


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unit_stride(x: Tensor) -> Tensor:
    """`x`, or a copy if its last dimension has another stride than 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    """A result in x's layout, or where that would not have unit stride on the last dimension a contiguous one."""
    result = torch.empty_like(x)
    return result if result.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def check_status(op: str, status: int, *, blocks: int = 0, width: int = 0) -> None:
    """Raise what a status of an entry point means; `blocks` and `width` are what lists were to number and to fit in."""
    if status == BAD_LISTS:
        must = f"number the {blocks} key blocks from 0, and block_count be at most {width}"
        raise ArgumentError(op, "block_index", must, "other values")
    if status != DONE:
        raise MemoryError(f"{op}: no memory for the buffers of its threads.")
