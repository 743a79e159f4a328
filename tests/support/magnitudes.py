"""What the gradients of scores are sums of: the largest that roundings of their terms can add up to."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.attn_ops.heads import per_kv_head, per_query_head


def gradient_magnitudes(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The sums that the gradients of q and k are, with every term replaced by its magnitude (all in fp64).

    A gradient of a score is weight * (grad_out . v - grad_out . out + grad_lse), and its terms may all cancel.
    """
    heads = q.shape[1]
    scores = (scale * (q @ per_query_head(k, heads).mT)).masked_fill(~allowed, -torch.inf)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0)  # a row with no key is inf - inf
    of_weights = grad_out.abs() @ per_query_head(v.abs(), heads).mT
    of_row = (weights * of_weights).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        of_row += grad_lse.abs().unsqueeze(-1)
    of_scores = abs(scale) * weights * (of_weights + of_row)
    return of_scores @ per_query_head(k.abs(), heads), per_kv_head(of_scores.mT @ q.abs(), k.shape[1])
