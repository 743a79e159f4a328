"""What the Gluon emulator must see: a planted bug of every kind, each in a kernel that is otherwise right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.block_sparse_cases import Case, inputs
from support.gluon_emulator import DeadlockError, Planted, RaceError, emulate
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparseattn.attn_ops.kernels.gluon import block_sparse, device, schedules
from sparseattn.attn_ops.kernels.gluon.device import barriers

Caught = tuple[type[RuntimeError], str]
FOUR_BLOCKS = Case(heads=(1, 1), dtype=torch.bfloat16, head_dim=64, blocks=(64, 64), seq=(64, 256))

IN_ONE_BUFFER: dict[str, tuple[Planted, Caught]] = {
    "v_refilled_before_its_product_ended": (
        (
            schedules.one_buffer,
            "acc = warpgroup_mma_wait(0, [multiply_values(weights, v_tile, acc, decay, OUT)])\n"
            "        fetch_values(V, plane, next_block * KEYS, v_tile, v_ready, more)",
            "acc = multiply_values(weights, v_tile, acc, decay, OUT)\n"
            "        fetch_values(V, plane, next_block * KEYS, v_tile, v_ready, more)\n"
            "        acc = warpgroup_mma_wait(0, [acc])",
        ),
        (RaceError, "has changed while it was in flight"),
    ),
    "k_refilled_before_its_product": (
        (
            schedules.one_buffer,
            "        scores = warpgroup_mma_wait(0, [multiply_keys(q, k_tile, SCORES)])\n"
            "        fetch(K, plane, next_block * KEYS, k_tile, k_ready, more)\n",
            "        fetch(K, plane, next_block * KEYS, k_tile, k_ready, more)\n"
            "        scores = warpgroup_mma_wait(0, [multiply_keys(q, k_tile, SCORES)])\n",
        ),
        (RaceError, "no copy that was waited for"),
    ),
    "scores_read_in_flight": (
        (
            schedules.one_buffer,
            "warpgroup_mma_wait(0, [multiply_keys(q, k_tile, SCORES)])",
            "multiply_keys(q, k_tile, SCORES)",
        ),
        (RaceError, "before a wait has returned it"),
    ),
    "wrong_phase": (
        (schedules.one_buffer, "mbarrier.wait(k_ready, step & 1)", "mbarrier.wait(k_ready, 0)"),
        (DeadlockError, "parity 0"),
    ),
    "no_wait_for_v": (
        (schedules.one_buffer, "        mbarrier.wait(v_ready, step & 1)\n", ""),
        (RaceError, "two copies into a tile are in flight"),
    ),
    "no_wait_for_q": (
        (schedules.one_buffer, "    mbarrier.wait(q_ready, 0)\n", ""),
        (RaceError, "no copy that was waited for"),
    ),
    "wrong_number_of_bytes": (
        (device.fetch, "tensor.block_type.nbytes", "2 * tensor.block_type.nbytes"),
        (DeadlockError, "bytes to come"),
    ),
    "copy_without_announcing_it": (
        (device.fetch, "    mbarrier.expect(ready, tensor.block_type.nbytes, pred=wanted)\n", ""),
        (DeadlockError, "1 arrivals"),
    ),
    "barrier_not_fenced": (
        (device.barriers, "    fence_async_shared()\n", ""),
        (RaceError, "a copy's barrier may not see what was written"),
    ),
    "output_not_fenced": (
        (device.store_rows, "    fence_async_shared()\n", ""),
        (RaceError, "a copy out of shared memory may not see what was written"),
    ),
    "output_not_waited_for": (
        (device.store_rows, "    tma.store_wait(0)\n", ""),
        (RaceError, "ends before a copy out of its shared memory"),
    ),
    "a_copy_too_many": (
        (
            schedules.one_buffer,
            "fetch(K, plane, next_block * KEYS, k_tile, k_ready, more)",
            "fetch(K, plane, next_block * KEYS, k_tile, k_ready, True)",
        ),
        (RaceError, "ends before a copy into its shared memory"),
    ),
}

IN_OVERLAPPED: dict[str, tuple[Planted, Caught]] = {
    "next_tile_refilled_in_place_of_this": (
        (
            schedules.overlapped,
            "later_block * KEYS, k_tiles.index(this), k_ready.index(this)",
            "later_block * KEYS, k_tiles.index(other), k_ready.index(other)",
        ),
        (RaceError, "two copies into a tile"),
    ),
    "phase_of_a_single_buffer": (
        (schedules.overlapped, "((step + 1) >> 1) & 1", "(step + 1) & 1"),
        (DeadlockError, "parity 1"),
    ),
    "scores_taken_before_their_product_ended": (
        (
            schedules.overlapped,
            "            scores = warpgroup_mma_wait(1, [next_scores])\n",
            "            scores = next_scores\n",
        ),
        (RaceError, "before a wait has returned it"),
    ),
    "one_product_too_many_in_flight": (
        (schedules.overlapped, "acc = warpgroup_mma_wait(0, [next_acc])", "acc = warpgroup_mma_wait(1, [next_acc])"),
        (RaceError, "used while it is in flight"),
    ),
    "v_copied_during_its_product": (
        (
            schedules.overlapped,
            "            acc = warpgroup_mma_wait(0, [next_acc])\n"
            "            fetch_values(V, plane, next_block * KEYS, v_tile, v_ready, more)\n",
            "            fetch_values(V, plane, next_block * KEYS, v_tile, v_ready, more)\n"
            "            acc = warpgroup_mma_wait(0, [next_acc])\n",
        ),
        (RaceError, "has changed while it was in flight"),
    ),
    "no_wait_for_the_next_keys": (
        (
            schedules.overlapped,
            "            mbarrier.wait(k_ready.index(other), ((step + 1) >> 1) & 1, pred=more)\n",
            "",
        ),
        (RaceError, "two copies into a tile are in flight"),
    ),
}


def attend(overlapped: bool, plant: Planted | None) -> None:
    q, k, v = inputs(FOUR_BLOCKS)
    index = torch.arange(4, dtype=torch.int32).view(1, 1, 1, 4)
    count = torch.full((1, 1, 1), 4, dtype=torch.int32)
    options = {"block_q": 64, "block_k": 64, "causal": False, "scale": 0.1}
    with emulate(plant):
        block_sparse.attention(q, k, v, index, count, overlapped=overlapped, **options)


@pytest.mark.parametrize(("plant", "caught"), IN_ONE_BUFFER.values(), ids=IN_ONE_BUFFER.keys())
def test_bugs_with_one_buffer(plant: Planted, caught: Caught) -> None:
    with pytest.raises(caught[0], match=caught[1]):
        attend(False, plant)


@pytest.mark.parametrize(("plant", "caught"), IN_OVERLAPPED.values(), ids=IN_OVERLAPPED.keys())
def test_bugs_in_the_overlap(plant: Planted, caught: Caught) -> None:
    with pytest.raises(caught[0], match=caught[1]):
        attend(True, plant)


@pytest.mark.parametrize("overlapped", [False, True])
def test_no_bug(overlapped: bool) -> None:
    attend(overlapped, None)


@gluon.jit
def _produce(X, ring, full, empty, COUNT: gl.constexpr, SLOTS: gl.constexpr):
    for i in range(COUNT):
        slot = i % SLOTS
        mbarrier.wait(empty.index(slot), ((i // SLOTS) & 1) ^ 1)
        mbarrier.expect(full.index(slot), X.block_type.nbytes)
        tma.async_copy_global_to_shared(X, [i * 64, 0], full.index(slot), ring.index(slot))


@gluon.jit
def _consume(Y, ring, full, empty, COUNT: gl.constexpr, SLOTS: gl.constexpr):
    for i in range(COUNT):
        slot = i % SLOTS
        mbarrier.wait(full.index(slot), (i // SLOTS) & 1)
        tma.async_copy_shared_to_global(Y, [i * 64, 0], ring.index(slot))
        tma.store_wait(0)
        mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit
def _copy(X, Y, COUNT: gl.constexpr, SLOTS: gl.constexpr):
    """Copy tiles with a producer and a consumer that run side by side, through a ring of slots."""
    ring = gl.allocate_shared_memory(X.dtype, [SLOTS, 64, 64], X.layout)
    full, empty = barriers(SLOTS), barriers(SLOTS)
    arguments = (ring, full, empty, COUNT, SLOTS)
    gl.warp_specialize([(_consume, (Y, *arguments)), (_produce, (X, *arguments))], [1], [24])


def copy(plant: Planted | None) -> bool:
    x, y = torch.randn(5 * 64, 64).bfloat16(), torch.zeros(5 * 64, 64).bfloat16()
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    with emulate(plant):
        _copy[(1,)](*(TensorDescriptor.from_tensor(t, [64, 64], layout) for t in (x, y)), COUNT=5, SLOTS=2)
    return torch.equal(x, y)


def test_partitions_run_side_by_side() -> None:
    assert copy(None)


@pytest.mark.parametrize(
    ("plant", "caught"),
    [
        (lambda: (_consume, "        mbarrier.arrive(empty.index(slot), count=1)\n", ""), DeadlockError),
        (lambda: (_consume, "count=1", "count=2"), RaceError),
        (lambda: (_produce, "        mbarrier.wait(empty.index(slot), ((i // SLOTS) & 1) ^ 1)\n", ""), RaceError),
        (lambda: (_produce, " ^ 1)", ")"), DeadlockError),
    ],
    ids=["slot_never_freed", "slot_freed_twice", "slot_not_waited_for", "wrong_phase"],
)
def test_bugs_between_partitions(plant: Callable[[], Planted], caught: type[RuntimeError]) -> None:
    with pytest.raises(caught):
        copy(plant())
