"""Methods that choose blocks, their attention in the Triton kernel, in the interpreter: against their definitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.triton_interpreter import interpret, why_not_interpret
from torch import Tensor

from sparseattn.attn_ops.backends import block_sparse
from sparseattn.attn_ops.blocks.chunk_choice import ChunkRule, chunk_tiling
from sparseattn.attn_ops.kernels import chunk_rows
from sparseattn.attn_ops.kernels.triton import block_sparse as triton_kernel

pytestmark = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())

GRID = [3, 6, 8]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "block_topk": ("block_topk_attention", {"block_q": 32, "block_k": 32, "keep_ratio": 0.4}),
    "block_topk, causal": ("block_topk_attention", {"block_q": 32, "block_k": 16, "keep_ratio": 0.4, "causal": True}),
    "sla": ("sparse_linear_attention", {"block_q": 32, "block_k": 16, "keep_ratio": 0.4}),
    "vsa": ("video_sparse_attention", {"grid": GRID, "tile": [2, 4, 4], "sparsity": 0.5}),
    "sta": ("sliding_tile_attention", {"grid": GRID, "tile": [2, 4, 4], "window": [1, 1, 2] + 3 * [3] + [2, 2, 1] * 2}),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def attention_in_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """block_sparse_attention is computed by the Triton kernel, whoever is asked."""
    calls = []

    def kernel(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.append(args)
        return triton_kernel.attention(*args, **kwargs)

    monkeypatch.setattr(block_sparse, "forward_kernel", lambda *args, **kwargs: kernel)
    yield
    assert len(calls) == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_is_the_definition(name: str, dtype: torch.dtype) -> None:
    op, params = METHODS[name]
    q, k, v = (torch.randn(1, heads, 144, 32).to(dtype) for heads in (4, 2, 2))
    extra = [torch.randn(32, 32).to(dtype) / 6] if name == "sla" else [torch.randn_like(q)] if name == "vsa" else []
    with interpret(arch=90):
        out, lse = getattr(torch.ops.sparseattn, op)(q, k, v, *extra, **params, provider="cpu")
    want, want_lse = getattr(torch.ops.sparseattn, op)(q, k, v, *extra, **params, provider="reference")
    assert (out.double() - want.double()).norm() < TOLERANCE[dtype] * want.double().norm()
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_regrouped_rows_of_vmoba(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, heads, 144, 32).to(dtype) for heads in (4, 2, 2))
    tiling = chunk_tiling("test", 144, grid=GRID, chunk=[3, 3, 4], chunk_tokens=0)
    rule = ChunkRule("topk", 2, 0.25, "query_head", False)
    with interpret(arch=90):
        out, lse = chunk_rows.attention(q, k, v, tiling=tiling, rule=rule, scale=0.2, provider="cpu")
    params = {"grid": GRID, "chunk": [3, 3, 4], "topk": 2, "scale": 0.2}
    want, want_lse = torch.ops.sparseattn.vmoba_attention(q, k, v, **params, provider="reference")
    assert (out.double() - want.double()).norm() < TOLERANCE[dtype] * want.double().norm()
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
