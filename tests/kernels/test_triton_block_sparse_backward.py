"""The Triton kernels of block-sparse attention's gradients against the definition in fp64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from support.block_sparse_cases import MODES, Case, inputs, lists
from support.triton_interpreter import interpret, why_not_interpret
from torch import Tensor

from sparseattn.attn_ops.kernels.triton import block_sparse, block_sparse_backward
from sparseattn.attn_ops.kernels.triton.tiles import block_sparse_grad_kv_tile, block_sparse_grad_q_tile, has_fast_fp64
from sparseattn.attn_ops.reference import block_sparse as reference

pytestmark = [
    pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret()),
    # Of a key that does not exist, weights are computed and thrown away.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
"""Relative L2 error of a gradient."""

Gradients = tuple[Tensor, Tensor, Tensor]


def gradients(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    arch: int = 90,
) -> tuple[Gradients, Gradients, Tensor]:
    """Those of the kernels and of the definition, and the definition's lse."""
    sizes = torch.randint(0, case.blocks[1] + 1, (-(-case.seq[1] // case.blocks[1]),), dtype=torch.int32)
    given = index, count, sizes if case.sizes else None
    options = {"block_q": case.blocks[0], "block_k": case.blocks[1], "causal": case.causal, "scale": case.scale}
    with interpret(arch):
        results = block_sparse.attention(q, k, v, *given, **options)
        got = block_sparse_backward.attention_backward(grad_out, grad_lse, *results, q, k, v, *given, **options)
    given = *(x.double() for x in (q, k, v)), index.clamp(max=index.shape[-1] - 1), *given[1:]
    grads = grad_out.double(), None if grad_lse is None else grad_lse.double()
    results = reference.block_sparse_attention(*given, **options)
    return got, reference.block_sparse_attention_backward(*grads, *results, *given, **options), results[1]


def check(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    grad_out: Tensor | None = None,
    *,
    through_lse: bool = True,
    arch: int = 90,
) -> None:
    grad_out = torch.randn_like(q) if grad_out is None else grad_out
    grad_lse = torch.randn(q.shape[:-1]) if through_lse else None
    got, want, lse = gradients(case, q, k, v, index, count, grad_out, grad_lse, arch)
    tolerance = TOLERANCE[case.dtype]
    if not has_fast_fp64(arch):
        # A score is known to half a unit in its last place, and a weight to as much of itself: in fp32, 3e-5 at 700.
        tolerance = max(tolerance, torch.finfo(torch.float32).eps * float(lse.nan_to_num(neginf=0).abs().max()))
    for grad, expected, x in zip(got, want, (q, k, v), strict=True):
        assert (grad.dtype, grad.stride()) == (x.dtype, torch.empty_like(x).stride())
        assert float((grad.double() - expected).norm()) <= tolerance * float(expected.norm())
    blind = lse == -torch.inf
    assert torch.equal(got[0][blind], torch.zeros_like(got[0][blind]))


@pytest.mark.parametrize("case", MODES.values(), ids=MODES.keys())
def test_equals_the_definition(case: Case) -> None:
    check(case, *inputs(case), *lists(case, case.batch, case.heads[0]))


@pytest.mark.parametrize("through_lse", [False, True], ids=["out", "out_and_lse"])
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sharp_attention(dtype: torch.dtype, size: float, through_lse: bool) -> None:
    """At 16, scores are up to 1000 and the softmax is nearly one-hot: what is left of dP - delta is small."""
    case = Case((4, 1), (100, 140), (64, 64), 1, 64, dtype, through_lse, not through_lse, 0.125, 0.7)
    q, k, v = ((size * x.float()).to(dtype) for x in inputs(case))
    check(case, q, k, v, *lists(case, 1, 4), through_lse=through_lse)


@pytest.mark.parametrize("size", [1.0, 16.0])
def test_without_fast_fp64(size: float) -> None:
    """Exponents stay in fp32, and lse is trusted."""
    case = Case((4, 1), (100, 140), (64, 64), causal=True, scale=0.2)
    q, k, v = (size * x for x in inputs(case))
    check(case, q, k, v, *lists(case, 1, 4), arch=89)


def test_out_of_more_than_the_listed_blocks() -> None:
    """In half precision out may be coarse, as where another branch was subtracted from a sum."""
    case = Case(dtype=torch.bfloat16)
    q, k, v = inputs(case)
    index, count = lists(case, 1, 2)
    options = {"block_q": 32, "block_k": 32, "causal": False, "scale": case.scale}
    grad_out = torch.randn_like(q)
    with interpret():
        out, lse = block_sparse.attention(q, k, v, index, count, **options)
        coarse = out + 0.05 * torch.randn_like(out)
        got = block_sparse_backward.attention_backward(grad_out, None, coarse, lse, q, k, v, index, count, **options)
    given = *(x.double() for x in (q, k, v)), index.clamp(max=3), count, None
    results = reference.block_sparse_attention(*given, **options)
    want = reference.block_sparse_attention_backward(grad_out.double(), None, *results, *given, **options)
    for grad, expected in zip(got, want, strict=True):
        assert float((grad.double() - expected).norm()) <= TOLERANCE[case.dtype] * float(expected.norm())


@pytest.mark.parametrize("head_dim", [1, 40, 80, 256])
def test_head_dims(head_dim: int) -> None:
    case = Case(head_dim=head_dim, seq=(64, 70), causal=True)
    check(case, *inputs(case), *lists(case, 1, 2))


@pytest.mark.parametrize("arch", [80, 90])
def test_tiles_of_large_blocks(arch: int) -> None:
    case = Case(head_dim=128, blocks=(128, 128), seq=(200, 200), causal=True, dtype=torch.float16, heads=(2, 1))
    tiles = [tile(arch, 2, 128, 128, 128) for tile in (block_sparse_grad_q_tile, block_sparse_grad_kv_tile)]
    assert [(tile.rows, tile.keys) for tile in tiles] == ([(64, 64)] * 2 if arch == 80 else [(128, 64), (32, 128)])
    check(case, *inputs(case), *lists(case, 1, 2), arch=arch)


def test_strides_of_inputs_and_of_grad_out() -> None:
    case = Case(heads=(2, 2), batch=2, seq=(64, 64))
    packed = torch.randn(2, 64, 3, 2, 40)
    q, k, v = (tensor[..., :32].transpose(1, 2) for tensor in packed.unbind(2))
    given = q, k, v, *lists(case, 2, 2)
    check(case, *given, torch.randn(2, 64, 2, 32).transpose(1, 2))
    check(case, *given, torch.randn(2, 2, 32, 64).mT)
    check(case, *given, torch.randn(2, 2, 1, 1).expand(q.shape))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 4)])
