"""The native kernels of INT8 scores and of selection, against the definitions, on every instruction set here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from support import sanitized
from support.native_cases import Case, cases, repeatable
from support.quantized_cases import check_quantized, check_rounding, check_selection
from support.threads import torch_threads
from torch import Tensor

from sparseattn.attn_ops.blocks import by_device, topk
from sparseattn.attn_ops.kernels.cpu import quantized, sage, sparge
from sparseattn.attn_ops.kernels.cpu.native import build, selection
from sparseattn.attn_ops.kernels.cpu.native import library as native
from sparseattn.attn_ops.reference import sage as reference


def reason_for_none() -> str:
    """Why this machine cannot have the kernels, or ""."""
    try:
        build.library_path()
    except build.BuildError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(reason := reason_for_none()), reason=f"no native kernel: {reason}")
NAMES = list(build.INSTRUCTION_SETS)
OPTIONS: dict[str, Any] = {"granularity": "per_block", "smooth_k": True, "causal": False, "scale": 0.3}


@pytest.fixture(params=NAMES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The kernels compiled for one instruction set."""
    best = build.instruction_set()
    if NAMES.index(request.param) < NAMES.index(best):
        pytest.skip(f"the CPU has {best}, not {request.param}")
    monkeypatch.setattr(build, "instruction_set", lambda: request.param)
    path, _ = build.library_path()
    return ctypes.CDLL(str(path))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SPARSEATTN_CPU_KERNEL=0."""
    monkeypatch.setenv(native.SWITCH, "0")
    native.kernel.cache_clear()
    yield
    native.kernel.cache_clear()


def inputs(seq: int = 200, dim: int = 64, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, seq, dim).to(dtype) for heads in (4, 2, 2)]


@repeatable(40)
@given(case=cases())
def test_attention_is_the_definition(library: ctypes.CDLL, case: Case) -> None:
    check_quantized(library, case)


@repeatable(15)
@given(case=cases())
def test_integers_are_those_of_the_definition(library: ctypes.CDLL, case: Case) -> None:
    check_rounding(library, case)


@repeatable(20)
@given(case=cases())
def test_selection_is_the_definition(library: ctypes.CDLL, case: Case) -> None:
    check_selection(library, case)


@pytest.mark.parametrize("sizes", [None, torch.tensor([16, 3, 1], dtype=torch.int32)])
def test_means_of_short_blocks(library: ctypes.CDLL, sizes: Tensor | None) -> None:
    x = torch.randn(1, 2, 48, 20)
    if sizes is not None:
        x *= (torch.arange(16) < sizes.unsqueeze(-1)).flatten().unsqueeze(-1)
    torch.testing.assert_close(selection.block_mean(library, x, 16, sizes), topk.block_mean(x, 16, sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_reaches_the_output(
    library: ctypes.CDLL, name: str, value: float, dtype: torch.dtype
) -> None:
    qkv = dict(zip("qkv", inputs(dtype=dtype), strict=True))
    qkv[name][0, 0, 70, 3] = value
    out, lse = quantized.dense(library, *qkv.values(), **OPTIONS)
    want, want_lse = reference.sage_attention(*qkv.values(), pv="fp16", **OPTIONS)
    assert torch.equal(out.isfinite(), want.isfinite())
    assert not out.isfinite().all()
    assert torch.equal(lse.isnan(), want_lse.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_later_changes_nothing_earlier(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Even if it is NaN, and an odd block ends beside it."""
    block_q, block_k, first = 33, 66, 99
    index = torch.arange(4, dtype=torch.int32).expand(1, 1, 7, 4)
    lists = index, torch.full((1, 1, 7), 4, dtype=torch.int32)
    modes: dict[str, Any] = {"block_q": block_q, "block_k": block_k, "smooth_k": True, "causal": True, "scale": 0.3}
    q, k, v = inputs(dtype=dtype)
    out, lse = quantized.on_lists(library, q, k, v, *lists, **modes)
    for x in (q, k, v):
        x[:, :, first:] = torch.nan
    again, lse_again = quantized.on_lists(library, q, k, v, *lists, **modes)
    assert torch.equal(again[:, :, :first], out[:, :, :first])
    assert torch.equal(lse_again[:, :, :first], lse[:, :, :first])
    assert again[:, :, first:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    q, k, v = inputs(600, dtype=dtype)
    out, lse = quantized.dense(library, q, k, v, **OPTIONS)
    with torch_threads(5):
        again = quantized.dense(library, q, k, v, **OPTIONS)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


def test_lists_out_of_range_are_refused(library: ctypes.CDLL) -> None:
    q, k, v = inputs()
    lists = torch.full((1, 1, 4, 1), 4, dtype=torch.int32), torch.ones((1, 1, 4), dtype=torch.int32)
    with pytest.raises(ValueError, match="block_index must number the 4 key blocks from 0"):
        quantized.on_lists(library, q, k, v, *lists, block_q=64, block_k=64, smooth_k=True, causal=False, scale=1.0)


RARE = [{"bits": 4}, {"smooth_q": True}, {"asymmetric": True}, {"smooth_v": True}, {"pv": "fp8"}]


@pytest.mark.parametrize("rare", RARE, ids=lambda rare: next(iter(rare)))
def test_rare_options_go_in_chunks(rare: dict[str, Any]) -> None:
    options = {"pv": "fp16", **OPTIONS, **rare}
    for got, wanted in zip(sage.attention(*inputs(), **options), sage.in_chunks(*inputs(), **options), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("no_library")
def test_switched_off() -> None:
    q, k, v = inputs()
    assert torch.equal(
        sage.attention(q, k, v, pv="fp16", **OPTIONS)[0], sage.in_chunks(q, k, v, pv="fp16", **OPTIONS)[0]
    )
    lists = torch.zeros((1, 4, 4, 1), dtype=torch.int32), torch.ones((1, 4, 4), dtype=torch.int32)
    modes: dict[str, Any] = {"block_q": 64, "block_k": 64, "smooth_k": True, "causal": False, "scale": 0.3}
    modes |= {"pv": "fp16", "pv_threshold": None}
    assert torch.equal(sparge.attention(q, k, v, *lists, **modes)[0], sparge.by_operators(q, k, v, *lists, **modes)[0])
    assert torch.equal(by_device.block_mean(k, 64), topk.block_mean(k, 64))


@pytest.mark.usefixtures("no_library")
def test_the_other_path_agrees() -> None:
    """Integers are the same either way; rounding of weights and sums is not."""
    q, k, v = inputs(300)
    out, lse = sage.attention(q, k, v, pv="fp16", **OPTIONS)
    native.kernel.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(native.SWITCH)
        again, lse_again = sage.attention(q, k, v, pv="fp16", **OPTIONS)
    assert (again - out).norm() <= 1e-3 * out.norm()
    torch.testing.assert_close(lse_again, lse, rtol=1e-6, atol=1e-5)


def test_random_calls_under_sanitizers(tmp_path: Path, sanitized_cache: Path, request: pytest.FixtureRequest) -> None:
    """No stray access and no undefined behaviour; three kernels a call."""
    sanitized.check_calls(tmp_path, sanitized_cache, "quantized", request.config.getoption("--sanitized-calls") // 5)
