"""VSA's coarse branch: scores between means of tiles, which choose tiles, and attention of every mean to all of them.

Triton on a GPU that runs it, else PyTorch. The device alone decides, so that a method's forward, backward and block map
choose the same tiles.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..blocks.by_device import runs_triton


class CoarseBranch(NamedTuple):
    """Means of tiles and what becomes of them, fp32; v, out and lse are empty where nothing reads out.

    q: (B, Hq, nq, D), k and v: (B, Hkv, nk, D), scores: (B, Hq, nq, nk), out: (B, Hq, nq, D), lse: (B, Hq, nq), of
    Triton's alone: PyTorch keeps the scores and takes the weights from them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    scores: Tensor
    out: Tensor
    lse: Tensor

    def gradients(self, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradient of out, like it, those of q, k and v."""
        if runs_triton(self.q.device):
            from .triton.coarse import attend_backward

            return attend_backward(grad_out, self.out, self.lse, self.q, self.k, self.v, self.scale)
        q, scores, grad_out = (_grouped(x, self.k) for x in (self.q, self.scores, grad_out))
        k, v = self.k.unsqueeze(2), self.v.unsqueeze(2)
        weights, grad_weights = scores.softmax(dim=-1), grad_out @ v.mT
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(dim=-1, keepdim=True)) * self.scale
        grad_k, grad_v = (grad_scores.mT @ q).sum(dim=2), (weights.mT @ grad_out).sum(dim=2)
        return (grad_scores @ k).flatten(1, 2), grad_k, grad_v


def coarse_branch(q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> CoarseBranch:
    """Score means of tiles, contiguous, and attend with them; of the softmax a short tile is as much as a full one.

    Args:
        q: (B, Hq, nq, D) fp32.
        k: (B, Hkv, nk, D) fp32; query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, nk, D) fp32, or None where nothing reads out.
        scale: factor on the scores.
    """
    if runs_triton(q.device):
        from .triton.coarse import attend

        scores, out, lse = attend(q, k, v, scale)
    else:
        grouped = _grouped(q, k) @ k.unsqueeze(2).mT * scale
        scores, out, lse = grouped.flatten(1, 2), q.new_empty(0), q.new_empty(0)
        if v is not None:
            out = (grouped.softmax(dim=-1) @ v.unsqueeze(2)).flatten(1, 2)
    return CoarseBranch(q, k, q.new_empty(0) if v is None else v, scale, scores, out, lse)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """(B, Hq, nq, ...) as (B, Hkv, G, nq, ...): G query heads share one of k."""
    grouped: Tensor = x.unflatten(1, (k.shape[1], -1))
    return grouped
