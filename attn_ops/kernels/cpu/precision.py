"""The precision that a gradient is computed in on CPU, where that of its inputs is not enough.

dS = P * (dP - delta), delta = sum(grad_out * out). Where a softmax is sharp, dP and delta nearly cancel. With q, k and
v 16 times a normal distribution, rounding out to bf16 costs 0.7 % of grad_q, and rounding scores to fp32 costs 5e-5. In
the precisions below nothing but the rounding of the gradients is left, 1.7e-3 and 2.5e-8 (measured).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q, k, v) -> (out, lse) in their dtype."""

LARGE_LSE = 48.0
"""Up to here the rounding of fp32 scores costs less than 1e-5 of a gradient: up to 1.8e-7 * max |lse| (measured)."""


def gradient_dtype(q: Tensor, lse: Tensor) -> torch.dtype:
    """fp32 for halves; fp64 for fp32 if a score is so large that fp32 has too few digits after the point for it."""
    if q.dtype is not torch.float32:
        return torch.promote_types(q.dtype, torch.float32)
    large = (lse.abs() > LARGE_LSE) & (lse != -torch.inf)
    return torch.float64 if bool(large.any()) else torch.float32


def exact_operands(
    attend: Attend, grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same tensors in the precision of the gradient; out and lse computed again where that is not q's."""
    compute = gradient_dtype(q, lse)
    if compute is q.dtype:
        return grad_out, out, lse, q, k, v
    grad_out, q, k, v = (x.to(compute) for x in (grad_out, q, k, v))
    return grad_out, *attend(q, k, v), q, k, v
