"""zeros_after: an order of execution that a compiler cannot remove.

Ranks that share a sequence must enter their collectives in one order, forward and backward. In a causal ring one of
them hands on keys that it does not attend to: nothing it computes needs them, and their gradient is zero whatever
comes. A compiler that sees so moves the collective of that gradient into the forward graph, and the ranks wait for
each other for ever. Zeros that an opaque op makes from a tensor have to wait for that tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .op import LIBRARY, NAMESPACE


def _zeros(after: Tensor, size: Sequence[int]) -> Tensor:
    return after.new_zeros(size)


def _keep_size(ctx: Any, inputs: tuple[Tensor, Sequence[int]], output: Tensor) -> None:  # noqa: ARG001
    ctx.size = inputs[0].shape


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return ZEROS_AFTER(grad, ctx.size), None


LIBRARY.define("zeros_after(Tensor after, SymInt[] size) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("zeros_after", _zeros, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::zeros_after", _zeros, lib=LIBRARY)
torch.library.register_autograd(f"{NAMESPACE}::zeros_after", _gradient, setup_context=_keep_size, lib=LIBRARY)

ZEROS_AFTER: torch._ops.OpOverload = torch.ops.sparseattn.zeros_after.default
"""(after, size) -> zeros of after's dtype. The gradient of `after` is zero, and waits for that of the zeros."""
