"""Every differentiable op on shapes that ask all of it, beside its definition: for the tests of gradients.

Batch 2, four query heads to a key head, odd numbers of blocks, a padded last one; other lengths of the keys, a row that
sees no key and token-level causality where the op has them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseattn import VideoLayout
from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.blocks.chunk_choice import ChunkRule
from sparseattn.attn_ops.blocks.sla_method import SlaMethod
from sparseattn.attn_ops.blocks.tile_selection import TilePlan
from sparseattn.attn_ops.blocks.tiles import Tiling

HEADS, KV_HEADS = 8, 2
GRID, KV_GRID, TILE = (5, 6, 7), (3, 6, 8), (2, 2, 3)


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Args:
        op: its name.
        module: of attn_ops.reference.
        seq: tokens of queries and of keys.
        rest: positional arguments after the differentiable tensors.
        settings: keyword arguments but for scale.
        defined_rest: the same of the definition.
        defined: likewise.
        beside: what it differentiates beside q, k and v: "gate", or "weight" and "bias".
        size: magnitude of the gate.
    """

    op: str
    module: str
    seq: tuple[int, int]
    rest: tuple[Any, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    defined_rest: tuple[Any, ...] = ()
    defined: dict[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    size: float = 1.0

    def tensors(self, dtype: torch.dtype, scale: float = 1.0, *, dim: int = 32) -> list[Tensor]:
        """What the op differentiates; q, k and v are `scale` times a normal distribution."""
        shapes = (HEADS, self.seq[0]), (KV_HEADS, self.seq[1]), (KV_HEADS, self.seq[1])
        given = [scale * torch.randn(2, *shape, dim) for shape in shapes]
        more = {
            "gate": lambda: self.size * torch.randn(2, HEADS, self.seq[0], dim),
            "weight": lambda: torch.randn(dim, dim) / dim**0.5,
            "bias": lambda: torch.randn(dim),
        }
        return [x.to(dtype).requires_grad_() for x in (*given, *(more[name]() for name in self.beside))]

    def attend(self, tensors: list[Tensor], provider: str = "auto") -> tuple[Tensor, Tensor]:
        """The op."""
        op = getattr(torch.ops.sparseattn, self.op)
        result: tuple[Tensor, Tensor] = op(*tensors, *self.rest, **self.settings, provider=provider)
        return result

    def define(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The definition."""
        result: tuple[Tensor, Tensor] = self._function("")(*tensors, *self.defined_rest, **self._keywords(tensors))
        return result

    def define_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, tensors: list[Tensor]
    ) -> list[Tensor]:
        """The definition's gradients of the tensors."""
        given = grad_out, grad_lse, out, lse, *tensors, *self.defined_rest
        grads = self._function("_backward")(*given, **self._keywords(tensors))
        return list(grads[: len(tensors)])

    def _function(self, suffix: str) -> Any:
        return getattr(importlib.import_module(f"sparseattn.attn_ops.reference.{self.module}"), self.op + suffix)

    def _keywords(self, tensors: list[Tensor]) -> dict[str, Any]:
        scale = tensors[0].shape[-1] ** -0.5
        return {name: value(scale) if callable(value) else value for name, value in self.defined.items()}


def _flash(seq: tuple[int, int], **settings: Any) -> Case:
    return Case("flash_attention", "flash", seq, settings=settings, defined={**settings, "scale": _same})


def _block_sparse(seq: tuple[int, int], block_q: int, block_k: int, causal: bool, short: bool) -> Case:
    """Random lists, the first block always listed but for the third block of queries, which sees nothing."""
    blocks = -(-seq[0] // block_q), -(-seq[1] // block_k)
    chance = torch.Generator().manual_seed(0)
    mask = torch.rand(2, HEADS, *blocks, generator=chance) < 0.5
    mask[..., 0] = True
    mask[:, :, 2] = False
    sizes = torch.randint(1, block_k + 1, blocks[1:], dtype=torch.int32, generator=chance) if short else None
    lists = BlockIndex.from_mask(mask, block_q=block_q, block_k=block_k, seq_q=seq[0], seq_k=seq[1], key_sizes=sizes)
    rest, settings = (lists.index, lists.count, sizes), {"block_q": block_q, "block_k": block_k, "causal": causal}
    name = "block_sparse_attention"
    return Case(name, "block_sparse", seq, rest, settings, rest, {**settings, "scale": _same})


def _block_topk(seq: tuple[int, int], **settings: Any) -> Case:
    settings = {"keep_ratio": 0.4, "block_q": 32, "block_k": 32, "causal": False, **settings}
    return Case("block_topk_attention", "block_topk", seq, (), settings, (), {**settings, "scale": _same})


def _sla(variant: str = "all", feature_map: str = "softmax", beside: tuple[str, ...] = ()) -> Case:
    settings = {"keep_ratio": 0.4, "variant": variant, "feature_map": feature_map, "block_q": 32, "block_k": 32}
    how = SlaMethod(**settings, compat=False, keep_ratios=None)
    rest = *[None] * (2 - len(beside)), how
    name = "sparse_linear_attention"
    return Case(name, "sla", (141, 141), (), settings, rest, {"scale": _same}, beside)


def _vsa(text: int = 0, kv_grid: tuple[int, int, int] = GRID, gate: float = 0.0) -> Case:
    queries, keys = (Tiling(VideoLayout(grid, text), TILE) for grid in (GRID, kv_grid))
    settings = {"grid": GRID, "kv_grid": kv_grid, "text_tokens": text, "tile": TILE, "sparsity": 0.7}
    beside = ("gate",) if gate else ()
    return Case(
        *("video_sparse_attention", "vsa", (queries.layout.tokens, keys.layout.tokens), (), settings),
        *([None] * (2 - len(beside)), {"plan": lambda scale: TilePlan(queries, keys, False, 0.7, scale)}),
        *(beside, gate),
    )


def _sta() -> Case:
    layout, window = VideoLayout(GRID, 13, True), (1, 3, 1)
    text = {"text_tokens": 13, "text_first": True, "text_length": 9}
    settings = {"grid": GRID, **text, "tile": TILE, "window": window}
    defined = {"tiling": Tiling(layout, TILE), "window": window, "text_length": 9, "tiled": False, "scale": _same}
    return Case("sliding_tile_attention", "sta", (layout.tokens,) * 2, (), settings, (), defined)


def _vmoba(**choice: Any) -> Case:
    layout, chunk = VideoLayout((3, 4, 7)), (1, 4, 3)
    given: dict[str, Any] = {"select": "topk", "topk": 3, "threshold": 0.3, "threshold_type": "query_head", **choice}
    defined = {"tiling": Tiling(layout, chunk), "rule": ChunkRule(**given, compat=False), "scale": _same}
    settings = {"grid": layout.grid, "chunk": chunk, **given}
    return Case("vmoba_attention", "vmoba", (layout.tokens,) * 2, (), settings, (), defined)


def _same(scale: float) -> float:
    return scale


CASES = {
    "flash, causal": _flash((173, 173), causal=True),
    "flash, cross": _flash((101, 171)),
    "flash, window, rows that see nothing": _flash((171, 101), causal=True, window=20),
    "block_sparse, cross, short blocks": _block_sparse((137, 197), 32, 32, causal=False, short=True),
    "block_sparse, causal": _block_sparse((173, 173), 48, 16, causal=True, short=False),
    "block_topk, cross": _block_topk((137, 197)),
    "block_topk, causal": _block_topk((137, 137), causal=True),
    "sla": _sla(),
    "sla, all": _sla("all", beside=("weight", "bias")),
    "sla, complement": _sla("complement", "elu", beside=("weight",)),
    "vsa, cross": _vsa(kv_grid=KV_GRID),
    "vsa, gate": _vsa(text=9, gate=1.0),
    "vsa, large gate": _vsa(text=9, kv_grid=KV_GRID, gate=16.0),
    "sta": _sta(),
    "vmoba": _vmoba(),
    "vmoba, threshold": _vmoba(select="threshold"),
}
