"""The Hopper kernels compiled: registers for the programs an SM is to hold, no spills, short loops, products in flight.

The limits on instructions are those of hand-written trials of the same schedules; of 462 a block in ThunderKittens'
kernel, counted likewise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.sass import PRODUCTS, Loop, main_loop
from support.triton_aot import CompiledKernel, gpu
from torch import Tensor

from sparseattn.attn_ops.kernels.gluon import block_sparse, sage, sparge

BF16 = torch.bfloat16
REGISTERS_OF_SM, SHARED_OF_SM, SHARED_OF_SYSTEM = 65536, 228 * 1024, 1024
SCHEDULES = pytest.mark.parametrize("overlapped", [False, True], ids=["one_buffer", "overlapped"])


def qkv(head_dim: int, seq_q: int = 256, seq_k: int = 256, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(1, heads, seq_q, head_dim, dtype=BF16), torch.randn(1, 2, seq_k, head_dim, dtype=BF16)
    return q, k, torch.randn_like(k)


def lists(block_q: int, seq_q: int = 256, seq_k: int = 256, heads: int = 4) -> tuple[Tensor, Tensor]:
    index = torch.zeros(1, heads, -(-seq_q // block_q), -(-seq_k // 64), dtype=torch.int32)
    return index, index[..., 0]


def launch_block_sparse(
    head_dim: int, block_q: int, masked: bool, overlapped: bool, seq_q: int = 256, seq_k: int = 256, heads: int = 4
) -> None:
    """Launch on whole blocks, or with key sizes and a short last block."""
    seq_k -= 10 * masked
    sizes = torch.zeros(-(-seq_k // 64), dtype=torch.int32) if masked else None
    given = *qkv(head_dim, seq_q, seq_k, heads), *lists(block_q, seq_q, seq_k, heads), sizes
    block_sparse.attention(*given, block_q=block_q, block_k=64, causal=False, scale=0.1, overlapped=overlapped)


def launch_sparge(head_dim: int, pv: str, overlapped: bool) -> None:
    rounding: dict[str, Any] = {"pv": pv, "smooth_k": True, "pv_threshold": None}
    given = *qkv(head_dim), *lists(64)
    sparge.attention(*given, block_q=64, block_k=64, causal=False, scale=0.1, **rounding, overlapped=overlapped)


def launch_sage(head_dim: int, pv: str, overlapped: bool) -> None:
    rounding: dict[str, Any] = {"granularity": "per_thread", "smooth_k": True, "pv": pv, "smooth_v": False}
    sage.attention(*qkv(head_dim, 250, 250), causal=False, scale=0.1, **rounding, overlapped=overlapped)


def check(kernels: list[CompiledKernel], warps: int, programs: int) -> Loop:
    """Check that attention spills nothing and that so many programs fit on an SM; returns its loop over key blocks."""
    *rounding, kernel = kernels
    assert [other.name for other in rounding] in ([], ["sum_parts_kernel", "round_kernel"])
    assert kernel.spilled == 0, kernel
    registers = -(-kernel.registers // 8) * 8 * 32 * warps
    assert programs * registers <= REGISTERS_OF_SM, kernel
    assert programs * (kernel.shared + SHARED_OF_SYSTEM) <= SHARED_OF_SM, kernel
    return main_loop(kernel.sass)


def check_order(loop: Loop, overlapped: bool) -> None:
    """No exponential may come between a product and what it overlaps with, nor a wait between them."""
    order = loop.order(*PRODUCTS, "MUFU.EX2", "WARPGROUP.DEPBAR")
    steps = ["product" if name in PRODUCTS else name for name in order]
    exponentials, wait = "MUFU.EX2", "WARPGROUP.DEPBAR"
    if overlapped:
        assert steps == ["product", exponentials, "product", wait]
    else:
        assert steps == ["product", wait, exponentials, "product", wait]


@SCHEDULES
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_sparse(head_dim: int, masked: bool, overlapped: bool) -> None:
    with gpu(90) as kernels:
        launch_block_sparse(head_dim, 64, masked, overlapped)
    loop = check(kernels, warps=4, programs=3 if overlapped else 4)
    check_order(loop, overlapped)
    limits = {(False, False): 314, (False, True): 371, (True, False): 375, (True, True): 437}
    assert loop.always <= limits[overlapped, masked]


@SCHEDULES
@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_sparse_of_128_rows(head_dim: int, overlapped: bool) -> None:
    with gpu(90) as kernels:
        launch_block_sparse(head_dim, 128, True, overlapped)
    check_order(check(kernels, warps=8, programs=1 if overlapped else 2), overlapped)
    assert kernels[0].launches == [(4 * 2, 1, 1)]


@SCHEDULES
@pytest.mark.parametrize(("head_dim", "pv", "limit"), [(128, "fp8", 373), (128, "fp16", 344), (64, "fp8", 373)])
def test_sparge(head_dim: int, pv: str, limit: int, overlapped: bool) -> None:
    with gpu(90) as kernels:
        launch_sparge(head_dim, pv, overlapped)
    loop = check(kernels, warps=4, programs=3 if overlapped else 4)
    check_order(loop, overlapped)
    assert loop.always <= limit + 61 * overlapped


@SCHEDULES
@pytest.mark.parametrize("pv", ["fp8", "fp16"])
def test_sage(pv: str, overlapped: bool) -> None:
    with gpu(90) as kernels:
        launch_sage(128, pv, overlapped)
    check_order(check(kernels, warps=8, programs=1 if overlapped else 2), overlapped)
    products = {"IGMMA", "QGMMA" if pv == "fp8" else "HGMMA"}
    assert {name for name in PRODUCTS if f"{name}." in kernels[-1].sass} == products


LENGTHS = [(1, 75), (16, 26), (100, 110), (128, 139), (1000, 523), (1, 2059)]
"""(Sq, Sk + 10): 1, multiples of 16 and others are what Triton would compile a kernel of its own for."""


def test_one_kernel_for_every_length_and_number_of_heads() -> None:
    with gpu(90) as kernels:
        for heads in (2, 4, 16):
            for seq_q, seq_k in LENGTHS:
                launch_block_sparse(64, 64, True, False, seq_q, seq_k, heads)
    assert [len(kernel.launches) for kernel in kernels] == [3 * len(LENGTHS)]


def listing(*texts: str) -> str:
    """A disassembly: instructions, and labels that end in a colon."""
    return "\n".join(text if text.endswith(":") else f"        /*0010*/                   {text} ;" for text in texts)


def test_the_main_loop_and_its_order() -> None:
    wait_from_behind = ".L_x_9:", "SYNCS.PHASECHK", "HGMMA.64x64x16 R8", "@P0 BRA `(.L_x_2)"
    body = "@!P0 BRA `(.L_x_9)", "HGMMA.64x64x16 R4", "HGMMA.64x64x16 R4", "@P1 BRA `(.L_x_3)", "FSEL R1", "FSEL R2"
    rest = ".L_x_3:", "MUFU.EX2 R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P2 BRA `(.L_x_1)"
    loop = main_loop(listing("MOV R1", ".L_x_1:", "MOV R2", ".L_x_2:", *body, *rest, "EXIT", *wait_from_behind))
    assert len(loop.instructions) == 10
    assert loop.always == 8
    assert loop.order("HGMMA", "MUFU.EX2", "WARPGROUP.DEPBAR") == ["HGMMA", "MUFU.EX2", "WARPGROUP.DEPBAR"]
    with pytest.raises(AssertionError, match="no loop with a product"):
        main_loop(listing("MOV R1", ".L_x_1:", "MOV R2", "BRA `(.L_x_1)"))


def test_exponentials_before_the_product_are_seen() -> None:
    """What ptxas did where no branch stood between them: it moved all exponentials above the product."""
    hoisted = Loop(["MUFU.EX2 R1", "HGMMA.64x64x16 R4", "HGMMA.64x128x16 R8", "WARPGROUP.DEPBAR.LE gsb0"], frozenset())
    with pytest.raises(AssertionError):
        check_order(hoisted, overlapped=True)
