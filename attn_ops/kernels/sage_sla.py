"""SageSLA in steps: choose the critical blocks, run a quantized kernel on them, add the projected linear branch."""

from __future__ import annotations

from torch import Tensor

from ..blocks.block_index import mask_of
from ..blocks.sla_method import SlaMethod
from ..spec import Kernel
from .sla import with_linear_branch


def on_lists(attend: Kernel) -> Kernel:
    """With `attend(q, k, v, index, count, *, block_q, block_k, pv, smooth_k, pv_threshold, causal, scale)`."""

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        how: SlaMethod,
        *,
        pv: str,
        smooth_k: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        critical = how.critical_blocks(q, k)
        out, lse = attend(
            *(q, k, v, *critical),
            block_q=how.block_q,
            block_k=how.block_k,
            pv=pv,
            smooth_k=smooth_k,
            pv_threshold=None,
            causal=False,
            scale=scale,
        )
        return with_linear_branch(out, q, k, v, weight, bias, how, critical), lse

    return kernel


def on_map(attend: Kernel) -> Kernel:
    """With `attend(q, k, v, block_map, *, scale)`, which rounds in one way: its why_not has compared that with `pv`."""

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        how: SlaMethod,
        *,
        pv: str,  # noqa: ARG001
        smooth_k: bool,  # noqa: ARG001
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        critical = how.critical_blocks(q, k)
        out, lse = attend(q, k, v, mask_of(*critical, critical[0].shape[-1]), scale=scale)
        return with_linear_branch(out, q, k, v, weight, bias, how, critical), lse

    return kernel
