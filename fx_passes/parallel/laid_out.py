"""laid_out: the result of an exchange in the memory order of what it replaces."""

from __future__ import annotations

from torch import Tensor


def laid_out(out: Tensor, traced: Tensor) -> Tensor:
    """`out` in the memory order the graph was traced with: a `view` that was legal stays so."""
    strides = [int(stride) for stride in traced.stride()]
    order = sorted(range(out.dim()), key=lambda dim: -strides[dim])
    return out.permute(order).contiguous().permute([order.index(dim) for dim in range(out.dim())])
