"""The Triton kernels compiled for every architecture: no spills, shared memory fits, one kernel for all lengths."""

from __future__ import annotations

import re

import pytest
import torch
from support.triton_aot import ARCHS, SHARED_LIMIT, CompiledKernel, gpu
from support.triton_launches import launch_block_sparse, launch_block_sparse_backward, launch_sage

from sparseattn.attn_ops.kernels.triton.tiles import block_sparse_tile, has_fast_fp64

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BACKWARD = ["grad_q_kernel", "grad_q_kernel", "_mark", "_list_rows", "grad_kv_kernel"]
"""What the gradients compile; in fp32 without fast fp64, that of the queries is not computed again."""
MODES = pytest.mark.parametrize("masked", [False, True], ids=["plain", "causal"])


def check(kernels: list[CompiledKernel], arch: int) -> CompiledKernel:
    """Return that of attention: those that round come before it."""
    for kernel in kernels:
        check_resources(kernel, arch)
    assert [kernel.name for kernel in kernels] in (["_forward"], ["sum_parts_kernel", "round_kernel", "_forward"])
    return kernels[-1]


def check_resources(kernel: CompiledKernel, arch: int) -> None:
    assert kernel.spilled == 0, kernel
    assert kernel.shared <= SHARED_LIMIT[arch], kernel
    assert 0 < kernel.registers <= 255, kernel


def instructions(kernel: CompiledKernel) -> set[str]:
    """Matrix multiplications, and asynchronous copies to shared memory of 16 bytes a thread."""
    return set(re.findall(r"\b(?:[A-Z]*MMA\b|LDGSTS(?=\S*\.128))", kernel.sass))


@MODES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", ARCHS)
def test_block_sparse(arch: int, head_dim: int, masked: bool) -> None:
    with gpu(arch) as kernels:
        launch_block_sparse(BF16, head_dim, 64, masked)
    assert check(kernels, arch).launches == [(4 * 4, 1, 1)]


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim", "block"),
    [
        *((arch, BF16, 128, 128) for arch in ARCHS),
        *((arch, BF16, 256, 64) for arch in ARCHS),
        *((arch, FP32, 64, 64) for arch in (80, 100, 120)),
        *((90, FP32, head_dim, 64) for head_dim in (128, 256)),
        *((80, dtype, 80, 64) for dtype in (BF16, FP16)),
        *((90, BF16, 64, block) for block in (16, 20, 96, 128)),
    ],
    ids=str,
)
def test_block_sparse_with_every_mask(arch: int, dtype: torch.dtype, head_dim: int, block: int) -> None:
    with gpu(arch) as kernels:
        launch_block_sparse(dtype, head_dim, block, masked=True)
    check(kernels, arch)


@pytest.mark.parametrize(
    ("arch", "matrix"), [(80, "HMMA"), (89, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")]
)
def test_block_sparse_instructions(arch: int, matrix: str) -> None:
    with gpu(arch) as kernels:
        launch_block_sparse(BF16, 64, 64, masked=False)
    assert instructions(kernels[0]) == {matrix, "LDGSTS"}


def test_block_sparse_keeps_the_pipeline_full() -> None:
    """An address that waits for a load of the same step would cost a buffer of K and of V."""
    tile = block_sparse_tile(90, 2, 128, 64, 64)
    with gpu(90) as kernels:
        launch_block_sparse(BF16, 128, 64, masked=False)
    assert check(kernels, 90).shared >= 2 * tile.stages * tile.keys * 128 * 2


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim", "blocks", "masked"),
    [
        *((arch, BF16, head_dim, (64, 64), True) for arch in ARCHS for head_dim in (64, 128)),
        *((90, BF16, head_dim, (128, 64), False) for head_dim in (64, 128)),
        *((arch, BF16, 64, (128, 64), True) for arch in (80, 100)),
        *((arch, BF16, head_dim, (128, 128), True) for arch, head_dim in ((90, 64), (90, 128), (100, 64))),
        *((arch, BF16, 256, (64, 64), True) for arch in (80, 90)),
        *((90, FP32, head_dim, (64, 64), True) for head_dim in (64, 128, 256)),
        (80, FP32, 64, (64, 64), True),
        (89, FP32, 128, (64, 64), True),
        (80, FP16, 80, (96, 20), True),
    ],
    ids=str,
)
def test_block_sparse_backward(
    arch: int, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int], masked: bool
) -> None:
    with gpu(arch) as kernels:
        launch_block_sparse_backward(dtype, head_dim, blocks, masked)
    assert [kernel.name for kernel in kernels] == BACKWARD[dtype == FP32 and not has_fast_fp64(arch) :]
    for kernel in kernels:
        check_resources(kernel, arch)


