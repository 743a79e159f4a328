"""`sparge_block_map`: the blocks that `sparge_attention` keeps, as lists.

The lists, their picture and their density are read after the run; the op itself waits for no device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import default_scale
from ..numerics.block_rounding import key_mean
from ..op import LIBRARY, NAMESPACE
from .selection import Selection, select_blocks
from .sparge_arguments import BLOCK_MAP, SELECTION, check_block_map


def sparge_block_map(
    q: Tensor,
    k: Tensor,
    *,
    keep_ratio: float = 0.5,
    mass: float | None = None,
    similarity: float = -1.0,
    sink: bool = False,
    smooth_k: bool = True,
    block_q: int = 128,
    block_k: int = 64,
    keep_ratios: Tensor | None = None,
    masses: Tensor | None = None,
    similarities: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The key blocks that `sparge_attention` keeps with the same arguments, as lists for `block_sparse_attention`.

    `BlockIndex(index, count, block_q, block_k, Sq, Sk).density` is the fraction of blocks kept; it waits for the
    device. `count.sum() / (count.numel() * nk)` is the same as a tensor on the device.

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16.
        k: (B, Hkv, Sk, D).
        keep_ratio, mass, similarity, sink, smooth_k, block_q, block_k, keep_ratios, masses, similarities, causal,
            scale: as in `sparge_attention`.

    Returns:
        index: (B, Hq, nq, nk) int32, ascending, 0 after the count; nq = ceil(Sq / block_q), nk = ceil(Sk / block_k).
        count: (B, Hq, nq) int32, at least 1 where the block of queries may see a key.

    Raises:
        ArgumentError: on wrong shapes, dtypes, strides or thresholds.
    """
    result: tuple[Tensor, Tensor] = torch.ops.sparseattn.sparge_block_map(
        *(q, k),
        keep_ratio=keep_ratio,
        mass=mass,
        similarity=similarity,
        sink=sink,
        smooth_k=smooth_k,
        block_q=block_q,
        block_k=block_k,
        keep_ratios=keep_ratios,
        masses=masses,
        similarities=similarities,
        causal=causal,
        scale=scale,
    )
    return result


def choose(q: Tensor, k: Tensor, how: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """The lists of blocks of q: (B, Hq, Sq, D) and k: (B, Hkv, Sk, D), index and count; k is smoothed here."""
    if how.smooth_k:
        k = k.float() - key_mean(k, block_q=how.block_q, causal=how.causal)
    return select_blocks(q, k, how, scale)


def _forward(q: Tensor, k: Tensor, *, scale: float | None = None, **given: Any) -> tuple[Tensor, Tensor]:
    how = check_block_map(q, k, **given)
    index, count = _fake(q, k, **given)
    if q.numel() == 0 or k.numel() == 0:
        return index.zero_(), count.zero_()
    chosen, number = choose(q, k, how, default_scale(scale, q.shape[-1]))
    return index.copy_(chosen), count.copy_(number)


def _fake(q: Tensor, k: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    how = check_block_map(q, k, **given)
    shape = *q.shape[:2], -(-q.shape[2] // how.block_q)
    index = q.new_empty((*shape, -(-k.shape[2] // how.block_k)), dtype=torch.int32)
    return index, q.new_empty(shape, dtype=torch.int32)


def _autocast(device: str) -> Any:
    """Cast q and k as `sparge_attention` does, and leave the thresholds as they are."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(q: Tensor, k: Tensor, **given: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return torch.ops.sparseattn.sparge_block_map(q.to(dtype), k.to(dtype), **given)

    return kernel


def _define() -> None:
    LIBRARY.define(
        f"{BLOCK_MAP}(Tensor q, Tensor k, *, {SELECTION}) -> (Tensor index, Tensor count)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    for device in ("cpu", "cuda"):
        LIBRARY.impl(BLOCK_MAP, _forward, device.upper())
        LIBRARY.impl(BLOCK_MAP, _autocast(device), f"Autocast{device.upper()}")
    torch.library.register_fake(f"{NAMESPACE}::{BLOCK_MAP}", _fake, lib=LIBRARY)


_define()
