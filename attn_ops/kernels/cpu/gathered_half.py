"""Gradients of block-sparse attention on halves, on CPU: gather the listed key blocks, then products in fp32.

Of a row, with p = exp(scale * q k^T - lse) and dp = grad_out v^T: ds = p * (dp - delta), grad_q = scale * ds k,
grad_k = scale * ds^T q, grad_v = p^T grad_out. A rounded `out` is too coarse for delta = sum(grad_out * out), so it is
the mean of dp under p; torch's flash operator does not take it, and would need a second forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gathered_lists import Grid, Whole, allowed_keys, blocked, chunks
from .gathered_sums import Sums

_KEYS_PER_THREAD = 2048


def gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    whole: Whole,
    grid: Grid,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in fp32; lse and grad_lse: (B, Hq, Sq) fp32."""
    dim, threads = q.shape[3], torch.get_num_threads()
    sums, memory = Sums(dim, torch.float32, grid), _Memory()
    all_keys, all_values = (blocked(x.float(), grid.block_k).flatten(1) for x in (k, v))
    all_queries, all_grads = (blocked(x.float(), grid.block_q) for x in (q, grad_out))
    # exp(s - 0) is finite in a row with no key, where s - -inf is not.
    all_lse = blocked(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1), grid.block_q)
    all_lse_grads = None if grad_lse is None else blocked(grad_lse.unsqueeze(-1), grid.block_q)
    # A row for every thread: a product of one is not shared among them as well.
    for rows, blocks in chunks(whole.lists, _KEYS_PER_THREAD * threads // grid.block_k, least=threads):
        keys, values = (memory.gathered(name, x, blocks) for name, x in (("k", all_keys), ("v", all_values)))
        keys, values = (x.view(len(rows), -1, dim) for x in (keys, values))
        queries, grads, row_lse = (x.index_select(0, rows) for x in (all_queries, all_grads, all_lse))
        shape = *queries.shape[:2], keys.shape[1]
        weights, grad_scores = memory.of("p", *shape), memory.of("ds", *shape)
        torch.baddbmm(row_lse, queries, keys.mT, beta=-1, alpha=scale, out=weights).exp_()
        if whole.sizes is not None:
            weights.masked_fill_(~allowed_keys(rows, blocks, whole.sizes, grid), 0.0)
        torch.bmm(grads, values.mT, out=grad_scores)
        delta = _mean(grad_scores, weights)
        if all_lse_grads is not None:
            delta -= all_lse_grads.index_select(0, rows)
        grad_scores.sub_(delta).mul_(weights)
        sums.add_queries(rows, torch.bmm(grad_scores, keys))
        sums.add_keys(blocks, torch.bmm(grad_scores.mT, queries, out=keys))
        sums.add_values(blocks, torch.bmm(weights.mT, grads, out=values))
    grad_q, grad_k, grad_v = sums.result()
    return grad_q.mul_(scale), grad_k.mul_(scale), grad_v


def _mean(x: Tensor, weights: Tensor) -> Tensor:
    """The mean of x over the last dimension, (..., 1); 0 where all weights are."""
    total = weights.sum(dim=-1, keepdim=True)
    mean: Tensor = torch.linalg.vecdot(x, weights).unsqueeze(-1) / total.masked_fill_(total == 0, 1.0)
    return mean


class _Memory:
    """The same memory for every chunk: fresh memory was 2 times slower (measured)."""

    def __init__(self) -> None:
        self._of: dict[str, Tensor] = {}

    def of(self, name: str, *shape: int) -> Tensor:
        """An fp32 tensor of that shape, valid until the next of that name."""
        needed = torch.Size(shape).numel()
        if name not in self._of or self._of[name].numel() < needed:
            self._of[name] = torch.empty(needed, device="cpu")
        return self._of[name][:needed].view(shape)

    def gathered(self, name: str, x: Tensor, blocks: Tensor) -> Tensor:
        """Copy the listed blocks of x (blocks, n) side by side."""
        return torch.index_select(x, 0, blocks.flatten(), out=self.of(name, blocks.numel(), x.shape[1]))