def test_block_sparse_backward_has_no_atomics() -> None:
    """They would add in the order in which programs happen to run."""
    with gpu(90) as kernels:
        launch_block_sparse_backward(BF16, 64, (64, 64), masked=True)
    for kernel in kernels:
        assert not re.search(r"\b(ATOMG?|RED)\b", kernel.sass), kernel


@MODES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("arch", ARCHS)
def test_sage(arch: int, pv: str, head_dim: int, masked: bool) -> None:
    if pv == "fp8" and arch < 89:
        pytest.skip("FP8 needs sm_89")
    with gpu(arch) as kernels:
        launch_sage(BF16, head_dim, pv, masked)
    check(kernels, arch)


@pytest.mark.parametrize(
    ("arch", "pv", "matrix"),
    [
        *((80, "fp16", "IMMA HMMA"), (90, "fp16", "IGMMA HGMMA"), (100, "fp16", "IMMA UTCHMMA")),
        *((89, "fp8", "IMMA QMMA"), (90, "fp8", "IGMMA QGMMA"), (100, "fp8", "IMMA UTCQMMA")),
        *((120, "fp16", "IMMA HMMA"), (120, "fp8", "IMMA QMMA")),
    ],
    ids=str,
)
def test_sage_instructions(arch: int, pv: str, matrix: str) -> None:
    with gpu(arch) as kernels:
        launch_sage(BF16, 64, pv, masked=False)
    assert instructions(kernels[-1]) == {*matrix.split(), "LDGSTS"}


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim", "pv"),
    [
        *((arch, BF16, 256, "fp16") for arch in (80, 90, 100)),
        *((arch, BF16, 256, "fp8") for arch in (89, 120)),
        (90, FP16, 80, "fp8"),
        (90, FP32, 16, "fp8"),
    ],
    ids=str,
)
def test_sage_with_every_mask(arch: int, dtype: torch.dtype, head_dim: int, pv: str) -> None:
    with gpu(arch) as kernels:
        launch_sage(dtype, head_dim, pv, masked=True)
    check(kernels, arch)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", ARCHS)
def test_sage_smoothed(arch: int, head_dim: int) -> None:
    with gpu(arch) as kernels:
        launch_sage(BF16, head_dim, "fp16" if arch < 89 else "fp8", masked=True, smooth=True)
    check(kernels, arch)


LENGTHS = [(1, 75), (16, 26), (100, 110), (128, 139), (1000, 523), (1, 2059)]
"""(Sq, Sk + 10): 1, multiples of 16 and others are what Triton would compile a kernel of its own for."""


@pytest.mark.parametrize("kernel", ["block_sparse", "sage", "sage_smoothed"])
def test_one_kernel_for_every_length_and_number_of_heads(kernel: str) -> None:
    with gpu(90) as kernels:
        for heads in (2, 4, 16):
            for seq_q, seq_k in LENGTHS:
                if kernel.startswith("sage"):
                    launch_sage(BF16, 64, "fp8", True, seq_q, seq_k, heads, smooth=kernel == "sage_smoothed")
                else:
                    launch_block_sparse(BF16, 64, 64, True, seq_q, seq_k, heads)
    check(kernels, 90)
    assert {len(compiled.launches) for compiled in kernels} == {3 * len(LENGTHS)}


def test_one_set_of_backward_kernels_for_every_short_length_and_grouping() -> None:
    lengths = [(seq_q, seq_k) for seq_q, seq_k in LENGTHS if seq_q % 64]
    with gpu(90) as kernels:
        for heads in (4, 6, 16):
            for seq_q, seq_k in lengths:
                launch_block_sparse_backward(BF16, 64, (64, 64), True, seq_q, seq_k, heads)
    assert [kernel.name for kernel in kernels] == BACKWARD
    assert {len(kernel.launches) for kernel in kernels} == {3 * len(lengths)}
