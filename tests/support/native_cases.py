"""Random calls of the native CPU kernel, and the definition in fp64 that they are compared with.

A `Case` is plain values: what hypothesis draws, shrinks and prints. Its `call()` has the tensors, in memory full of NaN
wherever the call has no business.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support.magnitudes import gradient_magnitudes
from torch import Tensor

from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.kernels.cpu.native import block_sparse as native
from sparseattn.attn_ops.reference import block_sparse as reference

# Relative to sums of magnitudes: the arithmetic of fp32, or one rounding of weights and result, half a unit on average.
TOLERANCE = {torch.float32: 5e-7, torch.float16: 2**-12, torch.bfloat16: 2**-9}
# Where all keys are alike the weights are too: they round in the same direction, and nothing is averaged. Then weights
# and result may both err by a whole unit. In halves that also holds for gradients where all queries are alike.
ALIKE = 2
# The terms of the gradients of q and k may cancel: of their magnitudes fp32 may lose this.
CANCELLED = 2 * torch.finfo(torch.float32).eps
LAYOUTS = ("heads first", "tokens first", "packed", "sliced", "shared batch", "shared heads", "shared tokens")
PADDING = 1 << 30  # what follows the count of a list
MOST_WORK = 24_000_000  # products of one score matrix: a second of unoptimized code


def repeatable(examples: int) -> settings:
    """The same examples in every run, nothing remembered."""
    slow = HealthCheck.too_slow, HealthCheck.function_scoped_fixture
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


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
    def tolerance(self) -> float:
        alike = self.scale == 0 or self.k.stride(2) == 0
        return TOLERANCE[self.q.dtype] * (ALIKE if alike else 1)

    @property
    def gradient_tolerance(self) -> float:
        alike = self.q.dtype.itemsize == 2 and self.q.stride(2) == 0
        return max(self.tolerance, TOLERANCE[self.q.dtype] * (ALIKE if alike else 1))

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"block_q": self.lists.block_q, "block_k": self.lists.block_k}
        return {**sizes, "causal": self.causal, "scale": self.scale}


@dataclass(frozen=True)
class Case:
    """A call and its gradients in plain values; `layouts` are those of q, k, v and grad_out, `lists` (batch, heads)."""

    dtype: torch.dtype
    batch: int
    kv_heads: int
    group: int
    seq: tuple[int, int]
    dim: int
    blocks: tuple[int, int]
    lists: tuple[int, int]
    density: float
    padded_lists: bool
    key_sizes: bool
    causal: bool
    scale: float
    layouts: tuple[str, str, str, str]
    grad_lse: bool
    threads: int
    seed: int

    def call(self) -> Call:
        torch.manual_seed(self.seed)
        heads = self.kv_heads * self.group
        shapes = [(self.batch, h, s, self.dim) for h, s in zip((heads, self.kv_heads), self.seq, strict=True)]
        q, k, v = (
            tensor(layout, *shape, self.dtype)
            for layout, shape in zip(self.layouts[:3], (shapes[0], shapes[1], shapes[1]), strict=True)
        )
        return Call(q, k, v, self._block_index(), self.causal, self.scale * self.dim**-0.5)

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Random grad_out and grad_lse."""
        shape = self.batch, self.kv_heads * self.group, self.seq[0]
        return tensor(self.layouts[3], *shape, self.dim, self.dtype), torch.randn(shape) if self.grad_lse else None

    def _block_index(self) -> BlockIndex:
        nq, nk = (-(-seq // block) for seq, block in zip(self.seq, self.blocks, strict=True))
        mask = torch.rand(*self.lists, nq, nk) < self.density
        mask &= torch.rand(*self.lists, nq, 1) < 0.9  # some rows see nothing
        block_q, block_k = self.blocks
        sizes = torch.randint(0, block_k + 1, (nk,), dtype=torch.int32) if self.key_sizes else None
        shape = {"block_q": block_q, "block_k": block_k, "seq_q": self.seq[0], "seq_k": self.seq[1]}
        index = BlockIndex.from_mask(mask, **shape, key_sizes=sizes)
        return _padded(index) if self.padded_lists else index


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Every mode of the op, head dimensions to 256, a few hundred tokens, blocks of any size."""
    dim = draw(st.sampled_from((64, 80, 128)) | st.integers(1, 256))
    seq_q = draw(st.integers(1, 300))
    seq_k = draw(st.just(seq_q) | st.integers(1, 300))
    size = st.sampled_from((16, 32, 64, 128)) | st.integers(1, 320)
    most = max(1, MOST_WORK // (seq_q * seq_k * dim))
    batch = draw(st.integers(1, min(3, most)))
    kv_heads = draw(st.integers(1, min(3, most // batch)))
    group = draw(st.integers(1, min(4, most // (batch * kv_heads))))
    return Case(
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        seq=(seq_q, seq_k),
        dim=dim,
        blocks=(draw(size), draw(size)),
        lists=(draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, kv_heads * group)))),
        density=draw(st.sampled_from((0.5, 0.1, 1.0, 0.0))),
        padded_lists=draw(st.booleans()),
        key_sizes=draw(st.booleans()),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 2.0, -0.5, 0.0))),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        grad_lse=draw(st.booleans()),
        threads=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 1 << 16)),
    )


def tensor(layout: str, batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random numbers of shape (batch, heads, tokens, dim) with unit stride on dim; what lies between them is NaN."""
    size = batch, heads, tokens, dim
    if layout.startswith("shared "):
        shared = ("batch", "heads", "tokens").index(layout.removeprefix("shared "))
        return torch.randn([1 if i == shared else n for i, n in enumerate(size)]).to(dtype).expand(size)
    if layout == "heads first":
        return torch.randn(size).to(dtype)
    if layout == "tokens first":
        return torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
    if layout == "packed":  # one of the three of a common projection
        place = torch.full((batch, tokens, 3, heads, dim), torch.nan, dtype=dtype)[:, :, 1].transpose(1, 2)
    else:  # sliced: odd strides and an address that is aligned to the number only
        place = torch.full([n + 3 for n in size], torch.nan, dtype=dtype)[1:-2, 2:-1, 1:-2, 1:-2]
    return place.copy_(torch.randn(size))


def _padded(lists: BlockIndex) -> BlockIndex:
    """The same lists among others, with numbers out of range after their counts and between the counts."""
    batch, heads, nq, width = lists.index.shape
    index = torch.full((batch, heads + 1, nq, width + 3), PADDING, dtype=torch.int32)[:, 1:, :, 1 : width + 1]
    count = torch.full((batch, nq, heads, 2), PADDING, dtype=torch.int32)[..., 1].transpose(1, 2)
    beyond = torch.arange(width) >= lists.count.unsqueeze(-1)
    index.copy_(lists.index.masked_fill(beyond, PADDING))
    sizes = lists.key_sizes
    if sizes is not None:
        sizes = torch.stack((sizes, torch.full_like(sizes, PADDING)), dim=-1)[:, 0]
    shape = lists.block_q, lists.block_k, lists.seq_q, lists.seq_k
    return BlockIndex(index, count.copy_(lists.count), *shape, sizes)


def check_case(library: ctypes.CDLL, case: Case) -> None:
    """Assert that forward and backward of the library are those of the definition, and leave their inputs alone."""
    call = case.call()
    inputs = call.q, call.k, call.v, *call.arguments[:2]
    before = [x.clone() for x in inputs]
    with _threads(case.threads):
        out, lse = native.attention(library, call.q, call.k, call.v, *call.arguments, **call.settings)
    exact, exact_lse = _check_forward(call, out, lse)
    grad_out, grad_lse = case.gradients()
    given = grad_out, grad_lse, out, lse, call.q, call.k, call.v
    with _threads(case.threads):
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
    error = float((out.double() - exact).abs().sum())
    assert error <= call.tolerance * float(magnitude.sum()), error / float(magnitude.sum())
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
    given = grad_out.double(), None if grad_lse is None else grad_lse.double(), exact, exact_lse
    exact_inputs = [x.double() for x in inputs]
    exact_grads = reference.block_sparse_attention_backward(*given, *exact_inputs, *call.arguments, **call.settings)
    # A gradient may vanish (one key alone has weight 1): what it is a sum of is as large as this.
    terms = max(1.0, abs(call.scale) * call.q.shape[3] ** 0.5) * given[0].norm()
    # Where tokens are few or alike, the errors of what cancels are not averaged: they add up as magnitudes do. Torch's
    # fused attention errs as much there.
    seen = reference.allowed_tokens(call.lists, call.causal)
    sums = gradient_magnitudes(given[0], given[1], exact_lse, *exact_inputs, seen, call.scale)
    cancelled = [CANCELLED * float(magnitude.norm()) for magnitude in sums] + [0.0]
    for grad, exact_grad, lost, x in zip(grads, exact_grads, cancelled, inputs, strict=True):
        assert (grad.dtype, grad.stride()) == (x.dtype, torch.empty_like(x).stride())
        error = float((grad.double() - exact_grad).norm())
        allowed = call.gradient_tolerance * float(exact_grad.norm() + terms) + lost
        assert error <= allowed, error / allowed


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
