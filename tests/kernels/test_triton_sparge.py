"""The Triton kernel of SpargeAttention: its definition in the interpreter, no spills on any architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.quantize_cases import summable
from support.triton_aot import ARCHS, SHARED_LIMIT, CompiledKernel, gpu
from support.triton_interpreter import interpret, why_not_interpret
from support.triton_launches import launch_sparge
from torch import Tensor

from sparseattn.attn_ops.backends.sparge import sparge_attention
from sparseattn.attn_ops.blocks.sparge_map import sparge_block_map
from sparseattn.attn_ops.errors import UnsupportedError
from sparseattn.attn_ops.kernels.triton import sparge

interpreted = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """Shapes and modes of one call."""

    heads: tuple[int, int] = (2, 2)
    seq: tuple[int, int] = (70, 150)
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    blocks: tuple[int, int] = (32, 32)
    causal: bool = False
    scale: float = 0.2
    pv: str = "fp16"
    smooth_k: bool = True
    pv_threshold: float | None = None
    selection: dict[str, Any] = field(default_factory=lambda: {"keep_ratio": 0.6})

    @property
    def lists(self) -> dict[str, Any]:
        sizes = {"block_q": self.blocks[0], "block_k": self.blocks[1]}
        return {**sizes, "causal": self.causal, "scale": self.scale, "smooth_k": self.smooth_k}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Keys have a large mean, which is what smoothing is for; the first ones have the highest scores.

    It is the same in whatever order they are added.
    """
    shapes = [(1, h, s, case.head_dim) for h, s in zip(case.heads, case.seq, strict=True)]
    q, k, v = torch.randn(shapes[0]), torch.randn(shapes[1]), torch.randn(shapes[1])
    direction = torch.randn(case.head_dim)
    q, k = q + 2 * direction, k + 2 * torch.randn(1, case.heads[1], 1, case.head_dim)
    k[:, :, :32] += direction / 2
    return summable(q).to(case.dtype), summable(k).to(case.dtype), summable(v).to(case.dtype)


