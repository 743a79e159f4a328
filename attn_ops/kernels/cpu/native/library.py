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

from .build import BuildError, library_path

SWITCH = "SPARSEATTN_CPU_KERNEL"
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


def detail() -> str:
    """One line for `sparseattn backends`."""
    return kernel().detail


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
