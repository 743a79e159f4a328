"""What the Gluon emulator models of an SM: shared memory that copies fill late, barriers, products in flight.

Everything asynchronous is as late as it may be: bytes are there once a wait has asked for them, and a product reads its
operands when it is waited for. Code that is right only if the hardware is fast raises `RaceError`, and code that waits
for what never comes raises `DeadlockError`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

UNKNOWN, ARRIVING, KNOWN = 0, 1, 2
"""State of a byte of shared memory: never written, to be written by a copy in flight, written."""


class RaceError(RuntimeError):
    """The result depends on how long something asynchronous takes."""


class DeadlockError(RuntimeError):
    """A wait that nothing will end."""


class Program:
    """One program (thread block): its barriers, what is in flight, and the partitions that run it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # whoever runs holds it, and lets go of it only to wait
        self.tiles: list[Tile] = []
        self.waiting: list[Callable[[], bool]] = []
        self.partitions = 1
        self.failed = False
        self.unfenced = False

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        """Return once `reached()`; if every partition waits for something not reached, raise DeadlockError."""
        with self.changed:
            self.waiting.append(reached)
            try:
                while not reached():
                    stuck = len(self.waiting) >= self.partitions and not any(other() for other in self.waiting)
                    if stuck or self.failed:
                        self.failed = True
                        self.changed.notify_all()
                        raise DeadlockError(what)
                    self.changed.wait(0.2)
            finally:
                self.waiting.remove(reached)

    def check_fenced(self, what: str) -> None:
        if self.unfenced:
            raise RaceError(f"{what} may not see what was written to shared memory: no fence_async_shared in between")

    def end(self) -> None:
        if any(bool((tile.state == ARRIVING).any()) for tile in self.tiles):
            raise RaceError("the program ends before a copy into its shared memory was waited for")


@dataclass
class Tile:
    """A view of shared memory: values, and the state of each."""

    program: Program
    data: Tensor
    state: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def _view(self, view: Callable[[Tensor], Tensor]) -> Tile:
        return Tile(self.program, view(self.data), view(self.state))

    def index(self, i: Any) -> Tile:
        return self._view(lambda x: x[int(i)])

    def permute(self, order: Any) -> Tile:
        return self._view(lambda x: x.permute(order))

    def reshape(self, shape: list[int]) -> Tile:
        return self._view(lambda x: x.view(shape))

    def store(self, values: Tensor) -> None:
        assert values.dtype == self.dtype
        if bool((self.state == ARRIVING).any()):
            raise RaceError("a tile is written while a copy into it is in flight")
        self.data.copy_(values)
        self.state.fill_(KNOWN)
        self.program.unfenced = True

    @property
    def known(self) -> bool:
        """Whether all of it was written, and no copy into it is in flight."""
        return bool((self.state == KNOWN).all())

    def expect_copy(self) -> None:
        if bool((self.state == ARRIVING).any()):
            raise RaceError("two copies into a tile are in flight")
        self.state.fill_(ARRIVING)

    def arrive(self, values: Tensor) -> None:
        self.data.copy_(values)
        self.state.fill_(KNOWN)


@dataclass
class Barrier:
    """An mbarrier: a phase ends when `count` arrivals and all expected bytes have come."""

    program: Program
    count: int = 0
    pending: int = 0
    missing_bytes: int = 0
    phase: int = 0
    arriving: list[Callable[[], None]] = field(default_factory=list)
    arrived: list[Callable[[], None]] = field(default_factory=list)

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.program.unfenced = True

    def arrive(self, count: int = 1, expected_bytes: int = 0) -> None:
        with self.program.changed:
            if count > self.pending:
                raise RaceError("more arrivals at a barrier than its phase has")
            self.pending -= count
            self.missing_bytes += expected_bytes
            self._end_phase()

    def deliver(self, size: int, arrive: Callable[[], None]) -> None:
        """Count the bytes of a copy, which are there for whoever waits for this phase."""
        with self.program.changed:
            self.missing_bytes -= size
            self.arriving.append(arrive)
            self._end_phase()

    def wait(self, parity: int) -> None:
        """Wait for the end of a phase: until the phase of this parity is not the current one."""
        state = f"phase {self.phase}, {self.pending} arrivals and {self.missing_bytes} bytes to come"
        self.program.wait_until(lambda: self.phase & 1 != parity, f"a wait for parity {parity} of a barrier in {state}")
        with self.program.changed:
            for arrive in self.arrived:
                arrive()
            self.arrived.clear()

    def _end_phase(self) -> None:
        if self.pending == 0 and self.missing_bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.arrived += self.arriving
            self.arriving = []
            self.program.changed.notify_all()


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, program: Program, count: int) -> None:
        self._all = [Barrier(program) for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self._all[int(i)]


class Unusable:
    """A value that is not there, or that means nothing: whatever uses it raises RaceError."""

    reason = ""

    def __getattr__(self, name: str) -> Any:
        raise RaceError(self.reason)

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise RaceError(cls.reason)

    def __mul__(self, other: Any) -> Any:
        raise RaceError(self.reason)

    __add__ = __radd__ = __rmul__ = __mul__


class Garbage(Unusable):
    """The product of a tile that holds no copy that was waited for. It is only a bug to use it."""

    reason = "a product is used whose tile holds no copy that was waited for"


class Token(Unusable):
    """The result of a product in flight."""

    reason = "the result of a product is used before a wait has returned it"

    def __init__(self, compute: Callable[[], Tensor | Garbage]) -> None:
        self._compute, self._early = compute, compute()
        self._retired = False

    def retire(self) -> None:
        if not _same(self._compute(), self._early):
            raise RaceError("what a product reads has changed while it was in flight")
        self._retired = True

    def result(self) -> Tensor | Garbage:
        if not self._retired:
            raise RaceError("the result of a product is used while it is in flight")
        return self._early


def _same(a: Tensor | Garbage, b: Tensor | Garbage) -> bool:
    if isinstance(a, Garbage) or isinstance(b, Garbage):
        return type(a) is type(b)
    return bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


@dataclass(frozen=True)
class Pointer:
    """Elements of a tensor's storage, by number from its first."""

    memory: Tensor
    offset: Any = 0

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        return cls(tensor.as_strided((size,), (1,)))

    @property
    def dtype(self) -> Any:
        return self

    @property
    def element_ty(self) -> torch.dtype:
        return self.memory.dtype

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


@dataclass(frozen=True)
class BlockType:
    """Shape and bytes of what a descriptor copies at a time."""

    shape: list[int]
    nbytes: int


class Descriptor:
    """A tensor that is copied block by block: 0 comes from outside of it, and nothing is written there."""

    def __init__(self, host: Any) -> None:
        self.tensor = host.base.as_strided(host.shape, host.strides)
        self.dtype, self.layout = host.base.dtype, host.layout
        shape = list(host.block_shape)
        self.block_type = BlockType(shape, math.prod(shape) * host.base.element_size())

    def read(self, at: list[Any]) -> Tensor:
        inside = self._inside(at)
        block = torch.zeros(self.block_type.shape, dtype=self.dtype)
        block[tuple(slice(0, size) for size in inside.shape)] = inside
        return block

    def write(self, at: list[Any], block: Tensor) -> None:
        inside = self._inside(at)
        inside.copy_(block[tuple(slice(0, size) for size in inside.shape)])

    def _inside(self, at: list[Any]) -> Tensor:
        assert len(at) == self.tensor.dim()
        starts = [int(start) for start in at]
        assert all(start >= 0 for start in starts)
        return self.tensor[
            tuple(slice(start, start + size) for start, size in zip(starts, self.block_type.shape, strict=True))
        ]
