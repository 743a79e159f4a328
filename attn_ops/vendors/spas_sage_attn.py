"""The package spas-sage-attn (SpargeAttention): quantized attention over a given block map.

It rounds Q, K and V as SageAttention does, so it is no provider of the exact block_sparse_attention, but one of
sparge_attention, over our own block map. It returns no lse; ours is NaN, so that whoever uses it notices.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..call import AttentionCall
from ..capability import Capability
from ..errors import ArgumentError
from ..layout import like_query
from ..spec import Kernel, Provider, Support
from .stream import on_default_stream

PACKAGE = "spas_sage_attn"
_SMS = (80, 86, 87, 89, 90, 120)
_HEAD_DIMS = (64, 128)
_LEAST_QUERIES = 128
_NEVER_SKIP = 1e6


def blocks_for(sm: int) -> tuple[int, int]:
    """Tokens per block of queries and of keys in the block map."""
    return (64, 128) if sm == 90 else (128, 64)


def load() -> Kernel:
    """Import the package and return `attention(q, k, v, block_map, *, scale, pv_threshold=None) -> (out, lse)`.

    block_map: (B, Hq, nq, nk) bool with the blocks of `blocks_for`, True where a block of queries sees a block of keys.
    pv_threshold: a number, or an fp32 tensor of shape () or (Hq,), in powers of two; None skips nothing.
    """
    kernel = importlib.import_module(PACKAGE).block_sparse_sage2_attn_cuda

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_map: Tensor,
        *,
        scale: float,
        pv_threshold: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        block_q, block_k = blocks_for(Capability.current(q.device).sm or 0)
        shape = (*q.shape[:2], -(-q.shape[2] // block_q), -(-k.shape[2] // block_k))
        if tuple(block_map.shape) != shape:
            raise ArgumentError(
                PACKAGE, "block_map", f"be {shape}, of {block_q} x {block_k} blocks", tuple(block_map.shape)
            )
        with on_default_stream(PACKAGE, q):
            out = kernel(
                *(q, k, v),
                mask_id=block_map.contiguous(),
                scale=scale,
                smooth_k=True,
                pvthreshd=_NEVER_SKIP if pv_threshold is None else pv_threshold,
                tensor_layout="HND",
            )
        # The kernel leaves the rows of a block that sees nothing as it found them.
        sees_nothing = ~block_map.any(dim=-1).repeat_interleave(block_q, dim=-1)[..., : q.shape[2]]
        out = out.masked_fill(sees_nothing.unsqueeze(-1), 0.0)
        return like_query(out, q), q.new_full(q.shape[:-1], torch.nan, dtype=torch.float32)

    return attention


def _why_not(call: AttentionCall, capability: Capability) -> list[str]:
    reasons = []
    if capability.sm is not None and capability.sm not in _SMS:
        reasons.append(f"has kernels for {', '.join(f'sm{sm}' for sm in _SMS)}, not for sm{capability.sm}")
    if call.head_dim not in _HEAD_DIMS:
        reasons.append(f"head_dim {call.head_dim}, not {' or '.join(map(str, _HEAD_DIMS))}")
    if call.seq_q < _LEAST_QUERIES:
        reasons.append(f"{call.seq_q} queries, its kernel takes {_LEAST_QUERIES} or more")
    if capability.sm is not None and call.params:
        reasons += _other_rounding(call, capability.sm)
    return reasons


def _other_rounding(call: AttentionCall, sm: int) -> list[str]:
    """Why the package would not compute what the parameters of sparge_attention say."""
    pv, blocks = "fp8" if sm >= 89 else "fp16", (call.param("block_q"), call.param("block_k"))
    reasons = []
    if call.param("pv") != pv:
        reasons.append(f'has kernels for pv="{pv}" only on sm{sm}')
    if blocks != blocks_for(sm):
        have = " x ".join(map(str, blocks_for(sm)))
        reasons.append(f"blocks of {blocks[0]} x {blocks[1]}, on sm{sm} it has {have}")
    if not call.param("smooth_k"):
        reasons.append("smooth_k=False fails in the package")
    return reasons


PROVIDER = Provider(
    PACKAGE,
    "SpargeAttention, the package spas-sage-attn; block map given, INT8 QK, FP16 or FP8 PV",
    load=load,
    support=Support(
        dtypes=(torch.float16, torch.bfloat16),
        causal=False,
        grad=False,
        devices=("cuda",),
        min_sm=80,
        package=PACKAGE,
    ),
    why_not=_why_not,
    install="pip install --no-build-isolation ./SpargeAttn (a checkout of its repository)",
)