def run(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    index, count = sparge_block_map(q, k, **case.selection, **case.lists)
    # What follows a list means nothing, and may be no block at all.
    index = torch.where(torch.arange(index.shape[-1]) < count.unsqueeze(-1), index, 1 << 20).to(torch.int32)
    threshold = None if case.pv_threshold is None else torch.tensor(case.pv_threshold)
    with interpret(arch=90):
        return sparge.attention(q, k, v, index, count, pv=case.pv, pv_threshold=threshold, **case.lists)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check(case: Case, q: Tensor, k: Tensor, v: Tensor) -> None:
    out, lse = run(case, q, k, v)
    arguments = {"pv": case.pv, "pv_threshold": case.pv_threshold, **case.selection, **case.lists}
    want, want_lse = sparge_attention(q, k, v, provider="reference", **arguments)
    assert (out.dtype, out.stride()) == (q.dtype, torch.empty_like(q).stride())
    assert (lse.dtype, lse.is_contiguous()) == (torch.float32, True)
    # The output's rounding, and that of the weights, which is relative to another largest score from tile to tile.
    limit = (5e-3 if case.dtype is BF16 else 5e-4) + (3e-2 if case.pv == "fp8" else 5e-4)
    assert relative_error(out, want) < limit
    torch.testing.assert_close(lse, want_lse, atol=3e-5, rtol=1e-6)


MODES = {
    "plain": Case(),
    "grouped heads": Case(heads=(4, 2), seq=(40, 70)),
    "causal": Case(causal=True, seq=(150, 150)),
    "causal, more keys": Case(causal=True, seq=(70, 150)),
    "causal, more queries": Case(causal=True, seq=(150, 70)),
    "whole blocks": Case(seq=(64, 128)),
    "one key": Case(seq=(10, 1), smooth_k=False),
    "not smoothed": Case(smooth_k=False),
    "published blocks": Case(blocks=(128, 64), seq=(200, 200), causal=True),
    "wide keys": Case(blocks=(64, 128), seq=(200, 200), causal=True),
    "no tile divides": Case(blocks=(48, 24), seq=(100, 100), causal=True),
    "small blocks": Case(blocks=(16, 16), seq=(60, 60), causal=True),
    "tiles within a block": Case(blocks=(256, 64), seq=(300, 150)),
    "mass": Case(selection={"mass": 0.7, "sink": True}),
    "similarity": Case(selection={"similarity": 0.3, "keep_ratio": 0.2}, causal=True, seq=(150, 150)),
    "negative scale": Case(scale=-0.1, causal=True),
    "zero scale": Case(scale=0.0, causal=True),
    "fp8": Case(pv="fp8"),
    "fp8, causal": Case(pv="fp8", causal=True, seq=(150, 150), heads=(4, 2)),
    "fp8, small blocks": Case(pv="fp8", causal=True, seq=(90, 90), blocks=(16, 16)),
    "second stage": Case(pv_threshold=2.0, seq=(100, 250), selection={"keep_ratio": 0.9}),
    "second stage, causal": Case(pv_threshold=2.0, seq=(250, 250), selection={"keep_ratio": 1.0}, causal=True),
    "second stage, wide tile": Case(
        pv_threshold=1.0, seq=(150, 400), blocks=(128, 64), selection={"keep_ratio": 1.0}, pv="fp8"
    ),
}


@interpreted
@pytest.mark.parametrize("case", MODES.values(), ids=MODES.keys())
def test_equals_the_definition(case: Case) -> None:
    check(case, *inputs(case))


@interpreted
@pytest.mark.parametrize("name", [name for name in MODES if name.startswith("second stage")])
def test_the_second_stage_has_something_to_skip(name: str) -> None:
    case = MODES[name]
    q, k, v = inputs(case)
    arguments = {"pv": case.pv, **case.selection, **case.lists}
    _, lse = run(case, q, k, v)
    _, whole = sparge_attention(q, k, v, provider="reference", **arguments)
    assert (whole - lse).max() > 1e-3


@interpreted
def test_second_stage_with_a_threshold_per_head() -> None:
    case = Case(seq=(64, 200), selection={"keep_ratio": 1.0})
    q, k, v = inputs(case)
    thresholds = torch.stack([torch.tensor([0.5, 7.0]), torch.tensor([1.0, 50.0])], dim=1)[:, 1]
    lists = sparge_block_map(q, k, **case.selection, **case.lists)
    with interpret(arch=90):
        out, lse = sparge.attention(q, k, v, *lists, pv="fp16", pv_threshold=thresholds, **case.lists)
    arguments = {**case.selection, **case.lists, "pv_thresholds": thresholds, "provider": "reference"}
    want, want_lse = sparge_attention(q, k, v, **arguments)
    assert relative_error(out, want) < 1e-3
    torch.testing.assert_close(lse, want_lse, atol=3e-5, rtol=1e-6)


@interpreted
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_halves(dtype: torch.dtype, pv: str) -> None:
    case = Case(dtype=dtype, pv=pv, seq=(100, 100), heads=(2, 1), causal=True)
    check(case, *inputs(case))


@interpreted
@pytest.mark.parametrize("head_dim", [1, 16, 80, 160])
def test_head_dims(head_dim: int) -> None:
    case = Case(head_dim=head_dim, heads=(2, 1), scale=head_dim**-0.5, causal=True, pv="fp8")
    check(case, *inputs(case))


@interpreted
def test_strided_inputs_give_the_querys_strides() -> None:
    case = Case(seq=(50, 50))
    q, k, v = (x[..., :32].transpose(1, 2) for x in torch.randn(1, 50, 3, 2, 40).unbind(2))
    check(case, q, k, v)


@interpreted
def test_a_block_of_queries_that_keeps_nothing() -> None:
    case = Case(seq=(64, 64))
    q, k, v = inputs(case)
    lists = torch.zeros(1, 1, 2, 2, dtype=torch.int32), torch.tensor([[[0, 1]]], dtype=torch.int32)
    for pv in ("fp16", "fp8"):
        with interpret(arch=90):
            out, lse = sparge.attention(q, k, v, *lists, pv=pv, pv_threshold=None, **case.lists)
        assert not out[:, :, :32].any()
        assert (lse[:, :, :32] == -torch.inf).all()
        assert lse[:, :, 32:].isfinite().all()


@interpreted
def test_what_it_refuses() -> None:
    q, k, v = inputs(Case(seq=(16, 16)))
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32)
    modes: dict[str, Any] = {"smooth_k": True, "causal": False, "scale": 1.0}
    with interpret(arch=80), pytest.raises(UnsupportedError, match=r'needs sm_89 or newer, got sm_80\. Use pv="fp16"'):
        sparge.attention(q, k, v, *lists, block_q=16, block_k=32, pv="fp8", pv_threshold=None, **modes)
    with interpret(arch=90), pytest.raises(UnsupportedError, match="needs blocks of one tile, 16 x 32, got 16 x 16"):
        sparge.attention(q, k, v, *lists, block_q=16, block_k=16, pv="fp16", pv_threshold=torch.ones(()), **modes)


