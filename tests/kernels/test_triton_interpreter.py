"""The mended interpreter itself: exact rounding, bf16 arithmetic, and nothing left behind in Triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from support.triton_aot import gpu
from support.triton_interpreter import interpret, why_not_interpret
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())

SIZE = 1024


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpret():
        yield


@triton.jit
def cast_kernel(X, Y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(Y + at, tl.load(X + at).to(Y.dtype.element_ty))


@triton.jit
def arithmetic_kernel(X, Y, Sum, Difference, Less, Root, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(X + at)
    y = tl.load(Y + at)
    tl.store(Sum + at, x + y)
    tl.store(Difference + at, x * y - x)
    tl.store(Less + at, x < y)
    tl.store(Root + at, -tl.abs(x))


@triton.jit
def dot_kernel(A, B, C, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at)))


@triton.jit
def add_kernel(X, Descriptor, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    Descriptor.atomic_add([tl.program_id(0) * 8, 0], tl.load(X + at[:, None] * SIZE + at[None, :]))


@triton.jit
def twice(x):
    return x + x


@triton.jit
def sum_kernel(X, Y, SIZE: tl.constexpr):
    total = tl.sum(twice(tl.load(X + tl.arange(0, SIZE))), 0)
    for _ in tl.range(0, 3):
        total = twice(total)
    tl.store(Y, total)


def samples(dtype: torch.dtype) -> Tensor:
    """Values of every magnitude, both signs, halfway cases and zeros."""
    return (torch.randn(SIZE) * torch.exp2(torch.randint(-12, 12, (SIZE,)).float())).round(decimals=2).to(dtype)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_as_torch_does(source: torch.dtype, target: torch.dtype) -> None:
    largest = torch.finfo(target).max
    x = samples(source).float().clamp(-largest, largest).to(source)
    y = torch.empty(SIZE, dtype=target)
    cast_kernel[(1,)](x, y, SIZE)
    assert torch.equal(y.float(), x.to(target).float())


@pytest.mark.usefixtures("interpreter")
def test_fp8_saturates() -> None:
    x = torch.full((SIZE,), 1e4)
    y = torch.empty(SIZE, dtype=torch.float8_e4m3fn)
    cast_kernel[(1,)](x, y, SIZE)
    assert torch.equal(y.float(), torch.full((SIZE,), 448.0))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("source", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_widens_to_bf16(source: torch.dtype) -> None:
    x = torch.randint(-100, 100, (SIZE,)).float().to(source)
    y = torch.empty(SIZE, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, SIZE)
    assert torch.equal(y, x.to(torch.bfloat16))


@pytest.mark.usefixtures("interpreter")
def test_bf16_arithmetic_rounds_each_result() -> None:
    x, y = samples(torch.bfloat16), samples(torch.bfloat16)
    total, difference, less, root = (torch.empty_like(x) for _ in range(4))
    less = torch.empty(SIZE, dtype=torch.int8)
    arithmetic_kernel[(1,)](x, y, total, difference, less, root, SIZE)
    assert torch.equal(total, x + y)
    assert torch.equal(difference, x * y - x)
    assert torch.equal(less.bool(), x < y)
    assert torch.equal(root, -x.abs())


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_dot_is_exact_on_small_integers(dtype: torch.dtype) -> None:
    a, b = (torch.randint(-8, 9, (32, 32)).float() for _ in range(2))
    c = torch.empty(32, 32, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    dot_kernel[(1,)](a.to(dtype), b.to(dtype), c, 32)
    assert torch.equal(c.float(), a @ b)


@pytest.mark.usefixtures("interpreter")
def test_adds_to_the_rows_of_a_descriptor_that_exist() -> None:
    x, y, beyond = torch.randn(16, 16), torch.randn(20, 16), torch.zeros(4, 16)
    memory = torch.cat([y, beyond])
    add_kernel[(2,)](x, TensorDescriptor.from_tensor(memory[:20], [16, 16]), 16)
    y[:16] += x
    y[8:] += x[:12]
    assert torch.equal(memory, torch.cat([y, beyond]))


@pytest.mark.usefixtures("interpreter")
def test_adding_to_other_types_is_refused() -> None:
    memory = TensorDescriptor.from_tensor(torch.zeros(16, 16, dtype=torch.float16), [16, 16])
    with pytest.raises(Exception, match="adds fp32 through a descriptor"):
        add_kernel[(1,)](torch.ones(16, 16), memory, 16)


@pytest.mark.usefixtures("interpreter")
def test_reducing_bf16_is_refused() -> None:
    with pytest.raises(Exception, match="reduce in fp32"):
        sum_kernel[(1,)](samples(torch.bfloat16), torch.empty(1), SIZE)


def test_leaves_triton_as_it_was() -> None:
    patched = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, JITFunction)
    for owner in patched:
        getattr(owner, "__annotations__", None)  # Python makes them when they are first read
    before = [dict(vars(owner)) for owner in patched]
    names = set(globals())
    y = torch.empty(1)
    with interpret():
        sum_kernel[(1,)](torch.ones(SIZE), y, SIZE)
    assert y.item() == 16 * SIZE
    assert [dict(vars(owner)) for owner in patched] == before
    assert set(globals()) == names


def test_compiles_afterwards() -> None:
    x, y = torch.ones(SIZE), torch.empty(1)
    with interpret():
        sum_kernel[(1,)](x, y, SIZE)
    with gpu(90) as kernels:
        sum_kernel[(1,)](x, y, SIZE)
    (kernel,) = kernels
    assert kernel.launches == [(1, 1, 1)]
    assert "FADD" in kernel.sass
