"""Gradients of every differentiable op: the formulas in fp64, the fast paths against them, the same bits every time.

Scores up to 700, where the softmax is nearly one-hot, are among the inputs. The definition gets the rounded inputs in
fp64 and chooses blocks itself; that it chose the same shows in the lse, which would be another over other blocks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.gradient_cases import CASES, Case
from support.threads import torch_threads
from torch import Tensor

from sparseattn.attn_ops.errors import GradientError
from sparseattn.attn_ops.kernels import chunk_rows
from sparseattn.attn_ops.kernels.cpu import block_sparse
from sparseattn.attn_ops.kernels.cpu.native.library import Kernel
from sparseattn.attn_ops.kernels.cpu.precision import LARGE_LSE

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
SCALES = (1.0, 4.0, 16.0)
ONE_OF_EACH = {case.op: name for name, case in CASES.items()}
SELECTING = ("block_topk", "sla", "vsa", "vmoba")
TRAINABLE_INSTEAD = {
    "sage_attention": "flash_attention",
    "sage_fp4_attention": "flash_attention",
    "sparge_attention": "block_topk_attention",
    "sage_sparse_linear_attention": "sparse_linear_attention",
}
Pair = tuple[Tensor | None, Tensor | None]  # gradients of out and lse
Use = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """The CPU kernel of block_sparse_attention from here on: "native", if the machine has it, or "gathered"."""
    native = block_sparse.kernel

    def chosen(path: str) -> None:
        gathered = Kernel(None, "gathered blocks")
        monkeypatch.setattr(block_sparse, "kernel", native if path == "native" else lambda: gathered)

    return chosen


def paths(case: Case) -> tuple[str, ...]:
    """Those of an op; two of them do not go through block_sparse_attention."""
    return ("native",) if case.op.startswith(("flash", "vmoba")) else ("native", "gathered")


@pytest.fixture
def _two_threads() -> Iterator[None]:
    with torch_threads(2):
        yield


def cotangents(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse."""
    return torch.randn_like(tensors[0]), torch.randn(tensors[0].shape[:-1])