def test_lists_are_broadcast(batch: int, heads: int) -> None:
    case = Case(heads=(4, 2), batch=2, seq=(50, 96), blocks=(32, 48))
    index, count = lists(case, batch, heads)
    check(case, *inputs(case), index, count)
    check(case, *inputs(case), index.mT.contiguous().mT, count)


def test_padding_is_never_read_as_a_number() -> None:
    case = Case(seq=(64, 64))
    q, k, v = inputs(case)
    index, count = lists(case, 1, 2)
    sizes = torch.tensor([20, 32], dtype=torch.int32)
    options = {"block_q": 32, "block_k": 32, "causal": False, "scale": 0.2}
    grad_out, runs = torch.randn_like(q), []
    with interpret():
        for padding in (0.0, torch.nan):
            k[:, :, 20:32], v[:, :, 20:32] = padding, padding
            results = block_sparse.attention(q, k, v, index, count, sizes, **options)
            given = grad_out, None, *results, q, k, v, index, count, sizes
            runs.append(block_sparse_backward.attention_backward(*given, **options))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    for grad in runs[0][1:]:
        assert torch.equal(grad[:, :, 20:32], torch.zeros(1, 2, 12, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_and_inputs_stay(dtype: torch.dtype) -> None:
    case = Case(heads=(4, 1), dtype=dtype, seq=(100, 77), scale=-0.5)
    given = (*inputs(case), *lists(case, 1, 4), torch.randn(1, 4, 100, 32).to(dtype), torch.randn(1, 4, 100))
    before = [tensor.clone() for tensor in given]
    first, second = (gradients(case, *given)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(list(given), before, rtol=0, atol=0)


def test_long_lists() -> None:
    case = Case(heads=(1, 1), blocks=(16, 16), seq=(16 * 140, 32), head_dim=16, density=0.95, causal=True)
    check(case, *inputs(case), *lists(case, 1, 1), through_lse=False)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 8), (8, 0)])
def test_nothing_to_compute(seq_q: int, seq_k: int) -> None:
    q, k = torch.randn(1, 2, seq_q, 16), torch.randn(1, 2, seq_k, 16)
    index = torch.zeros(1, 1, -(-seq_q // 32), -(-seq_k // 32), dtype=torch.int32)
    options = {"block_q": 32, "block_k": 32, "causal": False, "scale": 1.0}
    given = index, torch.zeros(index.shape[:3], dtype=torch.int32)
    results = block_sparse.attention(q, k, k, *given, **options)
    grads = block_sparse_backward.attention_backward(q, None, *results, q, k, k, *given, **options)
    for grad, x in zip(grads, (q, k, k), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))
