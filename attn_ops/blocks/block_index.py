"""BlockIndex: which key blocks every query block attends to, as ascending lists of block numbers.

Converts to and from a dense bool mask and FlexAttention's BlockMask, knows its density and prints itself as a picture.
The entries of a list after its count are padding and mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ArgumentError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_SHADES = " ░▒▓█"
_PICTURE = 32
_LISTED = 8


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Lists of key blocks, one list per head and block of queries.

    Args:
        index: (B or 1, H or 1, nq, width) int32, block numbers, ascending and unique up to the list's count.
        count: (B or 1, H or 1, nq) int32, length of every list; 0 for a block of queries that attends to nothing.
        block_q: tokens per block of queries; the last block may be short.
        block_k: tokens per block of keys; the last block may be short.
        seq_q: query tokens; nq = ceil(seq_q / block_q).
        seq_k: key tokens; nk = ceil(seq_k / block_k).
        key_sizes: (nk,) int32, valid tokens of every key block, the first ones; None means all of them.

    Raises:
        ArgumentError: if the shapes do not fit together.
    """

    index: Tensor
    count: Tensor
    block_q: int
    block_k: int
    seq_q: int
    seq_k: int
    key_sizes: Tensor | None = None

    def __post_init__(self) -> None:
        check_block_lists("BlockIndex", self.index, self.count, self.key_sizes, (self.nq, self.nk))

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        block_q: int,
        block_k: int,
        seq_q: int | None = None,
        seq_k: int | None = None,
        key_sizes: Tensor | None = None,
    ) -> BlockIndex:
        """Lists of the True blocks of a dense mask.

        Args:
            mask: (..., nq, nk) bool with at most two leading dimensions, batch and heads; either may be missing or 1.
            block_q: tokens per block of queries.
            block_k: tokens per block of keys.
            seq_q: query tokens; None means nq full blocks.
            seq_k: key tokens; None means nk full blocks.
            key_sizes: (nk,) int32, valid tokens of every key block.

        Raises:
            ArgumentError: if the mask is not bool, has more than four dimensions, or does not fit the lengths.
        """
        if mask.dtype is not torch.bool or not 2 <= mask.dim() <= 4:
            raise ArgumentError(
                "BlockIndex.from_mask", "mask", "be bool with 2 to 4 dimensions", f"{mask.dtype} of {tuple(mask.shape)}"
            )
        mask = mask[(None,) * (4 - mask.dim())]
        seq_q = mask.shape[2] * block_q if seq_q is None else seq_q
        seq_k = mask.shape[3] * block_k if seq_k is None else seq_k
        if mask.shape[2:] != (blocks := (-(-seq_q // block_q), -(-seq_k // block_k))):
            raise ArgumentError("BlockIndex.from_mask", "mask", f"have {blocks} blocks", tuple(mask.shape[2:]))
        index, count = lists_of(mask)
        width = max(1, int(count.max())) if count.numel() else 1
        return cls(index[..., :width].contiguous(), count, block_q, block_k, seq_q, seq_k, key_sizes)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> BlockIndex:
        """The lists of a FlexAttention BlockMask.

        Raises:
            ArgumentError: if a block is partial, that is, decided token by token by `mask_mod`: lists cannot say that.
        """
        partial = int(block_mask.kv_num_blocks.sum())
        if partial or block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
            raise ArgumentError(
                *("BlockIndex.from_block_mask", "block_mask", "have full blocks only", f"{partial} partial blocks"),
                "A causal edge is the op's `causal`, a short block its `key_sizes`; list the rest as full blocks.",
            )
        (block_q, block_k), (seq_q, seq_k) = block_mask.BLOCK_SIZE, block_mask.seq_lengths
        lists = block_mask.full_kv_indices, block_mask.full_kv_num_blocks
        mask = mask_of(*lists, -(-seq_k // block_k))
        return cls.from_mask(mask, block_q=block_q, block_k=block_k, seq_q=seq_q, seq_k=seq_k)

    @property
    def nq(self) -> int:
        """Blocks of queries."""
        return -(-self.seq_q // self.block_q)

    @property
    def nk(self) -> int:
        """Blocks of keys."""
        return -(-self.seq_k // self.block_k)

    @property
    def density(self) -> float:
        """Listed blocks over all blocks, 0 ... 1. Reads the counts, so it waits for the device."""
        return float(self.count.double().mean()) / self.nk if self.nk and self.count.numel() else 0.0

    def to_mask(self) -> Tensor:
        """(B or 1, H or 1, nq, nk) bool, True where a block is listed."""
        return mask_of(self.index, self.count, self.nk)

    def token_mask(self) -> Tensor:
        """(B or 1, H or 1, seq_q, seq_k) bool, True where a query may see a key."""
        rows = self.to_mask().repeat_interleave(self.block_q, dim=2)[:, :, : self.seq_q]
        mask = rows.repeat_interleave(self.block_k, dim=3)[..., : self.seq_k]
        if self.key_sizes is None:
            return mask
        key = torch.arange(self.seq_k, device=mask.device)
        return mask & (key % self.block_k < self.key_sizes[key // self.block_k])

    def to_block_mask(self) -> BlockMask:
        """The same as a FlexAttention BlockMask; short blocks of `key_sizes` become partial blocks."""
        from torch.nn.attention.flex_attention import BlockMask

        mask, sizes = self.to_mask(), self.key_sizes
        whole = mask if sizes is None else mask & (sizes >= self.block_k)
        full_index, full_count = lists_of(whole)
        index, count = lists_of(mask & ~whole)
        wide = mask.shape[0] > 1, mask.shape[1] > 1

        def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            listed = mask[b * wide[0], h * wide[1], query // self.block_q, key // self.block_k]
            return listed if sizes is None else listed & (key % self.block_k < sizes[key // self.block_k])

        return BlockMask.from_kv_blocks(
            *(count, index, full_count, full_index),
            BLOCK_SIZE=(self.block_q, self.block_k),
            mask_mod=mask_mod,
            seq_lengths=(self.seq_q, self.seq_k),
        )

    def __str__(self) -> str:
        batch, heads = self.index.shape[:2]
        mask = self.to_mask()
        per_head = mask.double().mean(dim=(2, 3)).flatten() if mask.numel() else mask.new_zeros(batch * heads)
        lines = [
            f"BlockIndex: {self.seq_q} x {self.seq_k} tokens in {self.nq} x {self.nk} blocks of "
            f"{self.block_q} x {self.block_k}, batch {batch}, heads {heads}, density {self.density:.1%}"
        ]
        for row, density in enumerate(per_head[:_LISTED].tolist()):
            lines.append(f"  batch {row // heads} head {row % heads}: {density:.1%}")
            if row == 0:
                lines += [f"    {line}" for line in _picture(mask[0, 0])]
        if len(per_head) > _LISTED:
            lines.append(f"  and {len(per_head) - _LISTED} more")
        return "\n".join(lines)


def lists_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending lists of the True entries of a bool mask (..., n).

    Returns index: (..., n) int32, 0 after the count, and count: (...) int32. No host synchronization.
    """
    n = mask.shape[-1]
    position = mask.cumsum(dim=-1)
    # What is not listed goes to one more column, which is cut off.
    target = torch.where(mask, position - 1, n)
    number = torch.arange(n, device=mask.device, dtype=torch.int32).expand(mask.shape)
    index = torch.zeros((*mask.shape[:-1], n + 1), dtype=torch.int32, device=mask.device).scatter_(-1, target, number)
    return index[..., :n], mask.sum(dim=-1, dtype=torch.int32)


def mask_of(index: Tensor, count: Tensor, n: int) -> Tensor:
    """The inverse of `lists_of`: (..., n) bool, True at the first `count` entries of every list."""
    used = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    target = torch.where(used, index, n).long()
    mask = torch.zeros((*index.shape[:-1], n + 1), dtype=torch.bool, device=index.device)
    return mask.scatter_(-1, target, used)[..., :n]


def lists_within(index: Tensor, count: Tensor, first: int, blocks: int) -> tuple[Tensor, Tensor]:
    """The part of ascending lists that is in first ... first + blocks - 1, numbered from there, as such lists.

    Args:
        index: (..., width) int32.
        count: (...) int32.
        first: the lowest block.
        blocks: how many.
    """
    place = torch.arange(index.shape[-1], device=index.device)
    used = place < count.unsqueeze(-1)
    before = (used & (index < first)).sum(dim=-1, keepdim=True)
    inside = (used & (index >= first) & (index < first + blocks)).sum(dim=-1, dtype=torch.int32)
    taken = (before + place[:blocks]).clamp(max=index.shape[-1] - 1)
    return (index.gather(-1, taken) - first).clamp(0, blocks - 1), inside


def check_block_lists(op: str, index: Tensor, count: Tensor, key_sizes: Tensor | None, blocks: tuple[int, int]) -> None:
    """Check index: (B or 1, H or 1, nq, width), count: (B or 1, H or 1, nq) and key_sizes: (nk,), blocks = (nq, nk).

    Raises:
        ArgumentError: on a wrong rank or size.
    """
    nq, nk = blocks
    if index.dim() != 4 or index.shape[2] != nq:
        must = f"be 4-D, (batch or 1, heads or 1, {nq} query blocks, width)"
        raise ArgumentError(op, "block_index", must, tuple(index.shape))
    if count.shape != index.shape[:3]:
        raise ArgumentError(op, "block_count", f"have shape {tuple(index.shape[:3])}", tuple(count.shape))
    if key_sizes is not None and key_sizes.shape != (nk,):
        raise ArgumentError(op, "key_sizes", f"have one entry for each of the {nk} key blocks", tuple(key_sizes.shape))


def _picture(mask: Tensor) -> list[str]:
    """A mask (nq, nk) in at most 32 x 32 characters, darker where more blocks are listed."""
    size = (min(mask.shape[0], _PICTURE), min(mask.shape[1], _PICTURE))
    if 0 in size:
        return []
    cells = torch.nn.functional.adaptive_avg_pool2d(mask[None].float(), size)[0]
    shades = (cells * (len(_SHADES) - 1)).ceil().int()
    return ["".join(_SHADES[shade] for shade in row) for row in shades.tolist()]
