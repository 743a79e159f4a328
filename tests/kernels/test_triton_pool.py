"""Block means in Triton: bit for bit those of PyTorch where sums are exact, one kernel for every length."""

from __future__ import annotations

import pytest
import torch
from support.triton_aot import ARCHS, SHARED_LIMIT, gpu
from support.triton_interpreter import interpret, why_not_interpret
from torch import Tensor

from sparseattn.attn_ops.blocks import topk
from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.attn_ops.kernels.triton.pool import block_mean

interpreted = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def integers(*shape: int) -> Tensor:
    """Small ones: their sums are exact in any order."""
    return torch.randint(-8, 9, shape).float()


def check(x: Tensor, block: int, sizes: Tensor | None = None) -> None:
    before = x.clone()
    with interpret():
        means = block_mean(x, block, sizes)
    assert means.dtype is torch.float32
    assert means.is_contiguous()
    assert torch.equal(means, topk.block_mean(x, block, sizes))
    assert torch.equal(x, before)


@interpreted
@DTYPES
@pytest.mark.parametrize(("tokens", "block"), [(64, 64), (100, 64), (30, 8), (5, 8), (7, 1), (300, 200), (90, 48)])
def test_means_of_integers_are_exact(dtype: torch.dtype, tokens: int, block: int) -> None:
    check(integers(2, 3, tokens, 16).to(dtype), block)


@interpreted
@pytest.mark.parametrize("head_dim", [1, 40, 128, 256])
def test_head_dims(head_dim: int) -> None:
    check(integers(1, 2, 50, head_dim).bfloat16(), 20)


@interpreted
@DTYPES
def test_any_strides(dtype: torch.dtype) -> None:
    x = integers(2, 70, 3, 3, 24).to(dtype)
    for part in (x[:, :, 1].transpose(1, 2), x[:, :, :, 2, :16].transpose(1, 2), x[:, ::2, 0].transpose(1, 2)):
        check(part, 16)
    check(integers(1, 2, 16, 40).mT, 16)
    check(integers(1, 1, 1, 8).expand(2, 3, 40, 8), 16)


@interpreted
@DTYPES
def test_means_of_any_numbers(dtype: torch.dtype) -> None:
    x = (torch.randn(1, 2, 200, 32) + 3).to(dtype)
    exact = torch.stack([part.double().mean(dim=2) for part in x.split(64, dim=2)], dim=2)
    with interpret():
        means = block_mean(x, 64)
    torch.testing.assert_close(means.double(), exact, rtol=1e-6, atol=1e-6)


@interpreted
@DTYPES
def test_blocks_with_sizes_of_their_own(dtype: torch.dtype) -> None:
    sizes = torch.tensor([24, 1, 9, 23], dtype=torch.int32)
    exists = (torch.arange(24) < sizes.unsqueeze(-1)).flatten().unsqueeze(-1)
    check((integers(1, 2, 96, 16) * exists).to(dtype), 24, sizes)


@interpreted
def test_nan_and_infinity_stay_in_their_block() -> None:
    x = integers(1, 1, 40, 8)
    x[0, 0, 3, 0], x[0, 0, 20, 1] = torch.nan, torch.inf
    with interpret():
        means = block_mean(x, 16)
    torch.testing.assert_close(means, topk.block_mean(x, 16), rtol=0, atol=0, equal_nan=True)


@interpreted
def test_nothing_and_what_it_refuses() -> None:
    with interpret():
        assert block_mean(torch.zeros(1, 2, 0, 8), 16).shape == (1, 2, 0, 8)
        with pytest.raises(ArgumentError, match="block must be at least 1, got 0"):
            block_mean(torch.zeros(1, 1, 4, 2), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_one_kernel_for_every_length_and_no_spills(arch: int, dtype: torch.dtype) -> None:
    with gpu(arch) as kernels:
        for heads, tokens in ((1, 1), (2, 64), (3, 100), (16, 1024)):
            block_mean(torch.zeros(1, heads, tokens, 128, dtype=dtype), 64)
    (kernel,) = kernels
    assert kernel.launches == [(1, 1, 1), (2, 1, 1), (3 * 2, 1, 1), (16 * 16, 1, 1)]
    assert kernel.spilled == 0
    assert kernel.shared <= SHARED_LIMIT[arch]
    # Loads of 16 bytes: without them, memory would wait for addresses.
    assert "LDG.E.128" in kernel.sass


@pytest.mark.parametrize(
    ("head_dim", "block", "sized"),
    [(80, 64, False), (256, 64, False), (64, 1, False), (16, 1000, False), (64, 64, True)],
)
def test_other_sizes_compile_without_spills(head_dim: int, block: int, sized: bool) -> None:
    x = torch.zeros(1, 2, 2 * block, head_dim, dtype=torch.bfloat16)
    with gpu(90) as kernels:
        block_mean(x, block, torch.ones(2, dtype=torch.int32) if sized else None)
    assert [kernel.spilled for kernel in kernels] == [0]