def fits(kernels: list[CompiledKernel], arch: int) -> CompiledKernel:
    """Return that of attention: those that round come before it."""
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= SHARED_LIMIT[arch], kernel
        assert 0 < kernel.registers <= 255, kernel
    assert [kernel.name for kernel in kernels] == ["sum_parts_kernel", "round_kernel", "_forward"]
    return kernels[-1]


MASKED = pytest.mark.parametrize("masked", [False, True], ids=["plain", "causal"])


@MASKED
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("arch", "pv"), [(arch, pv) for arch in ARCHS for pv in ("fp16", "fp8") if (arch, pv) != (80, "fp8")]
)
def test_compiles_without_spills(arch: int, pv: str, head_dim: int, masked: bool) -> None:
    with gpu(arch) as kernels:
        launch_sparge(BF16, head_dim, pv, masked)
    assert fits(kernels, arch).launches == [(2 * 4, 1, 1)]


@pytest.mark.parametrize(
    ("arch", "head_dim"), [(arch, dim) for arch in ARCHS for dim in (64, 128) if (arch, dim) != (100, 128)]
)
def test_second_stage_compiles_without_spills(arch: int, head_dim: int) -> None:
    """With 128 channels on sm_100 it would spill: the backend refuses that."""
    with gpu(arch) as kernels:
        launch_sparge(BF16, head_dim, "fp16" if arch == 80 else "fp8", True, skips=True)
    fits(kernels, arch)


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim", "pv", "blocks"),
    [
        *((arch, BF16, 256, "fp16" if arch == 80 else "fp8", (128, 64)) for arch in ARCHS),
        *((90, BF16, 64, "fp8", blocks) for blocks in ((64, 128), (16, 16), (48, 20))),
        (90, FP16, 80, "fp8", (128, 64)),
        (90, FP32, 16, "fp8", (64, 64)),
    ],
    ids=str,
)
def test_other_sizes_compile_without_spills(
    arch: int, dtype: torch.dtype, head_dim: int, pv: str, blocks: tuple[int, int]
) -> None:
    with gpu(arch) as kernels:
        launch_sparge(dtype, head_dim, pv, True, blocks=blocks)
    fits(kernels, arch)


@pytest.mark.parametrize(
    ("arch", "pv", "matrix"),
    [
        *((80, "fp16", "IMMA HMMA"), (90, "fp16", "IGMMA HGMMA"), (100, "fp16", "IMMA UTCHMMA")),
        *(
            (89, "fp8", "IMMA QMMA"),
            (90, "fp8", "IGMMA QGMMA"),
            (100, "fp8", "IMMA UTCQMMA"),
            (120, "fp8", "IMMA QMMA"),
        ),
    ],
    ids=str,
)
def test_instructions(arch: int, pv: str, matrix: str) -> None:
    with gpu(arch) as kernels:
        launch_sparge(BF16, 64, pv, False)
    found = set(re.findall(r"\b(?:[A-Z]*MMA\b|LDGSTS(?=\S*\.128))", kernels[-1].sass))
    assert found == {*matrix.split(), "LDGSTS"}


def test_one_kernel_for_every_length_and_number_of_heads() -> None:
    with gpu(90) as kernels:
        for heads in (2, 4, 16):
            for seq in ((1, 75), (16, 26), (100, 110), (128, 139), (1000, 523), (1, 2059)):
                launch_sparge(BF16, 64, "fp8", True, skips=True, seq=seq, heads=heads)
    fits(kernels, 90)
    assert [len(kernel.launches) for kernel in kernels] == [18, 18, 18]
