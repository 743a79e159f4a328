"""The native CPU kernel against the definition: every mode, every instruction set this CPU has, no stray access."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given
from support import sanitized
from support.native_cases import Call, Case, cases, repeatable, tensor
from support.native_check import check_case
from support.threads import torch_threads
from torch import Tensor

from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.attn_ops.kernels.cpu.native import block_sparse as native
from sparseattn.attn_ops.kernels.cpu.native import build
from sparseattn.attn_ops.reference import block_sparse as reference


def reason_for_none() -> str:
    """Why this machine cannot have the kernel, or ""."""
    try:
        build.library_path()
    except build.BuildError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(reason := reason_for_none()), reason=f"no native kernel: {reason}")
NAMES = list(build.INSTRUCTION_SETS)


@pytest.fixture(params=[name for name in NAMES if name != "avx512_vnni"])  # VNNI is for integers
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The kernel compiled for one instruction set."""
    best = build.instruction_set()
    if NAMES.index(request.param) < NAMES.index(best):
        pytest.skip(f"the CPU has {best}, not {request.param}")
    monkeypatch.setattr(build, "instruction_set", lambda: request.param)
    path, _ = build.library_path()
    return ctypes.CDLL(str(path))


def random_lists(seq: int, block: int, density: float, heads: int = 2) -> BlockIndex:
    blocks = -(-seq // block)
    mask = torch.rand(1, heads, blocks, blocks) < density
    mask[:, :, :, 0] = True
    return BlockIndex.from_mask(mask, block_q=block, block_k=block, seq_q=seq, seq_k=seq)


def forward(library: ctypes.CDLL, call: Call) -> tuple[Tensor, Tensor]:
    return native.attention(library, call.q, call.k, call.v, *call.arguments, **call.settings)


def exact(call: Call) -> tuple[Tensor, Tensor]:
    inputs = (x.double() for x in (call.q, call.k, call.v))
    return reference.block_sparse_attention(*inputs, *call.arguments, **call.settings)


def large_call(dtype: torch.dtype, causal: bool = False, dim: int = 64, density: float = 0.4) -> Call:
    q, k, v = (tensor("tokens first", 1, 2, 500, dim, dtype) for _ in range(3))
    return Call(q, k, v, random_lists(500, 64, density), causal, dim**-0.5)


@repeatable(120)
@given(case=cases())
def test_random_calls(library: ctypes.CDLL, case: Case) -> None:
    check_case(library, case)


@repeatable(60)
@given(case=cases(layouts=("shared tokens", "heads first")))
def test_random_calls_where_roundings_do_not_average(library: ctypes.CDLL, case: Case) -> None:
    check_case(library, case)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 80, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_a_usual_call(library: ctypes.CDLL, dtype: torch.dtype, dim: int, causal: bool) -> None:
    call = large_call(dtype, causal, dim)
    (out, lse), (exact_out, exact_lse) = forward(library, call), exact(call)
    error = float((out.double() - exact_out).abs().sum() / exact_out.abs().sum())
    # Rounding out to bf16 alone is 1.4e-3; products in pairs round most of the weights too.
    in_pairs = build.instruction_set() == "avx512_bf16" and dim % 2 == 0
    assert error <= (1e-6 if dtype is torch.float32 else 2e-3 if in_pairs else 1.5e-3)
    assert float((lse - exact_lse).abs().max()) <= 1e-5


def test_bf16_is_more_exact_than_dense_attention_of_torch(library: ctypes.CDLL) -> None:
    call = large_call(torch.bfloat16, density=1.0)
    exact_out, _ = exact(call)
    dense = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
    errors = [float((x.double() - exact_out).abs().sum()) for x in (forward(library, call)[0], dense)]
    assert errors[0] < 0.92 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_more_steps_than_are_kept(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    q, k, v, grad = (tensor("tokens first", 1, 1, tokens, 64, dtype) for tokens in (70, 300, 300, 70))
    lists = BlockIndex.from_mask(torch.rand(1, 1, 1, 300) < 0.8, block_q=70, block_k=1, seq_q=70, seq_k=300)
    call = Call(3 * q, 3 * k, v, lists, False, 0.125)  # sharp, so that the mean of grad_out . v matters
    given = *forward(library, call), call.q, call.k, call.v, *call.arguments
    grads = native.attention_backward(library, grad, None, *given, **call.settings)
    inputs = (x.double() for x in (call.q, call.k, call.v))
    exact_given = grad.double(), None, *exact(call), *inputs, *call.arguments
    for got, want in zip(grads, reference.block_sparse_attention_backward(*exact_given, **call.settings), strict=True):
        assert float((got.double() - want).norm()) <= 5e-3 * float(want.norm())


@pytest.mark.parametrize("block", [(200, 300), (64, 1000), (1000, 64)])
def test_all_blocks_are_dense_attention(library: ctypes.CDLL, block: tuple[int, int]) -> None:
    q, k, v = (torch.randn(2, heads, 1000, 32) for heads in (4, 2, 2))
    mask = torch.ones(1, 1, -(-1000 // block[0]), -(-1000 // block[1]), dtype=torch.bool)
    lists = BlockIndex.from_mask(mask, block_q=block[0], block_k=block[1], seq_q=1000, seq_k=1000)
    out, _ = forward(library, Call(q, k, v, lists, True, 32**-0.5))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_reaches_the_rows_that_see_it(
    library: ctypes.CDLL, name: str, value: float, dtype: torch.dtype
) -> None:
    call = large_call(dtype, density=0.2)
    clean, clean_lse = forward(library, call)
    token = 200
    getattr(call, name)[:, 0, token, 3] = value
    out, lse = forward(library, call)
    expected, _ = exact(call)
    sees = call.lists.token_mask()[0, 0, :, token] if name != "q" else torch.arange(500) == token
    assert sees.any()
    assert not sees.all()
    assert torch.equal(out[0, 0, sees].isnan(), expected[0, 0, sees].isnan())
    assert torch.equal(out[0, 0, sees].isinf(), expected[0, 0, sees].isinf())
    for before, after in ((clean, out), (clean_lse, lse)):
        assert torch.equal(after[0, 0, ~sees], before[0, 0, ~sees])
        assert torch.equal(after[:, 1:], before[:, 1:])


def test_a_row_whose_scores_are_all_minus_infinity_is_empty(library: ctypes.CDLL) -> None:
    q, k, v = torch.rand(1, 1, 40, 8) + 1, torch.full((1, 1, 40, 8), -torch.inf), torch.randn(1, 1, 40, 8)
    call = Call(q, k, v, random_lists(40, 16, 1.0, heads=1), False, 1.0)
    out, lse = forward(library, call)
    assert not out.any()
    assert torch.equal(lse, exact(call)[1].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_bits_every_time(library: ctypes.CDLL, dtype: torch.dtype, threads: int) -> None:
    call = large_call(dtype)
    out, lse = forward(library, call)
    given = torch.randn_like(out), None, out, lse, call.q, call.k, call.v

    with torch_threads(threads):
        runs = [native.attention_backward(library, *given, *call.arguments, **call.settings) for _ in range(4)]
        again = forward(library, call)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    ("heads", "threads", "splits"), [(1, 1, 1), (8, 2, 1), (3, 2, 2), (1, 2, 2), (24, 32, 4), (1, 64, 16), (25, 32, 5)]
)
def test_splits_keep_threads_busy(heads: int, threads: int, splits: int) -> None:
    assert native._splits(heads, threads) == splits


@pytest.mark.parametrize("number", [-1, 8, 1 << 30])
def test_lists_out_of_range_are_refused(library: ctypes.CDLL, number: int) -> None:
    call = large_call(torch.float32)
    call.lists.index[0, 1, 2, 0] = number
    with pytest.raises(ArgumentError, match="block_index must number the 8 key blocks from 0"):
        forward(library, call)


def test_counts_out_of_range_are_refused(library: ctypes.CDLL) -> None:
    call = large_call(torch.float32)
    call.lists.count[0, 1, 2] = 9
    out = torch.randn_like(call.q)
    given = out, None, out, torch.zeros(1, 2, 500), call.q, call.k, call.v
    with pytest.raises(ArgumentError, match="block_count be at most"):
        native.attention_backward(library, *given, *call.arguments, **call.settings)


def test_random_calls_under_sanitizers(tmp_path: Path, sanitized_cache: Path, request: pytest.FixtureRequest) -> None:
    """No stray access and no undefined behaviour; `--sanitized-calls 2000` is the long run."""
    sanitized.check_calls(tmp_path, sanitized_cache, "block_sparse", request.config.getoption("--sanitized-calls"))
