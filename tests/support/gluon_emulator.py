"""Run Gluon kernels for Hopper on the CPU, with everything asynchronous as late as it may be.

`with emulate():` runs the code objects of the kernels themselves, and of what they call, with other meanings of `gl`,
`tma`, `mbarrier` and wgmma: host code launches on CPU tensors. `plant=` changes a line of one of them first, to show
that the emulator sees the bug that it makes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from unittest import mock

import triton
from support.gluon_emulator_language import NAMES, Partition, enter
from support.gluon_emulator_memory import DeadlockError, Descriptor, Pointer, Program, RaceError
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import ConstexprFunction, JITFunction

__all__ = ["DeadlockError", "Planted", "RaceError", "emulate"]

Function = Callable[..., Any]
Planted = tuple[JITFunction, str, str]
"""A kernel or device function, a piece of its source that is there once, and what replaces it."""

_LAUNCH_OPTIONS = ("num_stages", "maxnreg")


@contextmanager
def emulate(plant: Planted | None = None) -> Iterator[None]:
    """Run every Gluon kernel launched inside on the CPU.

    Raises:
        RaceError: if the result depends on how long a copy or a product takes.
        DeadlockError: if a kernel waits for what never comes.
    """
    known: dict[Function, Function] = {}

    def emulated(kernel: JITFunction) -> Function:
        if kernel.fn not in known:
            known[kernel.fn] = _with_names(_source(kernel, plant), emulated)
        return known[kernel.fn]

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **kwargs: Any) -> None:
        function = emulated(self)
        constants = {name: value for name, value in kwargs.items() if name not in _LAUNCH_OPTIONS}
        for ids in itertools.product(*map(range, (*grid, 1, 1)[:3])):
            program = Program()
            partition = Partition(program, ids, num_warps)
            enter(partition)
            function(*map(_argument, args), **constants)
            partition.end()
            program.end()

    with mock.patch.object(GluonJITFunction, "run", run):
        yield


def _argument(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return Descriptor(x)
    return Pointer.to(x) if isinstance(x, Tensor) else x


def _source(kernel: JITFunction, plant: Planted | None) -> FunctionType:
    """The Python function of a kernel, with the planted bug if it is the one."""
    function = kernel.fn
    assert isinstance(function, FunctionType)
    if plant is None or plant[0] is not kernel:
        return function
    _, old, new = plant
    assert kernel.src.count(old) == 1, f"{old!r} must be in {function.__name__} once"
    made: dict[str, Any] = {}
    exec(f"from __future__ import annotations\n{kernel.src.replace(old, new)}", function.__globals__, made)
    planted = made[function.__name__]
    assert isinstance(planted, FunctionType)
    return planted


def _with_names(function: FunctionType, emulated: Callable[[JITFunction], Function]) -> Function:
    """A copy of the function for which the names of Gluon mean those of the emulator."""

    def meaning(name: str, value: Any) -> Any:
        if name in NAMES:
            return NAMES[name]
        if isinstance(value, JITFunction):
            return lambda *args, **kwargs: emulated(value)(*args, **kwargs)
        if isinstance(value, triton.language.constexpr):
            return value.value
        return _no_layout if isinstance(value, ConstexprFunction) else value

    names = {name: meaning(name, value) for name, value in function.__globals__.items()}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__)


def _no_layout(*_: Any) -> None:
    return None
