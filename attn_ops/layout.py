"""Memory layout of results: the output of attention follows the query's stride order, the lse is contiguous."""

from __future__ import annotations

import torch
from torch import Tensor


def like_query(out: Tensor, q: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`out` in the layout of `torch.empty_like(q)`: itself if it has it already, else a copy. Both (B, H, S, D).

    dtype: that of the result, where it is not q's.
    """
    target = torch.empty_like(q, dtype=dtype)
    if out.dtype == target.dtype and out.stride() == target.stride():
        return out
    return target.copy_(out)


def empty_result(q: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The result of attending to no key: out = 0 like q, lse = -inf, (B, H, S) fp32; fp64 for a q in fp64.

    dtype: that of out, where it is not q's.
    """
    out = torch.zeros_like(q, dtype=dtype)
    return out, q.new_full(q.shape[:-1], -torch.inf, dtype=torch.promote_types(out.dtype, torch.float32))
