"""Let a fused backward that knows nothing of lse carry its gradient too.

Fused backwards compute `grad_s = p * (grad_out @ v.T - sum(grad_out * out))`. With one more channel in which grad_out
is grad_lse, v is 1, and out, q and k are 0, the same formula adds p * grad_lse, which is lse's term (d lse / d s = p).
It costs eight more channels (the alignment of CUDA kernels), and grad_lse is rounded to the dtype of grad_out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(grad_out, out, q, k, v) -> (grad_q, grad_k, grad_v)."""

_EXTRA = 8


def with_lse_gradient(
    backward: Backward, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Call `backward`, adding the gradient of lse, grad_lse: (B, H, Sq), if there is one."""
    if grad_lse is None:
        return backward(grad_out, out, q, k, v)
    dim = q.shape[-1]
    grad_out, out, q, k, v = (torch.nn.functional.pad(t, (0, _EXTRA)) for t in (grad_out, out, q, k, v))
    grad_out[..., dim] = grad_lse
    v[..., dim] = 1
    grad_q, grad_k, grad_v = backward(grad_out, out, q, k, v)
    return grad_q[..., :dim], grad_k[..., :dim], grad_v[..., :dim]
