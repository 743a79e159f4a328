"""One random call of the native CPU kernel, compared with the definition in fp64."""

from __future__ import annotations

import ctypes

import torch
from support.native_bounds import forward_bound, gradient_bounds
from support.native_cases import Call, Case
from support.threads import torch_threads
from torch import Tensor

from sparseattn.attn_ops.kernels.cpu.native import block_sparse as native
from sparseattn.attn_ops.reference import block_sparse as reference


def check_case(library: ctypes.CDLL, case: Case) -> None:
    """Assert that forward and backward of the library are those of the definition, and leave their inputs alone."""
    call = case.call()
    inputs = call.q, call.k, call.v, *call.arguments[:2]
    before = [x.clone() for x in inputs]
    with torch_threads(case.threads):
        out, lse = native.attention(library, call.q, call.k, call.v, *call.arguments, **call.settings)
    exact, exact_lse = _check_forward(call, out, lse)
    grad_out, grad_lse = case.gradients()
    given = grad_out, grad_lse, out, lse, call.q, call.k, call.v
    with torch_threads(case.threads):
        grads = native.attention_backward(library, *given, *call.arguments, **call.settings)
    _check_backward(call, grads, grad_out, grad_lse, exact, exact_lse)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def _check_forward(call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Compare with the definition in fp64, and return its out and lse."""
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    exact, exact_lse = reference.block_sparse_attention(q, k, v, *call.arguments, **call.settings)
    magnitude, _ = reference.block_sparse_attention(q, k, v.abs(), *call.arguments, **call.settings)
    assert (out.dtype, out.stride()) == (call.q.dtype, torch.empty_like(call.q).stride())
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    assert float((lse - exact_lse)[~empty].abs().sum()) <= 1e-5 * max(1, int((~empty).sum()))
    error, allowed = float((out.double() - exact).abs().sum()), forward_bound(call, exact, magnitude)
    assert error <= allowed < torch.inf, f"out: {error / allowed:.3g} of what is allowed"
    return exact, exact_lse


def _check_backward(
    call: Call,
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    exact: Tensor,
    exact_lse: Tensor,
) -> None:
    inputs = call.q, call.k, call.v
    exact_inputs = [x.double() for x in inputs]
    given = grad_out.double(), None if grad_lse is None else grad_lse.double()
    exact_grads = reference.block_sparse_attention_backward(
        *given, exact, exact_lse, *exact_inputs, *call.arguments, **call.settings
    )
    bounds = gradient_bounds(call, exact_grads, *given, exact, exact_lse)
    for name, grad, exact_grad, allowed, x in zip("qkv", grads, exact_grads, bounds, inputs, strict=True):
        assert (grad.dtype, grad.stride()) == (x.dtype, torch.empty_like(x).stride())
        error = float((grad.double() - exact_grad).norm())
        assert error <= allowed < torch.inf, f"gradient of {name}: {error / allowed:.3g} of what is allowed"
