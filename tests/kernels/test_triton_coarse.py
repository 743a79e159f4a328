"""VSA's coarse branch in Triton: against the definition in the interpreter, and compiled without spills."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.triton_aot import ARCHS, SHARED_LIMIT, gpu
from support.triton_interpreter import interpret, why_not_interpret
from support.triton_launches import launch_coarse
from torch import Tensor

from sparseattn.attn_ops.heads import per_query_head
from sparseattn.attn_ops.kernels import coarse_branch as branch
from sparseattn.attn_ops.kernels.coarse_branch import CoarseBranch, coarse_branch

interpreted = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())
CASES = {
    # (Hq, Hkv), (nq, nk), D, scale
    "whole tiles": ((2, 2), (64, 64), 32, 0.2),
    "grouped heads": ((4, 2), (33, 33), 16, 0.2),
    "cross": ((2, 1), (5, 70), 64, 0.1),
    "one mean": ((1, 1), (1, 1), 8, 1.0),
    "odd channels": ((3, 1), (40, 17), 40, 0.3),
    "many channels": ((1, 1), (35, 20), 200, 0.07),
    "negative scale": ((2, 2), (10, 50), 16, -0.3),
    "no scale": ((2, 2), (10, 50), 16, 0.0),
    "sharp": ((1, 1), (40, 40), 32, 12.0),
}
TOLERANCE = 2e-6


def means(name: str, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, float]:
    (heads, kv_heads), (tiles_q, tiles_k), dim, scale = CASES[name]
    q, k = torch.randn(batch, heads, tiles_q, dim), torch.randn(batch, kv_heads, tiles_k, dim)
    return q, k, torch.randn_like(k), scale


def by_triton(q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> CoarseBranch:
    with interpret(), mock.patch.object(branch, "runs_triton", return_value=True):
        return coarse_branch(q, k, v, scale)


def defined(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, output and lse of q, k and v in fp64, by autograd's operators."""
    k, v = (per_query_head(x, q.shape[1]) for x in (k, v))
    scores = q @ k.mT * scale
    return scores, scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 error; of what is 0 in the definition, such as a gradient through one score, absolute."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1.0))


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_definition(name: str) -> None:
    q, k, v, scale = means(name, batch=2 if name == "cross" else 1)
    got = by_triton(q, k, v, scale)
    wants = defined(q.double(), k.double(), v.double(), scale)
    for result, want in zip((got.scores, got.out, got.lse), wants, strict=True):
        assert result.dtype == torch.float32
        assert error(result, want) < TOLERANCE


@interpreted
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")  # of rows that do not exist
@pytest.mark.parametrize(("arch", "name"), [*((89, name) for name in CASES), (80, "grouped heads"), (80, "sharp")])
def test_its_gradients_are_those_of_the_definition(arch: int, name: str) -> None:
    """In fp64 where it is fast, and without."""
    q, k, v, scale = means(name)
    grad_out, leaves = torch.randn_like(q), [x.double().requires_grad_() for x in (q, k, v)]
    wants = torch.autograd.grad(defined(*leaves, scale)[1], leaves, grad_out.double())
    made = by_triton(q, k, v, scale)
    with interpret(arch), mock.patch.object(branch, "runs_triton", return_value=True):
        grads = made.gradients(grad_out)
    for grad, want in zip(grads, wants, strict=True):
        assert error(grad, want) < 5 * TOLERANCE


@interpreted
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
def test_pytorch_has_the_same_branch() -> None:
    q, k, v, scale = means("grouped heads", batch=2)
    grad_out, got, want = torch.randn_like(q), by_triton(q, k, v, scale), coarse_branch(q, k, v, scale)
    torch.testing.assert_close((got.scores, got.out), (want.scores, want.out), rtol=1e-5, atol=1e-6)
    with interpret(), mock.patch.object(branch, "runs_triton", return_value=True):
        grads = got.gradients(grad_out)
    torch.testing.assert_close(grads, want.gradients(grad_out), rtol=1e-5, atol=1e-6)


@interpreted
def test_without_values_the_scores_are_the_same_and_nothing_else_is_made() -> None:
    q, k, v, scale = means("grouped heads")
    gated, alone = by_triton(q, k, v, scale), by_triton(q, k, None, scale)
    assert torch.equal(alone.scores, gated.scores)
    for made in (alone, coarse_branch(q, k, None, scale)):
        assert [made.v.numel(), made.out.numel(), made.lse.numel()] == [0, 0, 0]


@interpreted
def test_no_means() -> None:
    q, k = torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 5, 16)
    made = by_triton(q, k, k, 1.0)
    assert [made.scores.shape, made.out.shape, made.lse.shape] == [(1, 2, 0, 5), q.shape, (1, 2, 0)]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_without_spills(arch: int, head_dim: int) -> None:
    """Its gradients are those of block-sparse attention, in blocks of 64."""
    with gpu(arch) as kernels:
        launch_coarse(head_dim)
    assert [kernel.name for kernel in kernels] == ["_attend"]
    assert kernels[0].spilled == 0, kernels
    assert kernels[0].shared <= SHARED_LIMIT[arch]
    # IEEE products: tensor cores have none of fp32.
    assert kernels[0].matrix_instructions == {}
