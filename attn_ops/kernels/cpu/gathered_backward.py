"""Gradients of block-sparse attention on CPU: gather the listed key blocks of a few rows, then matrix products.

fp32 is for torch's flash operator, in fp64 where `precision` asks for it. Halves are for `gathered_half`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...layout import like_query
from ..lse_gradient import with_lse_gradient
from . import gathered_half
from .gathered import Gather, additive, attend
from .gathered_lists import Grid, Split, allowed_keys, blocked, chunks, split_lists, whole_lists
from .gathered_sums import Sums
from .precision import exact_operands

_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gathered.attention` for q, k and v, in their layouts."""
    if q.numel() == 0 or k.numel() == 0 or block_index.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grid = Grid(*(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]), block_q, block_k, causal)
    listed = block_index, block_count, key_sizes, grid
    if q.dtype is torch.float32:
        grads = _single(grad_out, grad_lse, out, lse, q, k, v, split_lists(*listed), grid, scale)
    else:
        grads = gathered_half.gradients(grad_out, grad_lse, lse, q, k, v, whole_lists(*listed), grid, scale)
    grad_q, grad_k, grad_v = map(like_query, grads, (q, k, v))
    return grad_q, grad_k, grad_v


def _single(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Split,
    grid: Grid,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of fp32 tensors."""
    again = partial(attend, lists=lists, grid=grid, scale=scale)
    grad_out, out, lse, q, k, v = exact_operands(again, grad_out, out, lse, q, k, v)
    # exp(-inf - 0) = 0 in a row with no key, where -inf - -inf would be NaN.
    row_lse = blocked(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1), grid.block_q).squeeze(-1)

    def backward(grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums, gather = Sums(q.shape[3], q.dtype, grid), Gather(k, v, grid.block_k)
        of_rows = tuple(blocked(x, grid.block_q) for x in (grad_out, q, out))

        def add(rows: Tensor, blocks: Tensor, mask: Tensor | None) -> None:
            keys, values = gather(blocks)
            grad, queries, result = (x.index_select(0, rows).unsqueeze(1) for x in of_rows)
            row = row_lse.index_select(0, rows).unsqueeze(1)
            grads = _flash_backward(grad, queries, keys, values, result, row, 0.0, False, attn_mask=mask, scale=scale)
            sums.add_queries(rows, grads[0].squeeze(1))
            sums.add_keys(blocks, grads[1])
            sums.add_values(blocks, grads[2])

        for rows, blocks in chunks(lists.full, gather.limit):
            add(rows, blocks, None)
        for rows, blocks in chunks(lists.partial, gather.limit):
            add(rows, blocks, additive(allowed_keys(rows, blocks, lists.sizes, grid), q.dtype))
        return sums.result()

    return with_lse_gradient(backward, grad_out, grad_lse, out, q, k, v)
