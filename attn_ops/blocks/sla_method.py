"""SlaMethod: the parameters of SLA and SageSLA as one value, their checks, and the blocks that they choose.

Those blocks, "critical" in the paper, are attended to exactly; there is always at least one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import FLOAT_DTYPES, dtype_name
from ..checks import check_choice, check_per_head, check_qkv
from ..errors import ArgumentError
from ..numerics.linear_attention import FEATURE_MAPS
from .block_index import mask_of
from .by_device import block_mean, top_k_blocks
from .topk import decimal

VARIANTS = ("all", "complement")


@dataclass(frozen=True, eq=False)
class SlaMethod:
    """How the blocks are chosen, and what the linear branch reads.

    Args:
        keep_ratio: fraction of the key blocks to keep, 0 ... 1.
        variant: the linear branch reads "all" tokens or the "complement" of the kept blocks.
        feature_map: "softmax", "elu" or "relu".
        block_q: tokens per block of queries.
        block_k: tokens per block of keys.
        compat: choose by scores rounded to the inputs' dtype, as the published code does.
        keep_ratios: () or (Hq,) fp32, used instead of keep_ratio.
    """

    keep_ratio: float
    variant: str
    feature_map: str
    block_q: int
    block_k: int
    compat: bool
    keep_ratios: Tensor | None

    def check(self, op: str, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Raises ArgumentError unless the method can be applied to these tensors."""
        check_qkv(op, q, k, v)
        if k.shape[2] != q.shape[2]:
            raise ArgumentError(op, "k", f"have q's {q.shape[2]} tokens", k.shape[2], "It is for self-attention.")
        if not 0.0 <= self.keep_ratio <= 1.0:
            raise ArgumentError(op, "keep_ratio", "be in 0 ... 1", self.keep_ratio)
        check_choice(op, "variant", self.variant, VARIANTS)
        check_choice(op, "feature_map", self.feature_map, FEATURE_MAPS)
        for name, block in (("block_q", self.block_q), ("block_k", self.block_k)):
            if block < 1:
                raise ArgumentError(op, name, "be at least 1", block)
        if bias is not None and weight is None:
            raise ArgumentError(op, "bias", "come with a weight", "no weight")
        dim = q.shape[3]
        _check_tensor(op, "weight", weight, q, (dim, dim))
        _check_tensor(op, "bias", bias, q, (dim,))
        if self.keep_ratios is not None:
            check_per_head(op, "keep_ratios", self.keep_ratios, q)

    def critical_blocks(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The key blocks of the highest mean(q block) . mean(k block - mean of k), as lists.

        Of nk blocks, max(1, int(keep_ratio * nk)) are kept: rounded down, as in the published code, but never to none.
        The mean of k moves all scores of a row alike, so it changes no choice; but a k with a large offset would leave
        its scores few digits to differ in.

        Args:
            q: (B, Hq, S, D).
            k: (B, Hkv, S, D); query head h reads head h // (Hq / Hkv) and chooses its own blocks.

        Returns:
            index: (B, Hq, nq, nk) int32, ascending, 0 after the count; of equal scores the lower number.
            count: (B, Hq, nq) int32.
        """
        if self.compat:
            k = k - k.mean(dim=2, keepdim=True)
            mean_q, mean_k = (block_mean(x, block).to(q.dtype) for x, block in ((q, self.block_q), (k, self.block_k)))
        else:
            mean_q, mean_k = block_mean(q, self.block_q), block_mean(k, self.block_k)
            mean_k = mean_k - k.mean(dim=2, keepdim=True, dtype=torch.float32)
        grouped = mean_q.unflatten(1, (k.shape[1], -1))
        scores = (grouped @ mean_k.unsqueeze(2).mT).flatten(1, 2)
        nk = scores.shape[-1]
        if self.keep_ratios is None:
            return top_k_blocks(scores, max(1, int(self.keep_ratio * nk)))
        return top_k_blocks(scores, (decimal(self.keep_ratios) * nk).floor().long().reshape(-1, 1))

    def linear_blocks(self, critical: tuple[Tensor, Tensor]) -> Tensor | None:
        """The key blocks that the linear branch reads, (B, Hq, nq, nk) bool; None for all tokens."""
        return None if self.variant == "all" else ~mask_of(*critical, critical[0].shape[-1])


def _check_tensor(op: str, name: str, tensor: Tensor | None, q: Tensor, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ArgumentError(op, name, f"have shape {shape}", tuple(tensor.shape))
    if tensor.dtype not in FLOAT_DTYPES:
        raise ArgumentError(op, name, f"be {' or '.join(map(dtype_name, FLOAT_DTYPES))}", dtype_name(tensor.dtype))
    if tensor.device != q.device:
        raise ArgumentError(op, name, f"be on q's device {q.device}", tensor.device)
