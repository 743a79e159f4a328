"""RunBlocks: a run of tokens in blocks of the whole sequence, which need not begin where the run does.

    whole sequence   | 0 1 2 3 | 4 5 6 7 | 8 9 . .     blocks of 4
    a run                  2 3   4 5 6 7   8 9
    laid out         | 2 3 - - | 4 5 6 7 | 8 9         a block's tokens first, what is missing after them

So a kernel that counts blocks from the first token, and is told how many tokens each has, sees the same blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...attn_ops.blocks.choice_in_parts import BLOCK_SUMS
from .ring import Run

_TOKENS = 2  # dimension of the tokens in (B, H, S, D)


@dataclass(frozen=True)
class RunBlocks:
    """The blocks of a run that is not empty.

    Args:
        run: the tokens.
        block: tokens of a block.
    """

    run: Run
    block: int

    @property
    def first(self) -> int:
        """Number of its first block in the whole sequence."""
        return self.run.first // self.block

    @property
    def count(self) -> int:
        """How many blocks have tokens of it."""
        return -(-(self.run.first + self.run.size) // self.block) - self.first

    @property
    def head(self) -> int:
        """Tokens of its first block."""
        return min(self.run.size, self.block - self.run.first % self.block)

    @property
    def gap(self) -> int:
        """What its first block lacks in front, where others follow."""
        return self.block - self.head if self.count > 1 else 0

    def lay(self, tensor: Tensor, *, full: bool = False) -> Tensor:
        """The run out of a tensor (B, H, S, D), with zeros for what its first block lacks, or (full) its last too."""
        rows = self.run.of(tensor)
        if self.gap:
            start, rest = rows.split([self.head, self.run.size - self.head], dim=_TOKENS)
            rows = torch.cat([pad(start, (0, 0, 0, self.gap)), rest], dim=_TOKENS)
        missing = self.count * self.block - rows.shape[_TOKENS] if full else 0
        return pad(rows, (0, 0, 0, missing)) if missing else rows

    def take(self, laid: Tensor) -> Tensor:
        """The inverse of `lay`, of what begins so: (B, H, at least as many, ...) to (B, H, size, ...)."""
        if not self.gap:
            return laid.narrow(_TOKENS, 0, self.run.size)
        rest = laid.narrow(_TOKENS, self.block, self.run.size - self.head)
        return torch.cat([laid.narrow(_TOKENS, 0, self.head), rest], dim=_TOKENS)

    def sums(self, tensor: Tensor) -> Tensor:
        """What its tokens add to the sums of its blocks, (B, H, count, D) fp32; no gradient flows."""
        sums: Tensor = BLOCK_SUMS(self.lay(tensor.detach()), self.block)
        return sums

    def sizes(self, like: Tensor) -> Tensor | None:
        """(count,) int32, tokens of each block as `lay` has them; None where only the last may be short."""
        if not self.gap:
            return None
        last = self.run.size - self.head - (self.count - 2) * self.block
        parts = ((1, self.head), (self.count - 2, self.block), (1, last))
        return torch.cat([torch.full((n,), size, dtype=torch.int32, device=like.device) for n, size in parts])
