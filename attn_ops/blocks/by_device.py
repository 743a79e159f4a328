"""The functions of `topk`, by Triton on a GPU that runs it and by PyTorch elsewhere: what methods choose blocks with.

The device alone decides, so that a method's forward, backward and block map agree. Lists and counts of given scores are
the same either way; a mean may differ in its last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..capability import Capability
from ..spec import TRITON
from . import topk


def block_mean(x: Tensor, block: int, sizes: Tensor | None = None) -> Tensor:
    """`topk.block_mean`."""
    if runs_triton(x.device):
        from ..kernels.triton import pool

        return pool.block_mean(x, block, sizes)
    return topk.block_mean(x, block, sizes)


def top_k_blocks(scores: Tensor, keep: int | Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`topk.top_k_blocks`."""
    if runs_triton(scores.device):
        from ..kernels.triton import select

        return select.top_k_blocks(scores, keep, allowed)
    return topk.top_k_blocks(scores, keep, allowed)


def count_to_mass(weights: Tensor, mass: Tensor) -> Tensor:
    """`topk.count_to_mass`."""
    if runs_triton(weights.device):
        from ..kernels.triton import select

        return select.count_to_mass(weights, mass)
    return topk.count_to_mass(weights, mass)


def runs_triton(device: torch.device) -> bool:
    """Whether our Triton kernels run on that device, as its providers require."""
    return device.type == "cuda" and not TRITON.why_not_on(Capability.current(device))
