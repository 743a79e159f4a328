"""The Triton kernel of block-sparse attention against its definition, in the interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.block_sparse_cases import MODES, Case, inputs, lists
from support.triton_interpreter import interpret, why_not_interpret
from torch import Tensor

from sparseattn.attn_ops.kernels.triton import block_sparse
from sparseattn.attn_ops.kernels.triton.tiles import block_sparse_tile
from sparseattn.attn_ops.reference.block_sparse import block_sparse_attention

pytestmark = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Relative L2 error of the output; the reference rounds once, the kernel rounds the weights too."""


def check(case: Case, q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, arch: int = 90) -> None:
    sizes = torch.randint(0, case.blocks[1] + 1, (-(-case.seq[1] // case.blocks[1]),), dtype=torch.int32)
    args = (q, k, v, index, count, sizes if case.sizes else None)
    options = {"block_q": case.blocks[0], "block_k": case.blocks[1], "causal": case.causal, "scale": case.scale}
    with interpret(arch):
        out, lse = block_sparse.attention(*args, **options)
    want, want_lse = block_sparse_attention(q, k, v, index.clamp(max=index.shape[-1] - 1), *args[4:], **options)
    assert out.dtype == q.dtype
    assert out.stride() == torch.empty_like(q).stride()
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    error = (out.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    assert error < TOLERANCE[case.dtype]
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    assert torch.equal(out[lse == -torch.inf], torch.zeros_like(out[lse == -torch.inf]))
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", MODES.values(), ids=MODES.keys())
def test_equals_the_definition(case: Case) -> None:
    check(case, *inputs(case), *lists(case, case.batch, case.heads[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_halves(dtype: torch.dtype, causal: bool) -> None:
    case = Case(dtype=dtype, causal=causal, seq=(100, 140), blocks=(64, 64), heads=(2, 1), sizes=True)
    check(case, *inputs(case), *lists(case, 1, 2))


@pytest.mark.parametrize("head_dim", [1, 16, 40, 80, 256])
def test_head_dims(head_dim: int) -> None:
    case = Case(head_dim=head_dim, seq=(64, 70), causal=True)
    check(case, *inputs(case), *lists(case, 1, 2))


@pytest.mark.parametrize("arch", [80, 90])
def test_tiles_of_large_blocks(arch: int) -> None:
    case = Case(head_dim=128, blocks=(128, 128), seq=(200, 200), causal=True, dtype=torch.float16, heads=(1, 1))
    tile = block_sparse_tile(arch, 2, case.head_dim, *case.blocks)
    assert tile.rows == (64 if arch == 80 else 128)
    check(case, *inputs(case), *lists(case, 1, 1), arch=arch)


def test_strided_inputs_give_the_querys_strides() -> None:
    case = Case(heads=(2, 2), batch=2, seq=(64, 64))
    packed = torch.randn(2, 64, 3, 2, 40)
    q, k, v = (tensor[..., :32].transpose(1, 2) for tensor in packed.unbind(2))
    check(case, q, k, v, *lists(case, 2, 2))
    q = torch.randn(2, 64, 2, 32).transpose(1, 2)
    check(case, q, k, v, *lists(case, 2, 2))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 2)])
def test_lists_are_broadcast(batch: int, heads: int) -> None:
    case = Case(batch=2, seq=(50, 96), blocks=(32, 48))
    index, count = lists(case, batch, heads)
    check(case, *inputs(case), index, count)
    check(case, *inputs(case), index.mT.contiguous().mT, count)


def test_long_lists_are_split_in_chunks() -> None:
    case = Case(heads=(1, 1), blocks=(16, 16), seq=(32, 16 * 140), head_dim=16, density=0.95, causal=True)
    q, k, v = inputs(case)
    index, count = lists(case, 1, 1)
    check(dataclasses.replace(case, causal=False, seq=(32, 16 * 140 - 3)), q, k[:, :, :-3], v[:, :, :-3], index, count)
    check(case, q, k, v, index, count)


def test_padding_is_never_read_as_a_number() -> None:
    case = Case(sizes=False, seq=(64, 64))
    q, k, v = inputs(case)
    index, count = lists(case, 1, 2)
    sizes = torch.tensor([20, 32], dtype=torch.int32)
    options = {"block_q": 32, "block_k": 32, "causal": False, "scale": 0.2}
    with interpret():
        want = block_sparse.attention(q, k, v, index, count, sizes, **options)
        k[:, :, 20:32], v[:, :, 20:32] = torch.nan, torch.nan
        got = block_sparse.attention(q, k, v, index, count, sizes, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_inputs_stay_as_they_were() -> None:
    case = Case(scale=-0.5)
    args = (*inputs(case), *lists(case, 1, 2))
    before = [tensor.clone() for tensor in args]
    check(case, *args)
    for tensor, copy in zip(args, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("shape", [(0, 2, 8, 16), (1, 2, 0, 16)])
def test_nothing_to_compute(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape)
    index = torch.zeros(1, 1, -(-shape[2] // 32), 1, dtype=torch.int32)
    out, lse = block_sparse.attention(q, q, q, index, index[..., 0], block_q=32, block_k=32, causal=False, scale=1.0)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:-1]


def test_no_keys() -> None:
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 0, 16)
    index = torch.zeros(1, 1, 1, 0, dtype=torch.int32)
    count = torch.zeros(1, 1, 1, dtype=torch.int32)
    out, lse = block_sparse.attention(q, k, k, index, count, block_q=32, block_k=32, causal=False, scale=1.0)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((1, 2, 8), -torch.inf))
