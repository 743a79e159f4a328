"""SLA and SageSLA as modules: a projection of the linear branch, zero until it is trained, and the two ops.

Names, arguments and parameters are those of the published modules. A fresh module is its sparse part alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attn_ops.blocks.sla_method import VARIANTS
from ..attn_ops.checks import check_choice
from ..attn_ops.numerics.linear_attention import FEATURE_MAPS
from ..attn_ops.ops import sage_sparse_linear_attention, sparse_linear_attention


class SparseLinearAttention(nn.Module):
    """`sparse_linear_attention` with its projection, `proj_l`: a Linear(head_dim, head_dim) in fp32 for all heads.

    Args:
        head_dim: channels of a head, D.
        topk: fraction of the key blocks to attend to exactly, 0 ... 1; at least one block is.
        feature_map: feature map of the linear branch: "softmax", "elu" or "relu".
        BLKQ: tokens per block of queries.
        BLKK: tokens per block of keys.
        use_bf16: compute in bfloat16, or, if False, in float16; None computes in the dtype of the inputs.
        tie_feature_map_qk: accepted for compatibility; the feature maps have no parameters, so either way is the same.
        variant: the linear branch reads "all" tokens (the published main branch) or the "complement" of the kept
            blocks (its branch SLA-1). Weights trained for one are wrong for the other.
        compat: choose the blocks by scores rounded to the computing dtype, as the published code does.

    Raises:
        ArgumentError: on an unknown feature_map or variant.

    Unlike the published module it takes grouped heads and any length, head_dim and block size, chooses the blocks from
    inputs cast to the computing dtype, not from those given, and returns the sparsity as `forward` says.
    Paper: https://arxiv.org/abs/2509.24006.
    """

    def __init__(
        self,
        head_dim: int,
        topk: float,
        feature_map: str = "softmax",
        BLKQ: int = 64,  # noqa: N803  (published names)
        BLKK: int = 64,  # noqa: N803
        use_bf16: bool | None = True,
        tie_feature_map_qk: bool = True,  # noqa: ARG002
        *,
        variant: str = "all",
        compat: bool = False,
    ) -> None:
        super().__init__()
        check_choice(type(self).__name__, "feature_map", feature_map, FEATURE_MAPS)
        check_choice(type(self).__name__, "variant", variant, VARIANTS)
        self.topk, self.feature_map, self.variant, self.compat = topk, feature_map, variant, compat
        self.BLKQ, self.BLKK = BLKQ, BLKK
        self.dtype = None if use_bf16 is None else torch.bfloat16 if use_bf16 else torch.float16
        self.proj_l = nn.Linear(head_dim, head_dim, dtype=torch.float32)
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, return_sparsity: bool = False) -> Tensor | tuple[Tensor, float]:
        """Attention of q: (B, Hq, L, D) to k, v: (B, Hkv, L, D).

        Returns:
            out: (B, Hq, L, D), q's dtype.
            sparsity: with return_sparsity, the fraction of key blocks that are NOT attended to exactly, 0 ... 1. The
                published module returns the fraction that is, under the same name.
        """
        given = (x if self.dtype is None else x.to(self.dtype) for x in (q, k, v))
        out = self._attend(*given).to(q.dtype)
        if not return_sparsity:
            return out
        blocks = -(-k.shape[2] // self.BLKK)
        return out, 1 - max(1, int(self.topk * blocks)) / blocks

    def extra_repr(self) -> str:
        """What the modules inside do not say."""
        return f"topk={self.topk}, {self.feature_map}, BLKQ={self.BLKQ}, BLKK={self.BLKK}, variant={self.variant}"

    @property
    def _method(self) -> dict[str, Any]:
        return {
            "keep_ratio": self.topk,
            "variant": self.variant,
            "feature_map": self.feature_map,
            "block_q": self.BLKQ,
            "block_k": self.BLKK,
            "compat": self.compat,
        }

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_linear_attention(q, k, v, self.proj_l.weight, self.proj_l.bias, **self._method)[0]


class SageSparseLinearAttention(SparseLinearAttention):
    """`SparseLinearAttention` for inference, its sparse part quantized: `sage_sparse_linear_attention`.

    A gradient is refused: call it under `torch.no_grad()`, and train with `SparseLinearAttention`. Its state dict is
    the same.

    Args:
        head_dim: channels of a head, D.
        topk: fraction of the key blocks to attend to, 0 ... 1; at least one block is.
        feature_map: feature map of the linear branch.
        BLKQ: tokens per block of queries.
        BLKK: tokens per block of keys.
        use_bf16: as for `SparseLinearAttention`.
        tie_feature_map_qk: likewise.
        variant: likewise.
        compat: likewise.
        pv: what weights and values are rounded to, "fp16" or "fp8".
    """

    def __init__(
        self,
        head_dim: int,
        topk: float,
        feature_map: str = "softmax",
        BLKQ: int = 128,  # noqa: N803
        BLKK: int = 64,  # noqa: N803
        use_bf16: bool | None = True,
        tie_feature_map_qk: bool = True,
        *,
        variant: str = "all",
        compat: bool = False,
        pv: str = "fp16",
    ) -> None:
        super().__init__(
            head_dim, topk, feature_map, BLKQ, BLKK, use_bf16, tie_feature_map_qk, variant=variant, compat=compat
        )
        self.pv = pv

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sage_sparse_linear_attention(q, k, v, self.proj_l.weight, self.proj_l.bias, pv=self.pv, **self._method)[
            0
        ]
