"""Random calls of the native CPU kernel, compared with the definition in fp64.

Run as a script it does the same with a library given by its path: `python native_cases.py LIBRARY FIRST LAST`.
"""

from __future__ import annotations

import ctypes
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.kernels.cpu.native import block_sparse as native
from sparseattn.attn_ops.reference import block_sparse as reference

BLOCKS = (1, 3, 8, 16, 17, 32, 48, 64, 80, 128, 200)
# Relative to sums of magnitudes: the arithmetic of fp32, or one rounding of weights and result, half a unit on average.
TOLERANCE = {torch.float32: 5e-7, torch.float16: 2**-12, torch.bfloat16: 2**-9}


@dataclass(frozen=True)
class Call:
    """The inputs of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: BlockIndex
    causal: bool
    scale: float

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.lists.index, self.lists.count, self.lists.key_sizes

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"block_q": self.lists.block_q, "block_k": self.lists.block_k}
        return {**sizes, "causal": self.causal, "scale": self.scale}


def tensor(layout: str, batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random numbers of shape (batch, heads, tokens, dim) in one of three layouts with unit stride on dim."""
    if layout == "tokens first":
        return torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
    if layout == "sliced":  # odd strides and an address that is aligned to the number only
        return torch.randn(batch, heads, tokens, dim + 3).to(dtype)[..., 1 : dim + 1]
    return torch.randn(batch, heads, tokens, dim).to(dtype)


def random_call(seed: int) -> Call:
    """Every mode of the op turns up among a few hundred seeds."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    batch, kv_heads, group = chance.randint(1, 2), chance.randint(1, 3), chance.randint(1, 3)
    seq_q, seq_k = chance.randint(1, 150), chance.randint(1, 150)
    if chance.random() < 0.5:
        seq_k = seq_q
    dim = chance.choice((1, 2, 5, 8, 15, 16, 17, 24, 32, 33, 40, 64, 66, 72, 80, 128, 256))
    block_q, block_k = chance.choice(BLOCKS), chance.choice(BLOCKS)
    dtype = chance.choice((torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16))
    layouts = [chance.choice(("heads first", "tokens first", "sliced")) for _ in range(3)]
    q, k, v = (
        tensor(layout, batch, heads, tokens, dim, dtype)
        for layout, heads, tokens in zip(
            layouts, (kv_heads * group, kv_heads, kv_heads), (seq_q, seq_k, seq_k), strict=True
        )
    )
    blocks = -(-seq_q // block_q), -(-seq_k // block_k)
    lists = chance.choice((1, batch)), chance.choice((1, kv_heads * group))
    mask = torch.rand(*lists, *blocks) < chance.choice((0.1, 0.5, 1.0))
    sizes = torch.randint(0, block_k + 1, (blocks[1],), dtype=torch.int32) if chance.random() < 0.3 else None
    index = BlockIndex.from_mask(mask, block_q=block_q, block_k=block_k, seq_q=seq_q, seq_k=seq_k, key_sizes=sizes)
    scale = chance.choice((dim**-0.5, dim**-0.5, -0.5 * dim**-0.5, 0.0))
    return Call(q, k, v, index, chance.random() < 0.5, scale)


def check_call(library: ctypes.CDLL, call: Call) -> None:
    """Assert that forward and backward of the library are those of the definition."""
    q, k, v = call.q, call.k, call.v
    exact_inputs = [x.double() for x in (q, k, v)]
    exact, exact_lse = reference.block_sparse_attention(*exact_inputs, *call.arguments, **call.settings)
    magnitude, _ = reference.block_sparse_attention(
        *exact_inputs[:2], exact_inputs[2].abs(), *call.arguments, **call.settings
    )
    out, lse = native.attention(library, q, k, v, *call.arguments, **call.settings)
    assert (out.dtype, out.stride()) == (q.dtype, torch.empty_like(q).stride())
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    assert float((lse - exact_lse)[~empty].abs().sum()) <= 1e-5 * max(1, int((~empty).sum()))
    error = float((out.double() - exact).abs().sum())
    assert error <= TOLERANCE[q.dtype] * float(magnitude.sum()), error / float(magnitude.sum())

    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    given = grad_out, grad_lse, out, lse
    exact_given = [x.double() for x in (grad_out, grad_lse)] + [exact, exact_lse]
    grads = native.attention_backward(library, *given, q, k, v, *call.arguments, **call.settings)
    exact_grads = reference.block_sparse_attention_backward(
        *exact_given, *exact_inputs, *call.arguments, **call.settings
    )
    for grad, exact_grad, x in zip(grads, exact_grads, (q, k, v), strict=True):
        assert (grad.dtype, grad.stride()) == (x.dtype, torch.empty_like(x).stride())
        error = float((grad.double() - exact_grad).norm())
        # A gradient may vanish (one key alone has weight 1): what it is a sum of is as large as grad_out.
        allowed = TOLERANCE[q.dtype] * float(exact_grad.norm() + grad_out.double().norm())
        assert error <= allowed, error / allowed


if __name__ == "__main__":
    for seed in range(int(sys.argv[2]), int(sys.argv[3])):
        check_call(ctypes.CDLL(sys.argv[1]), random_call(seed))
