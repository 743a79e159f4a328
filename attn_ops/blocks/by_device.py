"""The functions of `topk`, by Triton on a GPU that runs it, by native code on a CPU, else by PyTorch.

What methods choose blocks with. The device alone decides, so that a method's forward, backward and block map agree.
Lists and counts of given scores are the same either way; a mean may differ in its last bits.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from ..call import FLOAT_DTYPES
from ..capability import Capability
from ..spec import TRITON
from . import topk


def block_mean(x: Tensor, block: int, sizes: Tensor | None = None) -> Tensor:
    """`topk.block_mean`."""
    if runs_triton(x.device):
        from ..kernels.triton import pool

        return pool.block_mean(x, block, sizes)
    if block >= 1 and (library := _native(x)):
        from ..kernels.cpu.native import selection

        return selection.block_mean(library, x, block, sizes)
    return topk.block_mean(x, block, sizes)


def top_k_blocks(scores: Tensor, keep: int | Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`topk.top_k_blocks`."""
    if runs_triton(scores.device):
        from ..kernels.triton import select

        return select.top_k_blocks(scores, keep, allowed)
    if scores.dtype is torch.float32 and (isinstance(keep, Tensor) or keep >= 1) and (library := _native(scores)):
        from ..kernels.cpu.native import selection

        return selection.top_k_blocks(library, scores, keep, allowed)
    return topk.top_k_blocks(scores, keep, allowed)


def count_to_mass(weights: Tensor, mass: Tensor) -> Tensor:
    """`topk.count_to_mass`."""
    if runs_triton(weights.device):
        from ..kernels.triton import select

        return select.count_to_mass(weights, mass)
    if library := _native(weights):
        from ..kernels.cpu.native import selection

        return selection.count_to_mass(library, weights, mass)
    return topk.count_to_mass(weights, mass)


def _native(x: Tensor) -> CDLL | None:
    """The native kernels if they take x."""
    if x.device.type != "cpu" or x.dtype not in FLOAT_DTYPES or x.numel() == 0:
        return None
    from ..kernels.cpu.native.library import library_for

    return library_for(x)


def runs_triton(device: torch.device) -> bool:
    """Whether our Triton kernels run on that device, as its providers require."""
    return device.type == "cuda" and not TRITON.why_not_on(Capability.current(device))