def gradients(
    results: tuple[Tensor, Tensor], tensors: list[Tensor], grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    """Those of the op, through the results that have a gradient."""
    given = [(x, grad) for x, grad in zip(results, (grad_out, grad_lse), strict=True) if grad is not None]
    return torch.autograd.grad([x for x, _ in given], tensors, [grad for _, grad in given], retain_graph=True)


@dataclass(frozen=True)
class Truth:
    """The definition in fp64: lse, and the gradients of every pair."""

    tensors: list[Tensor]
    lse: Tensor
    gradients: list[list[Tensor]]

    def check(self, path: str, lse: Tensor, every: Iterable[tuple[Tensor, ...]]) -> None:
        """Compare dtype, layout, and relative L2 distance, from 0 none."""
        torch.testing.assert_close(lse.detach().double(), self.lse, rtol=1e-5, atol=1e-4, msg=lambda m: f"{path}: {m}")
        for got, wanted in zip(every, self.gradients, strict=True):
            for grad, want, x in zip(got, wanted, self.tensors, strict=True):
                assert (grad.dtype, grad.stride()) == (x.dtype, torch.empty_like(x).stride()), path
                assert float((grad.double() - want).norm()) <= TOLERANCE[x.dtype] * float(want.norm()), path


def truth(case: Case, tensors: list[Tensor], pairs: Sequence[Pair]) -> Truth:
    """What the definition says of these tensors."""
    doubles = [x.detach().double() for x in tensors]
    definition = case.define(doubles)
    wanted = [
        case.define_backward(
            torch.zeros_like(doubles[0]) if grad_out is None else grad_out.double(),
            None if grad_lse is None else grad_lse.double(),
            *definition,
            doubles,
        )
        for grad_out, grad_lse in pairs
    ]
    return Truth(tensors, definition[1], wanted)


def check_paths(case: Case, tensors: list[Tensor], pairs: Sequence[Pair], use: Use) -> None:
    """The op through every CPU kernel, against the definition."""
    expected = truth(case, tensors, pairs)
    for path in paths(case):
        use(path)
        results = case.attend(tensors)
        expected.check(path, results[1], [gradients(results, tensors, *pair) for pair in pairs])


@pytest.mark.parametrize("name", CASES)
def test_formulas_of_the_definition(name: str) -> None:
    case = CASES[name]

    class Definition(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            results = case.define(list(tensors))
            ctx.save_for_backward(*results, *tensors)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            out, lse, *tensors = ctx.saved_tensors
            return tuple(case.define_backward(*grads, out, lse, tensors))

    def finite(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = Definition.apply(*tensors)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(finite, case.tensors(torch.float64, dim=3), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", SCALES)
def test_fast_paths(name: str, dtype: torch.dtype, scale: float, use: Use) -> None:
    tensors = CASES[name].tensors(dtype, scale)
    grad_out, grad_lse = cotangents(tensors)
    # Through out alone, the terms that nearly cancel where attention is sharp are all there is.
    check_paths(CASES[name], tensors, [(grad_out, None), (grad_out, grad_lse)], use)


@pytest.mark.parametrize("name", CASES)
def test_the_definition_as_a_provider(name: str) -> None:
    case = CASES[name]
    tensors = case.tensors(torch.bfloat16, 16.0)
    results, pair = case.attend(tensors, "reference"), (cotangents(tensors)[0], None)
    truth(case, tensors, [pair]).check("reference", results[1], [gradients(results, tensors, *pair)])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_through_lse_alone(name: str, dtype: torch.dtype, use: Use) -> None:
    tensors = CASES[name].tensors(dtype)
    check_paths(CASES[name], tensors, [(None, cotangents(tensors)[1])], use)


@pytest.mark.parametrize("name", CASES)
def test_the_largest_scores_that_stay_in_fp32(name: str, use: Use) -> None:
    case = CASES[name]
    tensors = case.tensors(torch.float32, 3.0, dim=128)

    def largest() -> float:
        return float(case.attend(tensors)[1].nan_to_num(neginf=0.0).abs().max())

    with torch.no_grad():
        tensors[0] *= 0.95 * LARGE_LSE / largest()
    assert 0.8 * LARGE_LSE < largest() < LARGE_LSE
    check_paths(case, tensors, [(cotangents(tensors)[0], None)], use)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(dtype, scale) for dtype in TOLERANCE for scale in SCALES if scale < 16 or dtype.itemsize == 2]
)
def test_regrouped_rows_of_vmoba(dtype: torch.dtype, scale: float) -> None:
    """The form that the Triton provider takes, over the CPU provider of block_sparse_attention.

    In fp32 at 16 it cannot be within 1e-5: it merges by an fp32 lse, which knows 700 to 3e-5.
    """
    case = CASES["vmoba"]
    tensors = [x.detach() for x in case.tensors(dtype, scale)]
    settings = {**case.defined, "scale": tensors[0].shape[-1] ** -0.5, "provider": "cpu"}
    results, (grad_out, grad_lse) = chunk_rows.attention(*tensors, **settings), cotangents(tensors)
    pairs = [(grad_out, None), (grad_out, grad_lse)]
    got = [chunk_rows.attention_backward(*pair, *results, *tensors, **settings) for pair in pairs]
    truth(case, tensors, pairs).check("regrouped", results[1], got)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("op", ONE_OF_EACH)
@pytest.mark.parametrize("path", ["native", "gathered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal(op: str, path: str, dtype: torch.dtype, use: Use) -> None:
    use(path)
    name = ONE_OF_EACH[op]
    tensors = CASES[name].tensors(dtype)
    grads = cotangents(tensors)
    results = [CASES[name].attend(tensors) for _ in range(2)]
    first, second = ((*result, *gradients(result, tensors, *grads)) for result in results)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("op", ONE_OF_EACH)
def test_double_backward_is_refused(op: str) -> None:
    case = CASES[ONE_OF_EACH[op]]
    tensors = case.tensors(torch.float32)
    for result in case.attend(tensors):
        grads = torch.autograd.grad(result[result.isfinite()].square().sum(), tensors, create_graph=True)
        for grad in grads:
            with pytest.raises(GradientError, match=rf"^{op}: double backward is not supported\. Use torch's own"):
                torch.autograd.grad(grad.sum(), tensors, retain_graph=True)


@pytest.mark.parametrize("op", [*ONE_OF_EACH, *TRAINABLE_INSTEAD])
def test_forward_mode_is_refused(op: str) -> None:
    case = CASES[ONE_OF_EACH[TRAINABLE_INSTEAD.get(op, op)]]
    given = [x.detach() for x in case.tensors(torch.float32)]
    call = getattr(torch.ops.sparseattn, op)
    rest, settings = (case.rest, case.settings) if op in ONE_OF_EACH else ((), {})
    for place, x in enumerate(given):
        with forward_ad.dual_level():
            mixed = [*given[:place], forward_ad.make_dual(x, torch.ones_like(x)), *given[place + 1 :]]
            with pytest.raises(GradientError, match=f"{op}.*: forward-mode AD is not supported"):
                call(*mixed, *rest, **settings)


@pytest.mark.parametrize("op", ONE_OF_EACH)
def test_transforms_are_refused(op: str) -> None:
    case = CASES[ONE_OF_EACH[op]]
    q, *others = (x.detach() for x in case.tensors(torch.float32))
    with pytest.raises(
        GradientError, match=rf"{op}.*: torch\.func transforms cannot differentiate it\. Use torch\.aut"
    ):
        torch.func.grad(lambda x: case.attend([x, *others])[0].sum())(q)


@pytest.mark.parametrize("op", TRAINABLE_INSTEAD)
def test_quantized_ops_refuse_and_name_what_trains(op: str) -> None:
    instead = TRAINABLE_INSTEAD[op]
    assert instead in ONE_OF_EACH
    call, case = getattr(torch.ops.sparseattn, op), CASES["sla, all" if "linear" in op else "flash, causal"]
    tensors = [x.detach() for x in case.tensors(torch.float32)]
    for x in tensors:
        x.requires_grad_()
        with pytest.raises(GradientError, match=rf"^{op}: it has no gradient, .*(Use|Train with) {instead}[ ,]"):
            call(*tensors)
        with torch.no_grad():
            assert not call(*tensors)[0].requires_grad
        x.requires_grad_(False)


@pytest.mark.parametrize("backend", SELECTING)
def test_selection_is_said_to_carry_no_gradient(backend: str) -> None:
    module = importlib.import_module(f"sparseattn.attn_ops.backends.{backend}")
    words = " ".join(str(getattr(module, module.OP).__doc__).split())
    assert "the selection carries no gradient" in words
