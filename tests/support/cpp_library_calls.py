"""Calls of the ops that the C++ library has, of every kind, and of mistakes in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseattn.attn_ops.blocks.block_index import BlockIndex

Call = tuple[str, list[Any], dict[str, Any]]


def qkv(seq: int, seq_k: int | None = None, heads: tuple[int, int] = (2, 2), dim: int = 32) -> list[Tensor]:
    seq_k = seq if seq_k is None else seq_k
    return [torch.randn(2, h, s, dim) for h, s in ((heads[0], seq), (heads[1], seq_k), (heads[1], seq_k))]


def topk_calls() -> list[Call]:
    """Selections of every kind."""
    per_head = torch.tensor([0.9, 0.05, 0.35, 0.6])
    shapes: list[tuple[list[Tensor], dict[str, Any]]] = [
        (qkv(128), {"keep_ratio": 0.3}),
        (qkv(200), {"keep_ratio": 0.25, "provider": "cpu"}),
        (qkv(77, heads=(4, 2)), {"keep_ratio": 0.5, "block_k": 8, "scale": 0.3}),
        (qkv(77, heads=(4, 2)), {"keep_ratios": per_head}),
        (qkv(77, heads=(4, 1)), {"keep_ratios": torch.tensor(0.45)}),
        (qkv(100, 260), {"keep_ratio": 0.1, "block_q": 32}),
        (qkv(5, 7), {"keep_ratio": 0.0}),
        (qkv(64), {"keep_ratio": 1.0}),
    ]
    op, blocks = "block_topk_attention", {"block_q": 16, "block_k": 16}
    calls: list[Call] = [
        (op, tensors, {**blocks, "causal": causal, **given}) for tensors, given in shapes for causal in (False, True)
    ]
    small = [torch.randint(-1, 2, (1, 2, 96, 4)).float() for _ in range(3)]  # many blocks of equal score
    calls += [(op, small, {"block_q": 8, "block_k": 8, "keep_ratio": ratio}) for ratio in (0.2, 0.5)]
    broken = [x.clone() for x in qkv(96)]
    broken[1][0, 0, 20, 0] = torch.nan
    calls.append((op, broken, {**blocks, "keep_ratio": 0.2}))
    for dtype in (torch.bfloat16, torch.float16):
        halves = [x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(150, heads=(4, 2))]
        calls.append((op, halves, {"keep_ratio": 0.4, "causal": True}))
    return calls


def block_sparse_calls() -> list[Call]:
    mask = torch.rand(2, 4, 5, 7) < 0.5
    lists = BlockIndex.from_mask(mask, block_q=16, block_k=16, seq_q=70, seq_k=100)
    shared = BlockIndex.from_mask(mask[:1, :1], block_q=16, block_k=16, seq_q=70, seq_k=100)
    sizes = torch.randint(0, 17, (7,), dtype=torch.int32)
    tensors, blocks = qkv(70, 100, heads=(4, 2)), {"block_q": 16, "block_k": 16}
    op = "block_sparse_attention"
    return [
        (op, [*tensors, lists.index, lists.count], blocks),
        (op, [*tensors, lists.index, lists.count, sizes], {**blocks, "causal": True, "scale": -0.2}),
        (op, [*tensors, shared.index, shared.count], {**blocks, "provider": "cpu"}),
        (op, [*tensors, lists.index[..., ::2], (lists.count + 1) // 2], blocks),
    ]


def flash_calls() -> list[Call]:
    settings: list[dict[str, Any]] = [
        {},
        {"causal": True, "scale": 0.5, "provider": "torch"},
        {"causal": True, "window": 9},
        {"causal": True, "window": 10**15},
    ]
    shapes = [qkv(130, heads=(4, 2)), qkv(70, 100), qkv(200, 40), qkv(0, 8), [x.bfloat16() for x in qkv(90)]]
    return [("flash_attention", tensors, given) for tensors in shapes for given in settings]


def calls_refused_alike() -> list[Call]:
    """Mistakes that the library names in the words of Python."""
    q, k, v = qkv(64)
    index, count = torch.zeros(1, 1, 4, 2, dtype=torch.int32), torch.ones(1, 1, 4, dtype=torch.int32)
    blocks = {"block_q": 16, "block_k": 16}
    return [
        ("block_topk_attention", [q[0], k, v], {}),
        ("block_topk_attention", [q, k[:, :, :60], v], {}),
        ("block_topk_attention", [q, k[:, :, :, :16], v[:, :, :, :16]], {}),
        ("block_topk_attention", [q, k.repeat(1, 2, 1, 1)[:, :3], v.repeat(1, 2, 1, 1)[:, :3]], {}),
        ("block_topk_attention", [q, k, v], {"keep_ratio": 1.5}),
        ("block_topk_attention", [q, k, v], {"block_k": 0}),
        ("flash_attention", [q, k, v], {"causal": True, "window": 0}),
        ("block_sparse_attention", [q, k, v, index[0], count], blocks),
        ("block_sparse_attention", [q, k, v, index, count[..., :3]], blocks),
        ("block_sparse_attention", [q, k, v, index + 4, count], blocks),
        ("block_sparse_attention", [q, k, v, index.expand(1, 3, 4, 2), count.expand(1, 3, 4)], blocks),
    ]


def calls_refused() -> dict[str, Call]:
    """Other mistakes, by what the library says of them."""
    q, k, v = qkv(64)
    index, count = torch.zeros(1, 1, 4, 2, dtype=torch.int32), torch.ones(1, 1, 4, dtype=torch.int32)
    blocks = {"block_q": 16, "block_k": 16}
    return {
        'provider must be "cpu" or "auto" in the C++ library, got "reference".': (
            *("block_topk_attention", [q, k, v]),
            {"provider": "reference"},
        ),
        'provider must be "torch" or "auto" in the C++ library, got "flash_attn".': (
            *("flash_attention", [q, k, v]),
            {"provider": "flash_attn"},
        ),
        "window must come with causal=True, got 3.": ("flash_attention", [q, k, v], {"window": 3}),
        "k must be float32 or float16 or bfloat16, the same": ("flash_attention", [q, k.half(), v], {}),
        "block_index must be int32": ("block_sparse_attention", [q, k, v, index.long(), count], blocks),
        "keep_ratios must have shape (2)": ("block_topk_attention", [q, k, v], {"keep_ratios": torch.ones(3)}),
    }
