"""attention_error: sums from which the distance of two attention outputs is read, as an op that stands in a graph.

It takes itself apart into torch's operators, so that any device computes it and Inductor fuses it. It has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import LIBRARY


def attention_error(ours: Tensor, dense: Tensor) -> Tensor:
    """Sum up how far `ours` is from `dense`, over the entries where both are finite.

    Args:
        ours: (B, H, S, D) any floating dtype.
        dense: (B, H, S, D) any floating dtype.

    Returns:
        (6,) fp64: the sums of |ours - dense|, |dense|, ours * dense, ours ** 2, dense ** 2, and the number of entries
        that are finite in `dense` and NaN or infinite in `ours`.
    """
    ours, dense = ours.detach().float(), dense.detach().float()
    expected, finite = dense.isfinite(), ours.isfinite()
    lost, zero = expected & ~finite, ours.new_zeros(())
    ours, dense = (torch.where(expected & finite, value, zero) for value in (ours, dense))
    terms = ((ours - dense).abs(), dense.abs(), ours * dense, ours * ours, dense * dense, lost)
    return torch.stack([term.sum(dtype=torch.float64) for term in terms])


LIBRARY.define("attention_error(Tensor ours, Tensor dense) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("attention_error", attention_error, "CompositeImplicitAutograd")

ATTENTION_ERROR = torch.ops.sparseattn.attention_error.default
