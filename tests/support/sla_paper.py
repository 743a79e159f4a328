"""SLA as its paper writes it, in fp64 with dense masks: what the tests of SLA and SageSLA compare with.

Differentiable by autograd, and independent of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def paper_sla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    keep: int | list[int],
    variant: str = "all",
    feature_map: str = "softmax",
    block_q: int = 64,
    block_k: int = 64,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Out and lse in fp64. `keep` is the number of blocks, of all heads or of every head."""
    heads = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = q.double()
    k, v = (x.double().repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    with torch.no_grad():
        critical = critical_tokens(q, k, keep, block_q, block_k)
    scores = scale * q @ k.mT
    weights = functional.softmax(scores.masked_fill(~critical, -torch.inf), dim=-1)
    out = weights @ v
    if weight is not None:
        out = out + functional.linear(linear_part(q, k, v, critical, variant, feature_map), weight, bias)
    return out, scores.masked_fill(~critical, -torch.inf).logsumexp(dim=-1)


def linear_part(q: Tensor, k: Tensor, v: Tensor, critical: Tensor, variant: str, feature_map: str) -> Tensor:
    phi = {
        "softmax": lambda x: functional.softmax(x, dim=-1),
        "elu": lambda x: functional.elu(x) + 1,
        "relu": functional.relu,
    }[feature_map]
    similarity = phi(q) @ phi(k).mT
    if variant == "all":
        return similarity @ v / (similarity.sum(dim=-1, keepdim=True) + 1e-5)
    similarity = similarity * ~critical
    total = similarity.sum(dim=-1, keepdim=True)
    return similarity @ v / torch.where(total == 0, 1.0, total)


def critical_tokens(q: Tensor, k: Tensor, keep: int | list[int], block_q: int, block_k: int) -> Tensor:
    """(B, H, S, S) bool, block by block."""
    batch, heads, tokens, _ = q.shape
    mask = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    k = k - k.mean(dim=2, keepdim=True)
    for b in range(batch):
        for h in range(heads):
            number = keep if isinstance(keep, int) else keep[h]
            means = torch.stack([part.mean(dim=0) for part in k[b, h].split(block_k)])
            for start in range(0, tokens, block_q):
                scores = means @ q[b, h, start : start + block_q].mean(dim=0)
                for block in scores.topk(number).indices.tolist():
                    mask[b, h, start : start + block_q, block * block_k : (block + 1) * block_k] = True
    return mask
