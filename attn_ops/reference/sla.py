"""sparse_linear_attention, defined: exact attention to the chosen blocks plus projected linear attention.

out = softmax(scale * q @ k.T on the chosen blocks) @ v + W @ o_l + b
o_l = A @ v / (sum(A) + epsilon),  A = phi(q) @ phi(k).T   over all tokens, epsilon 1e-5 (variant "all"), or over the
                                                           tokens of the other blocks, epsilon 0 ("complement")
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import elu, linear

from ..blocks.sla_method import SlaMethod
from ..heads import per_kv_head, per_query_head
from ..layout import like_query
from .attention import masked_attention, masked_attention_backward


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    how: SlaMethod,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q: (B, Hq, S, D), k, v: (B, Hkv, S, D), weight: (D, D), bias: (D,). Returns out like q, lse (B, Hq, S)."""
    chosen = chosen_tokens(q, k, how)
    out, lse = masked_attention(q, k, v, chosen, scale)
    if weight is not None:
        out = out + _projected(linear_attention(q, k, v, chosen, how), weight, bias)
    return like_query(out, q), lse


def sparse_linear_attention_backward(
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
) -> tuple[Tensor, ...]:
    """Gradients for q, k, v, weight and bias, the blocks held fixed; empty for what is None."""
    chosen = chosen_tokens(q, k, how)
    nothing = grad_out.new_empty(0)
    sparse = masked_attention_backward(grad_out, grad_lse, out, lse, q, k, v, chosen, scale)
    if weight is None:
        return *(like_query(grad, x) for grad, x in zip(sparse, (q, k, v), strict=True)), nothing, nothing
    features = linear_attention(q, k, v, chosen, how)
    compute = features.dtype
    grad_out = grad_out.to(compute)
    grad_features = grad_out @ weight.to(compute)
    smooth = linear_attention_backward(grad_features, features, q, k, v, chosen, how)
    grad_weight = torch.einsum("bhsi,bhsj->ij", grad_out, features)
    grad_bias = nothing if bias is None else grad_out.sum(dim=(0, 1, 2)).to(bias.dtype)
    grads = (like_query(a + b, x) for a, b, x in zip(sparse, smooth, (q, k, v), strict=True))
    return *grads, like_query(grad_weight, weight), grad_bias


def linear_attention(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, how: SlaMethod) -> Tensor:
    """o_l, (B, Hq, S, D); fp64 for fp64 inputs, else fp32. 0 where there is nothing to attend to."""
    weights, total = _weights(q, k, chosen, how)
    return weights @ per_query_head(v.to(weights.dtype), q.shape[1]) / total


def linear_attention_backward(
    grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, how: SlaMethod
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear_attention` for q, k and v. dA = (grad_out @ v.T - sum(grad_out * out)) / denominator."""
    weights, total = _weights(q, k, chosen, how)
    heads, kv_heads, compute = q.shape[1], k.shape[1], weights.dtype
    v_ = per_query_head(v.to(compute), heads)
    grad_weights = (grad_out @ v_.mT - (grad_out * out).sum(dim=-1, keepdim=True)) / total
    if how.variant == "complement":
        grad_weights = grad_weights.masked_fill(chosen, 0.0)
    phi_q, phi_k = phi(q.to(compute), how.feature_map), phi(per_query_head(k.to(compute), heads), how.feature_map)
    grad_q = _phi_backward(grad_weights @ phi_k, q.to(compute), how.feature_map)
    grad_k = _phi_backward(grad_weights.mT @ phi_q, per_query_head(k.to(compute), heads), how.feature_map)
    grad_v = (weights / total).mT @ grad_out
    return grad_q, per_kv_head(grad_k, kv_heads), per_kv_head(grad_v, kv_heads)


def phi(x: Tensor, feature_map: str) -> Tensor:
    """The feature map, over channels."""
    if feature_map == "softmax":
        return x.softmax(dim=-1)
    return elu(x) + 1 if feature_map == "elu" else x.relu()


def _phi_backward(grad: Tensor, x: Tensor, feature_map: str) -> Tensor:
    if feature_map == "softmax":
        features = x.softmax(dim=-1)
        return features * (grad - (grad * features).sum(dim=-1, keepdim=True))
    slope = x.exp().clamp(max=1) if feature_map == "elu" else x > 0
    return grad * slope


def _weights(q: Tensor, k: Tensor, chosen: Tensor, how: SlaMethod) -> tuple[Tensor, Tensor]:
    """A, (B, Hq, S, S), and its denominator, (B, Hq, S, 1), 1 where it would be 0."""
    compute = torch.promote_types(q.dtype, torch.float32)
    keys = per_query_head(k.to(compute), q.shape[1])
    weights = phi(q.to(compute), how.feature_map) @ phi(keys, how.feature_map).mT
    if how.variant == "all":
        return weights, weights.sum(dim=-1, keepdim=True) + 1e-5
    weights = weights.masked_fill(chosen, 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    return weights, total.masked_fill(total == 0, 1.0)


def chosen_tokens(q: Tensor, k: Tensor, how: SlaMethod) -> Tensor:
    """(B, Hq, S, S) bool, True where a query may see a key of a chosen block."""
    rows = chosen_blocks(q, k, how).repeat_interleave(how.block_q, dim=2)[:, :, : q.shape[2]]
    return rows.repeat_interleave(how.block_k, dim=3)[..., : k.shape[2]]


def chosen_blocks(q: Tensor, k: Tensor, how: SlaMethod) -> Tensor:
    """(B, Hq, nq, nk) bool, True where a block of queries keeps a block of keys; scores in fp64."""

    def rounded(x: Tensor) -> Tensor:
        return x.to(q.dtype).double() if how.compat else x

    q_, k_ = q.double(), per_query_head(k.double(), q.shape[1])
    k_ = rounded(k_ - rounded(k_.mean(dim=2, keepdim=True)))
    queries = torch.stack([rounded(block.mean(dim=2)) for block in torch.split(q_, how.block_q, dim=2)], dim=2)
    keys = torch.stack([rounded(block.mean(dim=2)) for block in torch.split(k_, how.block_k, dim=2)], dim=2)
    order = rounded(queries @ keys.mT).sort(dim=-1, descending=True, stable=True).indices
    rank, nk = order.argsort(dim=-1), keys.shape[2]
    if how.keep_ratios is None:
        return rank < max(1, int(how.keep_ratio * nk))
    kept = [max(1, int(round(ratio, 6) * nk)) for ratio in how.keep_ratios.reshape(-1).tolist()]
    return rank < torch.tensor(kept, device=q.device).reshape(-1, 1, 1)


def _projected(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(features, weight.to(features.dtype), None if bias is None else bias.to(features.dtype))
