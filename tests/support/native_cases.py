"""Random calls of the native CPU kernels.

A `Case` is plain values: what hypothesis draws, shrinks and prints. Its `call()` has the tensors, in memory full of NaN
wherever the call has no business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseattn.attn_ops.blocks.block_index import BlockIndex

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
def cases(draw: st.DrawFn, layouts: Sequence[str] = LAYOUTS) -> Case:
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
        layouts=tuple(draw(st.sampled_from(layouts)) for _ in range(4)),
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
