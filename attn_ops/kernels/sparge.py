"""SpargeAttention in two steps: choose the blocks, then run a kernel that takes them, as lists or as a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..blocks.block_index import mask_of
from ..blocks.selection import Selection, Threshold
from ..blocks.sparge_map import choose
from ..spec import Kernel


def on_lists(attend: Kernel) -> Kernel:
    """The selection, then `attend(q, k, v, index, count, *, block_q, block_k, smooth_k, causal, pv, scale, ...)`."""

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, *, how: Selection, pv_threshold: Threshold | None, **modes: Any
    ) -> tuple[Tensor, Tensor]:
        if pv_threshold is not None and not isinstance(pv_threshold, Tensor):
            pv_threshold = torch.full((), pv_threshold, dtype=torch.float32, device=q.device)
        result: tuple[Tensor, Tensor] = attend(
            *(q, k, v, *choose(q, k, how, modes["scale"])),
            block_q=how.block_q,
            block_k=how.block_k,
            smooth_k=how.smooth_k,
            causal=how.causal,
            pv_threshold=pv_threshold,
            **modes,
        )
        return result

    return kernel


def on_map(attend: Kernel) -> Kernel:
    """The selection, then `attend(q, k, v, block_map, *, scale, pv_threshold)`."""

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        how: Selection,
        pv_threshold: Threshold | None,
        pv: str,  # noqa: ARG001  (its kernel for a GPU rounds in one way, which its why_not has compared with this)
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        block_map = mask_of(*choose(q, k, how, scale), -(-k.shape[2] // how.block_k))
        result: tuple[Tensor, Tensor] = attend(q, k, v, block_map, scale=scale, pv_threshold=pv_threshold)
        return result

    return kernel
