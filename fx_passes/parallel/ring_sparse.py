"""A ring for block_topk: every row of blocks chooses among the blocks of all ranks, and attends to those that pass by.

The sums of the blocks are gathered first, little beside keys and values, so that each rank chooses for its queries what
one process would. Of the lists, the part within the shard that has arrived is attended. A shard of which nothing was
chosen costs the kernel nothing, and is passed on all the same: the graph is made before the choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...attn_ops.blocks.block_index import lists_within
from ...attn_ops.blocks.choice_in_parts import CHOOSE_BY_SUMS
from .pooled_sums import PooledSums, gather
from .ring import Attend, Part, Ring, Run, Runs
from .run_blocks import RunBlocks

Lists = tuple[Tensor, Tensor]
"""index (B, Hq, rows, width) and count (B, Hq, rows)."""

_TOKENS = 2  # dimension of the tokens in (B, H, S, D), and of the rows in lists


@dataclass(frozen=True)
class BlockTopK:
    """block_topk at one site, as a `Method` of a ring.

    Args:
        keep_ratio: fraction of the candidate blocks to keep.
        keep_ratios: () or (Hq,) fp32, instead of keep_ratio; None where that holds.
        block_q: tokens of a block of queries.
        block_k: tokens of a block of keys.
        scale: factor on the scores; None means D ** -0.5.
        provider: of block_sparse_attention.
    """

    keep_ratio: float
    keep_ratios: Tensor | None
    block_q: int
    block_k: int
    scale: float | None
    provider: str

    def __call__(self, ring: Ring, q: Tensor, k: Tensor) -> tuple[Attend, Tensor | None]:
        """Choose for the queries of this rank."""
        of_q, of_k = (PooledSums(ring, block) for block in (self.block_q, self.block_k))
        if of_q.in_parts:
            received, received_q = gather(ring, [of_k.own(k), of_q.own(q)])
            rows = of_q.whole(q, received_q)
        else:
            (received,), rows = gather(ring, [of_k.own(k)]), None
        sums = of_k.whole(k, received)
        chosen: dict[Run, Lists] = {}
        for run in ring.runs(ring.rank, whole=True):
            if run.size:
                blocks = of_q.of(run)
                own = blocks.sums(q) if rows is None else rows.narrow(_TOKENS, blocks.first, blocks.count)
                chosen[run] = self._choose(own, sums, blocks.first, ring)

        def attend(q: Tensor, k: Tensor, v: Tensor, queries: Runs, keys: Runs, causal: bool) -> list[Part]:
            return self._attend((q, k, v), queries, keys, chosen, causal=causal)

        return attend, received

    def _choose(self, rows: Tensor, keys: Tensor, first: int, ring: Ring) -> Lists:
        sizes = first, ring.tokens, self.block_q, self.block_k
        lists: Lists = CHOOSE_BY_SUMS(rows, keys, self.keep_ratios, self.keep_ratio, *sizes, ring.causal)
        return lists

    def _attend(
        self, qkv: tuple[Tensor, Tensor, Tensor], queries: Runs, keys: Runs, chosen: dict[Run, Lists], *, causal: bool
    ) -> list[Part]:
        """Attention of some queries to their chosen blocks of each of some runs of keys."""
        rows = [RunBlocks(run, self.block_q) for run in queries if run.size]
        if not rows:
            return []
        q, k, v = qkv
        index, count = (_along_rows(parts) for parts in zip(*(chosen[row.run] for row in rows), strict=True))
        laid = _along_rows([row.lay(q, full=row is not rows[-1]) for row in rows])
        found = []
        for run in keys:
            blocks = RunBlocks(run, self.block_k)
            out, lse = torch.ops.sparseattn.block_sparse_attention(
                *(laid, blocks.lay(k), blocks.lay(v), *lists_within(index, count, blocks.first, blocks.count)),
                blocks.sizes(k),
                block_q=self.block_q,
                block_k=self.block_k,
                causal=causal,
                scale=self.scale,
                provider=self.provider,
            )
            lse = lse.unsqueeze(-1)
            found.append((_in_place(out, queries, rows, 0.0), _in_place(lse, queries, rows, -math.inf).squeeze(-1)))
        return found


def _in_place(laid: Tensor, queries: Runs, rows: list[RunBlocks], padding: float) -> Tensor:
    """What was computed for laid out queries, where these are in the tensor."""
    parts, at, by_run = [], 0, {row.run: row for row in rows}
    for run in queries:
        part = laid.narrow(_TOKENS, 0, 0)
        if run.size:
            row = by_run[run]
            part = row.take(laid.narrow(_TOKENS, at, laid.shape[_TOKENS] - at))
            at += row.count * row.block
        parts.append(pad(part, (0, 0, 0, run.padding), value=padding) if run.padding else part)
    return _along_rows(parts)


def _along_rows(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=_TOKENS)


def why_not(block_q: int, block_k: int, ring: Ring) -> str:
    """Why a ring cannot attend to such blocks; "" where it can."""
    apart = PooledSums(ring, math.lcm(block_q, block_k)).in_parts
    if not ring.causal or block_q == block_k or not apart:
        return ""
    return f"causal block_topk with block_q={block_q} and block_k={block_k}, whose blocks ranks share"


def payload(ring: Ring, heads: int, kv_heads: int, head_dim: int, batch: int, blocks: tuple[int, int]) -> int:
    """Bytes of sums that leave this rank in one forward pass; `blocks` are block_q and block_k."""
    of_q, of_k = (PooledSums(ring, block) for block in blocks)
    sums = kv_heads * of_k.sent + (heads * of_q.sent if of_q.in_parts else 0)
    return (ring.ranks - 1) * batch * sums * head_dim * torch.float32.itemsize
