"""How far an output is from the truth. Sums are fp64 and are taken part by part, so that long sequences fit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.reference.block_sparse import block_sparse_attention as reference

_ROWS_OF_BLOCKS = 8


def distance(out: Tensor, exact: Tensor, to: str) -> dict[str, float | str]:
    """Relative L1 and L2 error and cosine; `to` names the truth."""
    ours, truth = out.double().flatten(), exact.double().flatten()
    wrong = ours - truth
    return {
        "relative_l1": float(wrong.abs().sum() / truth.abs().sum()),
        "relative_l2": float(wrong.norm() / truth.norm()),
        "cosine": float(torch.nn.functional.cosine_similarity(ours, truth, dim=0)),
        "to": to,
    }


def relative_l2(out: Tensor, exact: Tensor) -> float:
    """|out - exact| / |exact|."""
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def block_sparse_distance(
    out: Tensor, lse: Tensor, qkv: tuple[Tensor, Tensor, Tensor], lists: BlockIndex
) -> Mapping[str, float | str]:
    """Relative L1 error of `out` and the largest of `lse` to fp64, a few blocks of rows at a time."""
    q, k, v = qkv
    total, wrong, worst = 0.0, 0.0, 0.0
    sizes = {"block_q": lists.block_q, "block_k": lists.block_k, "causal": False, "scale": q.shape[3] ** -0.5}
    for head, start in itertools.product(range(q.shape[1]), range(0, lists.nq, _ROWS_OF_BLOCKS)):
        rows = slice(start * lists.block_q, min(start + _ROWS_OF_BLOCKS, lists.nq) * lists.block_q)
        index, count = (x[:, head : head + 1, start : start + _ROWS_OF_BLOCKS] for x in (lists.index, lists.count))
        inputs = (x.double() for x in (q[:, head : head + 1, rows], k[:, head : head + 1], v[:, head : head + 1]))
        exact, exact_lse = reference(*inputs, index, count, None, **sizes)
        wrong += float((out[:, head : head + 1, rows].double() - exact).abs().sum())
        total += float(exact.abs().sum())
        worst = max(worst, float((lse[:, head : head + 1, rows] - exact_lse).abs().max()))
    return {"relative_l1": wrong / total, "lse_max": worst, "to": "fp64"}


def sampled_distance(
    out: Tensor, qkv: tuple[Tensor, Tensor, Tensor], lists: BlockIndex | None, blocks: int = 4
) -> dict[str, float | str]:
    """Relative L2 error to fp32 attention, of some blocks of rows of the first and the last head of every batch.

    Args:
        out: (B, H, S, D).
        qkv: each (B, H, S, D).
        lists: the key blocks of every block of queries; None for all keys.
        blocks: how many blocks of rows of a head, evenly apart.
    """
    q, k, v = qkv
    block_q, rows = (lists.block_q, lists.nq) if lists else (64, -(-q.shape[2] // 64))
    wrong = truth = 0.0
    for batch, head, i in itertools.product(range(q.shape[0]), {0, q.shape[1] - 1}, _spread(rows, blocks)):
        tokens = slice(i * block_q, (i + 1) * block_q)
        keys = _keys_of(lists, batch, head, i, k.shape[2])
        scores = q[batch, head, tokens].float() @ k[batch, head, keys].float().mT * q.shape[3] ** -0.5
        exact = scores.softmax(dim=-1) @ v[batch, head, keys].float()
        wrong += float((out[batch, head, tokens].float() - exact).square().sum())
        truth += float(exact.square().sum())
    return {"relative_l2": (wrong / truth) ** 0.5, "to": "fp32, of some rows"}


def _spread(rows: int, number: int) -> list[int]:
    return sorted({round(i * (rows - 1) / max(1, number - 1)) for i in range(number)})


def _keys_of(lists: BlockIndex | None, batch: int, head: int, row: int, tokens: int) -> Tensor | slice:
    """The tokens that a block of queries sees."""
    if lists is None:
        return slice(None)
    index, count = (
        x.expand(max(x.shape[0], batch + 1), max(x.shape[1], head + 1), *x.shape[2:])
        for x in (lists.index, lists.count)
    )
    listed = index[batch, head, row, : int(count[batch, head, row])].long()
    keys = (listed[:, None] * lists.block_k + torch.arange(lists.block_k, device=listed.device)).flatten()
    return keys[keys < tokens]
