"""Methods that choose blocks, by their Triton providers, in the interpreter: against their definitions."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from support.triton_interpreter import interpret, why_not_interpret
from torch import Tensor

from sparseattn import Capability
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.kernels import coarse_branch, sla
from sparseattn.attn_ops.registry import backend
from sparseattn.attn_ops.spec import Kernel

pytestmark = [
    pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret()),
    # Of a key that does not exist, weights are computed and thrown away.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]

GRID = [3, 6, 8]
H200 = Capability.of("sm90", {"triton": "3.7"})
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "block_topk": ("block_topk_attention", {"block_q": 32, "block_k": 32, "keep_ratio": 0.4}),
    "block_topk, causal": ("block_topk_attention", {"block_q": 32, "block_k": 16, "keep_ratio": 0.4, "causal": True}),
    "sla": ("sparse_linear_attention", {"block_q": 32, "block_k": 16, "keep_ratio": 0.4}),
    "vsa": ("video_sparse_attention", {"grid": GRID, "tile": [2, 4, 4], "sparsity": 0.5}),
    "vsa, no gate": ("video_sparse_attention", {"grid": GRID, "tile": [2, 4, 4], "sparsity": 0.5}),
    "sta": ("sliding_tile_attention", {"grid": GRID, "tile": [2, 4, 4], "window": [1, 1, 2] + 3 * [3] + [2, 2, 1] * 2}),
    "vmoba": ("vmoba_attention", {"grid": GRID, "chunk": [3, 3, 4], "topk": 2}),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def _on_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers are asked as if there were one, and compute here."""

    def kernel(backward: bool, name: str, provider: str, q: Tensor, k: Tensor, **given: Any) -> Kernel:
        chosen = backend(name).provider(provider)
        call = AttentionCall(
            *(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], q.dtype, "cuda"),
            causal=given.pop("causal", False),
            scale=given.pop("scale", None),
            needs_grad=backward,
            params=tuple(given.items()),
        )
        assert chosen.reasons(call, H200) == []
        load = chosen.load_backward if backward else chosen.load
        assert load is not None
        return load()

    for name in {"block_sparse", *(method.split(",")[0] for method in METHODS)}:
        module = importlib.import_module(f"sparseattn.attn_ops.backends.{name}")
        monkeypatch.setattr(module, "forward_kernel", lambda *args, **given: kernel(False, *args, **given))
        monkeypatch.setattr(module, "backward_kernel", lambda *args, **given: kernel(True, *args, **given))
    for module in (sla, coarse_branch):
        monkeypatch.setattr(module, "runs_triton", lambda device: True)


def tensors(name: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, and what the method's branch takes."""
    q, k, v = (torch.randn(1, heads, 144, 32) for heads in (4, 2, 2))
    extra = {"sla": [torch.randn(32, 32) / 6], "vsa": [torch.randn_like(q)]}
    return [x.to(dtype).requires_grad_() for x in (q, k, v, *extra.get(name, []))]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_is_the_definition(name: str, dtype: torch.dtype) -> None:
    op, params = METHODS[name]
    given = [x.detach() for x in tensors(name, dtype)]
    with interpret(arch=90):
        out, lse = getattr(torch.ops.sparseattn, op)(*given, **params, provider="triton")
    want, want_lse = getattr(torch.ops.sparseattn, op)(*given, **params, provider="reference")
    assert (out.double() - want.double()).norm() < TOLERANCE[dtype] * want.double().norm()
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_gradients_are_those_of_the_definition(name: str, dtype: torch.dtype) -> None:
    op, params = METHODS[name]
    given = tensors(name, dtype)
    exact = [x.detach().float().requires_grad_() for x in given]
    with interpret(arch=90):
        results = getattr(torch.ops.sparseattn, op)(*given, **params, provider="triton")
        cotangents = torch.randn_like(results[0]), torch.randn_like(results[1])
        got = torch.autograd.grad(results, given, cotangents)
    want = torch.autograd.grad(
        getattr(torch.ops.sparseattn, op)(*exact, **params, provider="reference"),
        exact,
        [x.float() for x in cotangents],
    )
    for grad, expected in zip(got, want, strict=True):
        assert float((grad.double() - expected).norm()) <= GRADIENT_TOLERANCE[dtype] * float(expected.norm())
