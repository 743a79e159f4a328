"""SLA from parts: block-sparse attention to the critical blocks, plus the projected linear branch.

Providers differ in who computes the block-sparse part. The linear branch over all tokens is Triton on a GPU that runs
it; over the blocks not kept, where no two blocks of queries share a state, and for its gradients it is PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..blocks.by_device import runs_triton
from ..blocks.sla_method import SlaMethod
from ..layout import like_query
from ..numerics.linear_attention import linear_attention, linear_attention_backward


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    how: SlaMethod,
    *,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    """`sparse_linear_attention` through a provider of `block_sparse_attention`."""
    critical = how.critical_blocks(q, k)
    out, lse = torch.ops.sparseattn.block_sparse_attention(
        q, k, v, *critical, block_q=how.block_q, block_k=how.block_k, scale=scale, provider=provider
    )
    return with_linear_branch(out, q, k, v, weight, bias, how, critical), lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    how: SlaMethod,
    *,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention` for q, k, v, weight and bias, the blocks held fixed; empty where a tensor is None."""
    critical = how.critical_blocks(q, k)
    sparse_out = out
    if weight is not None:
        features = _features(q, k, v, how, critical)
        # By difference, which saves attending again. In half precision it is coarse: no provider relies on it there.
        sparse_out = like_query(out - _projected(features, weight, bias), q)
    grads = torch.ops.sparseattn.block_sparse_attention_backward(
        *(grad_out, grad_lse, sparse_out, lse, q, k, v, *critical, None),
        *(how.block_q, how.block_k, False, scale, provider),
    )
    nothing = grad_out.new_empty(0)
    if weight is None:
        return *grads, nothing, nothing
    grad_out = grad_out.float()
    linear_grads = linear_attention_backward(
        *(grad_out @ weight.float(), features, q, k, v, how.linear_blocks(critical)),
        feature_map=how.feature_map,
        block_q=how.block_q,
        block_k=how.block_k,
    )
    grad_q, grad_k, grad_v = (like_query(a + b, x) for a, b, x in zip(grads, linear_grads, (q, k, v), strict=True))
    grad_weight = like_query(grad_out.flatten(0, 2).mT @ features.flatten(0, 2), weight)
    grad_bias = nothing if bias is None else like_query(grad_out.sum(dim=(0, 1, 2)), bias)
    return grad_q, grad_k, grad_v, grad_weight, grad_bias


def with_linear_branch(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    how: SlaMethod,
    critical: tuple[Tensor, Tensor],
) -> Tensor:
    """The sparse part plus the projected linear branch, like q, in the former's memory or not; no weight, no branch."""
    if weight is None:
        return out
    if how.variant == "all" and runs_triton(q.device):
        from .triton.linear_branch import add_linear_branch

        return add_linear_branch(out, q, k, v, weight, bias, feature_map=how.feature_map)
    return like_query(out + _projected(_features(q, k, v, how, critical), weight, bias), q)


def _features(q: Tensor, k: Tensor, v: Tensor, how: SlaMethod, critical: tuple[Tensor, Tensor]) -> Tensor:
    """The linear branch before its projection, (B, Hq, S, D) fp32."""
    sizes = {"block_q": how.block_q, "block_k": how.block_k}
    return linear_attention(q, k, v, how.linear_blocks(critical), feature_map=how.feature_map, **sizes)


def _projected(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(features, weight.float(), None if bias is None else bias.float())
