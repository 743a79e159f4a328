"""Host code of the Triton kernels on a GPU that is not there: grids, compiled variants, and no wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.triton_aot import gpu
from support.triton_launches import (
    launch_block_sparse,
    launch_block_sparse_backward,
    launch_coarse,
    launch_linear_branch,
    launch_rounding,
    launch_sage,
    launch_sparge,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sparseattn.attn_ops.kernels.triton import pool, select

BF16 = torch.bfloat16
LENGTHS = (1, 16, 63, 64, 100, 128, 1000, 1024, 4096, 5000)
_aten = torch.ops.aten
_WAITS = {
    *(_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default),
    *(_aten.equal.default, _aten._unique2.default, _aten.repeat_interleave.Tensor),
}


class _NoWaiting(TorchDispatchMode):
    """Raise at what makes the host wait for the device: a value or a shape that depends on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        assert func not in _WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def _pool(seq: int) -> None:
    pool.block_mean(torch.zeros(1, 4, seq, 64, dtype=BF16), 64)


def _select(seq: int) -> None:
    scores = torch.zeros(1, 4, -(-seq // 64), -(-seq // 64))
    select.top_k_blocks(scores, 3)
    select.count_to_mass(scores, torch.zeros(4, 1))


LAUNCHES: dict[str, tuple[Callable[[int], None], list[str]]] = {
    # With and without a short last block, whose mask takes registers.
    "block_sparse": (lambda seq: launch_block_sparse(BF16, 64, 64, False, seq, seq), ["_forward"] * 2),
    "block_sparse descriptors": (
        lambda seq: launch_block_sparse(BF16, 64, 64, False, seq, seq, descriptors=True),
        ["_forward"] * 2,
    ),
    "sage": (
        lambda seq: launch_sage(BF16, 64, "fp8", False, seq, seq),
        ["sum_parts_kernel", "round_kernel", *["_forward"] * 2],
    ),
    "sparge": (
        lambda seq: launch_sparge(BF16, 64, "fp8", False, seq=(seq, seq)),
        ["sum_parts_kernel", "round_kernel", *["_forward"] * 2],
    ),
    "block_sparse_backward": (
        lambda seq: launch_block_sparse_backward(BF16, 64, (64, 64), False, seq, seq),
        [*["grad_q_kernel"] * 4, "_mark", "_list_rows", *["grad_kv_kernel"] * 2],
    ),
    "rounding": (lambda seq: launch_rounding(BF16, 64, "fp8", False, seq=seq), ["sum_parts_kernel", "round_kernel"]),
    "linear_branch": (
        lambda seq: launch_linear_branch(BF16, 64, seq=seq),
        ["_sum_states", "_fold", "_add_branch"],
    ),
    "coarse": (lambda seq: launch_coarse(64, tiles=-(-seq // 8)), ["_attend"]),
    "pool": (_pool, ["_block_mean"]),
    "select": (_select, ["_top_k", "_count_to_mass"]),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_ten_lengths_compile_no_more_kernels_than_two_and_nothing_waits(name: str) -> None:
    launch, variants = LAUNCHES[name]
    with gpu(90) as kernels, _NoWaiting():
        for seq in LENGTHS[:4]:
            launch(seq)
        few = len(kernels)
        for seq in LENGTHS[4:]:
            launch(seq)
    assert len(kernels) == few
    assert sorted(kernel.name for kernel in kernels) == sorted(variants)


def test_grids() -> None:
    """One program for a tile of queries of a head: 4 heads, 5000 tokens in blocks of 64, or tiles of 128."""
    with gpu(90) as kernels:
        launch_block_sparse(BF16, 64, 64, False, 5000, 5000)
        launch_sage(BF16, 64, "fp8", False, 5000, 5000)
    grids = {kernel.name: kernel.launches for kernel in kernels[1:]}
    assert kernels[0].launches == [(79 * 4, 1, 1)]
    # 16 parts of k and of v, 2 heads; tiles of 128 tokens, of q, and of k and v.
    assert grids == {
        "sum_parts_kernel": [((16 + 16) * 2, 1, 1)],
        "round_kernel": [(40 * (4 + 2), 1, 1)],
        "_forward": [(40 * 4, 1, 1)],
    }
