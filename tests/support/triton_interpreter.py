"""Triton's interpreter, mended: run kernels on CPU tensors, in any process, with the rounding that a GPU has.

Stock, it needs TRITON_INTERPRET=1 at import, computes garbage in bf16, truncates casts to bf16, rounds casts to FP8
wrongly and cannot add to memory through a descriptor. `with interpret():` mends that and leaves Triton as it was, so
that real compilation works afterwards. Reductions of bf16 and FP8 raise. Not for threads, and autotuning is not
supported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

Function = Callable[..., Any]
Handle = stock.TensorHandle

_TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.int64: torch.int64,
    tl.int32: torch.int32,
    tl.int16: torch.int16,
    tl.int8: torch.int8,
    tl.uint8: torch.uint8,
}
_STORED_AS = {tl.bfloat16: torch.int16, tl.float8e4nv: torch.uint8, tl.float8e5: torch.uint8}
"""Types that numpy does not have, and the integers whose bits the interpreter keeps for them."""


def why_not_interpret() -> str:
    """Return why the interpreter cannot run here, as a reason to skip a test, or an empty string."""
    releases = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, np)]
    if releases[0] < (3, 7) and releases[1] >= (2, 4):
        return "the interpreter of Triton before 3.7 fails in every loop with numpy 2.4 or newer: install numpy<2.4"
    return ""


@contextmanager
def interpret(arch: int = 90) -> Iterator[None]:
    """Run every `@triton.jit` kernel launched inside on the CPU.

    Args:
        arch: compute capability that host code sees when it asks Triton for the current target.
    """

    def call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return _rewritten(self.fn)(*args, **kwargs)

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        stock.GridExecutor(_rewritten(self.fn), self.arg_names, grid)(*args, **kwargs)

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", arch, 32))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(JITFunction, __call__=call, run=run))
        stack.enter_context(mock.patch.object(driver, "_active", target))
        stack.enter_context(_mended_numerics())
        # For launches, the interpreter patches the language itself; for device functions it would leave it patched.
        stack.callback(_forget_new_names, tl.tensor, set(vars(tl.tensor)))
        scope = stock._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        stack.callback(scope.restore)
        yield


@functools.cache
def _rewritten(function: Function) -> Function:
    """The function as the interpreter runs it: rewriting takes longer than many a launch."""
    return stock.FunctionRewriter(_with_own_globals(function)).rewrite_ast()


def _forget_new_names(owner: type, known: set[str]) -> None:
    """The interpreter puts back what it patched by setting it, also where it was inherited."""
    for name in set(vars(owner)) - known - {"__annotations__"}:
        delattr(owner, name)


def _with_own_globals(function: Function) -> FunctionType:
    """Copy a function: the interpreter writes its own names into the globals of what it rewrites."""
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__, dict(function.__globals__), function.__name__, function.__defaults__)
    own.__module__, own.__qualname__ = function.__module__, function.__qualname__
    return own


@contextmanager
def _mended_numerics() -> Iterator[None]:
    builder = stock.InterpreterBuilder
    cast, binary, unary, reduce = builder.cast_impl, builder.binary_op, builder.unary_op, stock.ReduceOps.apply_impl

    def cast_impl(self: Any, source: Handle, target: tl.dtype) -> Handle:
        types = {source.dtype.scalar, target.scalar}
        if types & _STORED_AS.keys() and types <= _TORCH.keys():
            return _cast(source, target)
        return cast(self, source, target)

    def binary_op(self: Any, left: Handle, right: Handle, op: Function) -> Handle:
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, op)
        result = op(_numbers(left), _numbers(right))
        return Handle(result, tl.int1) if result.dtype == bool else _cast(Handle(result, tl.float32), tl.bfloat16)

    def unary_op(self: Any, argument: Handle, op: Function) -> Handle:
        if argument.dtype.scalar != tl.bfloat16:
            return unary(self, argument, op)
        return _cast(Handle(op(_numbers(argument)), tl.float32), tl.bfloat16)

    def apply_impl(self: Any, arguments: Any) -> Any:
        if any(argument.dtype.scalar in _STORED_AS for argument in arguments):
            raise NotImplementedError(
                "reduce in fp32: the interpreter reduces the bits of bf16 and FP8, not their values"
            )
        return reduce(self, arguments)

    new = {"cast_impl": cast_impl, "binary_op": binary_op, "unary_op": unary_op}
    new |= {"create_dot": _dot, "create_fp_to_fp": lambda self, source, target, rounding: _cast(source, target)}
    with (
        mock.patch.multiple(builder, **new),
        mock.patch.object(builder, "create_descriptor_reduce", _add_to_block, create=True),
        mock.patch.object(stock.ReduceOps, "apply_impl", apply_impl),
    ):
        yield


def _dot(self: Any, a: Handle, b: Handle, acc: Handle, precision: Any, imprecise: Any) -> Handle:
    """a @ b + acc: products of halves and FP8 are exact in fp32, as on tensor cores; integers are exact up to 2**53."""
    exact = np.float32 if acc.data.dtype == np.float32 else np.float64
    product = np.matmul(_numbers(a).astype(exact), _numbers(b).astype(exact))
    return Handle((product + acc.data).astype(acc.data.dtype), acc.dtype.scalar)


def _add_to_block(self: Any, kind: Any, descriptor: Any, value: Handle, indices: list[Handle]) -> None:
    """What the copy engine adds to memory, of fp32: nothing beyond the end of a dimension."""
    types = {value.dtype.scalar, descriptor.base.dtype.element_ty}
    if kind != tl.semantic.ir.DESCRIPTOR_REDUCE_KIND.ADD or types != {tl.float32}:
        raise NotImplementedError(f"the interpreter adds fp32 through a descriptor, got {kind} of {types}")
    pointers, inside = descriptor.materialize_pointers(indices)
    before = self.create_masked_load(pointers, inside, None, None, None, False)
    self.create_masked_store(pointers, Handle(before.data + value.data, tl.float32), inside, None, None)


def _numbers(handle: Handle) -> np.ndarray:
    """Values that numpy can compute with: fp32 for the types it does not have."""
    return _cast(handle, tl.float32).data if handle.dtype.scalar in _STORED_AS else handle.data


def _cast(source: Handle, target: tl.dtype) -> Handle:
    """Round to nearest, ties to even; FP8 saturates, as the GPU's conversions do."""
    from_type, to_type = source.dtype.scalar, target.scalar
    data = np.array(source.data)
    values = torch.from_numpy(data.view(np.int16) if from_type == tl.bfloat16 else data)
    if from_type in _STORED_AS:
        values = values.view(_TORCH[from_type])
    if to_type in (tl.float8e4nv, tl.float8e5):
        largest = torch.finfo(_TORCH[to_type]).max
        values = values.float().clamp(-largest, largest)
    values = values.to(_TORCH[to_type])
    if to_type in _STORED_AS:
        values = values.view(_STORED_AS[to_type])
    return Handle(values.numpy().view(stock._get_np_dtype(to_type)), to_type)
