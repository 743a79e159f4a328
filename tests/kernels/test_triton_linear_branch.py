"""SLA's linear branch in Triton: against the definition in the interpreter, and compiled without spills."""

from __future__ import annotations

import re

import pytest
import torch
from support.triton_aot import SHARED_LIMIT, gpu
from support.triton_interpreter import interpret, why_not_interpret
from support.triton_launches import launch_linear_branch
from torch import Tensor

from sparseattn.attn_ops.blocks.sla_method import SlaMethod
from sparseattn.attn_ops.kernels.triton.linear_branch import add_linear_branch
from sparseattn.attn_ops.numerics.linear_attention import FEATURE_MAPS
from sparseattn.attn_ops.reference.sla import linear_attention

interpreted = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {FP32: 1e-6, FP16: 6e-4, BF16: 5e-3}
"""Of half precision: about one rounding of the features of q, the projected states and the result each."""


def tensors(dtype: torch.dtype, heads: tuple[int, int], seq: int, dim: int, batch: int = 1) -> tuple[Tensor, ...]:
    """q, k, v and a projection that keeps their size."""
    q, k, v = (torch.randn(batch, n, seq, dim).to(dtype) for n in (heads[0], heads[1], heads[1]))
    return q, k, v, torch.randn(dim, dim) / dim**0.5


def added(*given: Tensor, bias: Tensor | None = None, out: Tensor | None = None, phi: str = "softmax") -> Tensor:
    out = torch.zeros_like(given[0]) if out is None else out
    with interpret():
        result = add_linear_branch(out, *given, bias, feature_map=phi)
    assert result is out
    return out


def defined(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, phi: str = "softmax") -> Tensor:
    """In fp64."""
    how = SlaMethod(0.5, "all", phi, 64, 64, False, None)
    everything = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    return linear_attention(q.double(), k.double(), v.double(), everything, how) @ weight.double().mT


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@interpreted
@pytest.mark.parametrize("phi", FEATURE_MAPS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "seq", "dim"), [((4, 2), 150, 32), ((3, 1), 601, 64), ((2, 2), 64, 40)])
def test_it_is_the_definition(heads: tuple[int, int], seq: int, dim: int, dtype: torch.dtype, phi: str) -> None:
    given = tensors(dtype, heads, seq, dim, batch=2 if dim == 40 else 1)
    assert error(added(*given, phi=phi), defined(*given, phi=phi)) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("seq", "dim"), [(1, 16), (5, 8), (257, 1), (4500, 16), (70, 128), (40, 200)])
def test_lengths_and_head_dims(seq: int, dim: int, dtype: torch.dtype) -> None:
    """4500 tokens are more than the most parts of the least size."""
    given = tensors(dtype, (1, 1), seq, dim)
    assert error(added(*given), defined(*given)) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_adds_to_the_sparse_part_with_a_bias(dtype: torch.dtype) -> None:
    given, bias = tensors(dtype, (2, 1), 100, 32), torch.randn(32).to(dtype)
    sparse = torch.randn_like(given[0])
    want = sparse.double() + defined(*given) + bias.double()
    assert error(added(*given, bias=bias, out=sparse.clone()), want) < TOLERANCE[dtype]


@interpreted
def test_any_strides() -> None:
    q, k, v, weight = tensors(BF16, (4, 2), 130, 32)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    weight, bias = weight.mT.contiguous().mT.to(FP16), torch.randn(64)[::2]
    out = torch.zeros(1, 4, 130, 48, dtype=BF16)[..., :32]
    added(q, k[..., :32], v, weight, bias=bias, out=out)
    assert error(out, defined(q, k, v, weight) + bias.double()) < TOLERANCE[BF16]


@interpreted
def test_states_beyond_fp16_are_no_trouble() -> None:
    """phi(k) of 601 each: 2000 of them are a state of a million. All values are 1, and so is their mean."""
    q, k, v, weight = tensors(FP16, (1, 1), 2000, 16)
    out = added(q, torch.full_like(k, 600), torch.ones_like(v), weight, phi="elu")
    want = weight.double().sum(dim=1).expand_as(out)
    assert error(out, want) < TOLERANCE[FP16]


@interpreted
@pytest.mark.parametrize("nothing", ["q", "k"])
def test_no_features_add_nothing_but_the_bias(nothing: str) -> None:
    q, k, v, weight = tensors(BF16, (2, 1), 70, 16)
    q, k = (-x.abs() if name == nothing else x for name, x in (("q", q), ("k", k)))
    sparse, bias = torch.randn_like(q), torch.randn(16)
    assert torch.equal(added(q, k, v, weight, bias=bias, out=sparse.clone(), phi="relu"), (sparse + bias).to(BF16))


@interpreted
def test_no_tokens() -> None:
    assert added(*tensors(BF16, (2, 1), 0, 16)).shape == (1, 2, 0, 16)


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim"),
    [
        *((arch, BF16, head_dim) for arch in (80, 90) for head_dim in (64, 128)),
        *((90, FP32, head_dim) for head_dim in (64, 128)),
        (100, BF16, 128),
        (120, BF16, 256),
        (120, FP32, 256),
        (80, FP16, 80),
    ],
    ids=str,
)
def test_compiles_without_spills_or_atomics(arch: int, dtype: torch.dtype, head_dim: int) -> None:
    with gpu(arch) as kernels:
        launch_linear_branch(dtype, head_dim)
    assert [kernel.name for kernel in kernels] == ["_sum_states", "_fold", "_add_branch"]
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= SHARED_LIMIT[arch], kernel
        # Atomics would add in the order in which programs happen to run.
        assert not re.search(r"\b(ATOMG?|RED)\b", kernel.sass), kernel
    tensor_cores = {kernel.name for kernel in kernels if kernel.matrix_instructions}
    assert tensor_cores == (set() if dtype == FP32 else {"_sum_states", "_add_branch"})
