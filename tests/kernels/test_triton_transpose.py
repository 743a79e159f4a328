"""Transposed lists of blocks, in the interpreter: those of the transposed mask."""

from __future__ import annotations

import pytest
import torch
from support.triton_interpreter import interpret, why_not_interpret

from sparseattn.attn_ops.blocks.block_index import lists_of, mask_of
from sparseattn.attn_ops.kernels.triton.transpose import transposed_lists

pytestmark = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("heads", ["one list", "a list each"])
@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (5, 150), (180, 2)])
def test_it_is_the_transposed_mask(nq: int, nk: int, heads: str, group: int) -> None:
    mask = torch.rand(2, 1 if heads == "one list" else 2 * group, nq, nk) < 0.6
    index, count = lists_of(mask)
    index = index.masked_fill(torch.arange(nk) >= count.unsqueeze(-1), 1 << 20)
    with interpret():
        got, got_count = transposed_lists(index, count, nk, group)
    # (B, H / group, group, nq, nk): entry i * group + h is block i of the group's head h.
    grouped = (mask.expand(-1, group, -1, -1) if heads == "one list" else mask).unflatten(1, (-1, group))
    want = grouped.permute(0, 1, 4, 3, 2).flatten(3)
    assert torch.equal(mask_of(got, got_count, nq * group), want)
    assert torch.equal(got_count, want.sum(dim=-1, dtype=torch.int32))
    ascends = got.diff(dim=-1) > 0
    assert bool((ascends | (torch.arange(1, nq * group) >= got_count.unsqueeze(-1))).all())
    assert (got.dtype, got.is_contiguous(), got_count.is_contiguous()) == (torch.int32, True, True)
