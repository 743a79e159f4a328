"""The names that a Gluon kernel uses, on torch tensors: what `gluon_emulator` puts in place of the real ones.

Layouts are not modelled: they say where a number is, not which. A warpgroup is one unit, so hazards between its warps,
which Triton's compiler guards by itself, are not seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from support.gluon_emulator_memory import (
    UNKNOWN,
    Barrier,
    Barriers,
    DeadlockError,
    Descriptor,
    Garbage,
    Pointer,
    Program,
    RaceError,
    Tile,
    Token,
)
from torch import Tensor


@dataclass
class Partition:
    """A thread of control of a program: its products and copies out of shared memory, in the order of issue."""

    program: Program
    ids: tuple[int, ...]
    warps: int
    products: list[Token] = field(default_factory=list)
    stores: list[Callable[[], None]] = field(default_factory=list)

    def end(self) -> None:
        if self.products:
            raise RaceError("the program ends with a product in flight")
        if self.stores:
            raise RaceError("the program ends before a copy out of its shared memory was waited for")


_thread = threading.local()


def enter(partition: Partition) -> None:
    """Make it what this thread runs."""
    _thread.partition = partition


def _here() -> Partition:
    partition: Partition = _thread.partition
    return partition


def _number(x: Any) -> Tensor:
    return torch.as_tensor(x)


def warpgroup_mma(
    left: Any, right: Tile, acc: Any, *, use_acc: bool = True, is_async: bool = False, **_: Any
) -> Tensor | Garbage | Token:
    here = _here()
    here.program.check_fenced("a product")
    start = acc.result() if isinstance(acc, Token) else acc
    exact = torch.int32 if right.dtype == torch.int8 else torch.float32

    def compute() -> Tensor | Garbage:
        if not right.known or (isinstance(left, Tile) and not left.known):
            return Garbage()
        a = left.data if isinstance(left, Tile) else left
        assert a.dtype == right.dtype
        product = a.to(exact) @ right.data.to(exact)
        return product + start if use_acc else product

    if not is_async:
        return compute()
    here.products.append(Token(compute))
    return here.products[-1]


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    here = _here()
    while len(here.products) > num_outstanding:
        here.products.pop(0).retire()
    results = [x.result() if isinstance(x, Token) else x for x in deps]
    return results[0] if len(results) == 1 else tuple(results)


def fence_async_shared(cluster: bool = False) -> None:
    _here().program.unfenced = False


class MBarrierLayout:
    """Marks an allocation as barriers."""


def _expect(barrier: Barrier, size: int, pred: Any = True) -> None:
    if pred:
        barrier.arrive(1, int(size))


def _arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        barrier.arrive(count)


def _wait(barrier: Barrier, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if pred:
        barrier.wait(int(phase))


mbarrier = SimpleNamespace(
    MBarrierLayout=MBarrierLayout,
    init=lambda barrier, count: barrier.init(count),
    expect=_expect,
    arrive=_arrive,
    wait=_wait,
)


def _copy_in(source: Descriptor, at: Any, barrier: Barrier, tile: Tile, pred: Any = True) -> None:
    if not pred:
        return
    _here().program.check_fenced("a copy's barrier")
    assert tile.shape == source.block_type.shape
    values = source.read(at)
    tile.expect_copy()
    barrier.deliver(source.block_type.nbytes, lambda: tile.arrive(values))


def _copy_out(target: Descriptor, at: Any, tile: Tile) -> None:
    here = _here()
    here.program.check_fenced("a copy out of shared memory")
    if not tile.known:
        raise RaceError("a copy reads a tile that was not written")
    values = tile.data.clone()

    def finish() -> None:
        if not tile.known or not torch.equal(values, tile.data):
            raise RaceError("a tile has changed while a copy read it")
        target.write(at, values)

    here.stores.append(finish)


def _store_wait(pendings: int) -> None:
    here = _here()
    while len(here.stores) > pendings:
        here.stores.pop(0)()


tma = SimpleNamespace(
    async_copy_global_to_shared=_copy_in, async_copy_shared_to_global=_copy_out, store_wait=_store_wait
)


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any = None) -> Tile | Barriers:
    program = _here().program
    if isinstance(layout, MBarrierLayout):
        return Barriers(program, shape[0])
    tile = Tile(program, torch.zeros(shape, dtype=dtype), torch.full(shape, UNKNOWN, dtype=torch.uint8))
    program.tiles.append(tile)
    return tile


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    offset = _number(pointer.offset)
    wanted = torch.ones_like(offset, dtype=torch.bool) if mask is None else _number(mask).expand(offset.shape)
    inside = (offset >= 0) & (offset < pointer.memory.numel())
    assert bool((inside | ~wanted).all()), "a load outside of its tensor"
    values = pointer.memory[torch.where(wanted, offset, 0)]
    return torch.where(wanted, values, torch.as_tensor(other, dtype=values.dtype))


def _store(pointer: Pointer, values: Tensor, mask: Any = None) -> None:
    offset = _number(pointer.offset)
    if mask is not None:
        offset, values = offset[mask], values[mask]
    pointer.memory[offset] = values.to(pointer.memory.dtype)


def _warp_specialize(functions: Any, warps: Any, registers: Any = None) -> None:
    """Run the partitions as threads, one at a time: each until it waits for what has not come, as far ahead as it may.

    What it does too early is then seen every time, not only when the threads happen to meet.
    """
    here = _here()
    program, errors = here.program, []
    program.partitions = len(functions)

    def run(function: Callable[..., None], args: Any) -> None:
        partition = Partition(program, here.ids, here.warps)
        enter(partition)
        with program.changed:
            try:
                function(*args)
                partition.end()
            except Exception as error:
                errors.append(error)
                program.failed = True
            program.partitions -= 1
            program.changed.notify_all()

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise next((error for error in errors if not isinstance(error, DeadlockError)), errors[0])
    program.partitions = 1


def _no_layout(*_: Any, **__: Any) -> None:
    return None


gl = SimpleNamespace(
    constexpr=object,
    float32=torch.float32,
    float16=torch.float16,
    bfloat16=torch.bfloat16,
    float8e4nv=torch.float8_e4m3fn,
    int64=torch.int64,
    int32=torch.int32,
    int8=torch.int8,
    NVMMADistributedLayout=_no_layout,
    DotOperandLayout=_no_layout,
    SliceLayout=_no_layout,
    static_range=range,
    num_warps=lambda: _here().warps,
    program_id=lambda axis: torch.tensor(_here().ids[axis], dtype=torch.int32),
    allocate_shared_memory=_allocate,
    load=_load,
    store=_store,
    arange=lambda first, end, layout=None: torch.arange(first, end, dtype=torch.int32),
    full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    where=lambda condition, a, b: torch.where(_number(condition), a, b),
    maximum=lambda a, b: torch.maximum(_number(a), _number(b)),
    minimum=lambda a, b: torch.minimum(_number(a), _number(b)),
    cdiv=lambda a, b: -(-a // b),
    exp2=torch.exp2,
    log2=torch.log2,
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    warp_specialize=_warp_specialize,
)

NAMES: dict[str, Any] = {
    "gl": gl,
    "tma": tma,
    "mbarrier": mbarrier,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": fence_async_shared,
}
"""What a kernel's module calls them -> what they are here."""
