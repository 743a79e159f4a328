"""The package fastvideo-kernel as a provider of block_sparse_attention: 64 x 64 blocks on Hopper, forward only.

Its kernel divides by the softmax sum of a row without looking, so it must never see a block without keys, nor a row of
blocks without a block. It stores -sqrt(D) times the natural lse.
"""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..call import AttentionCall
from ..capability import Capability
from ..checks import default_scale
from ..layout import empty_result, like_query
from ..spec import Kernel, Provider, Support

PACKAGE = "fastvideo_kernel"
_BLOCK = 64
_HEAD_DIMS = (64, 128)


def load() -> Kernel:
    """Import the package and return the forward kernel of block_sparse_attention."""
    # The package's front door picks a kernel, and with it the meaning of the lse, from the environment.
    kernel = importlib.import_module(f"{PACKAGE}.block_sparse_attn").block_sparse_attn_sm90

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_index: Tensor,
        block_count: Tensor,
        key_sizes: Tensor | None = None,
        *,
        block_q: int,  # noqa: ARG001  (the provider refuses any other than what it has)
        block_k: int,  # noqa: ARG001
        causal: bool = False,  # noqa: ARG001
        scale: float,  # noqa: ARG001
    ) -> tuple[Tensor, Tensor]:
        if q.numel() == 0 or k.numel() == 0 or block_index.shape[-1] == 0:
            return empty_result(q)
        sizes = _sizes(k, key_sizes)
        index, count = _without_empty_blocks(block_index, block_count, sizes)
        index, count = (lists.expand(1, q.shape[1], *lists.shape[2:]).contiguous() for lists in (index, count))
        out, lse = kernel(_padded(q), _padded(k), _padded(v), index, count.clamp_min(1), sizes)
        seq = q.shape[2]
        sees_nothing = (count == 0).repeat_interleave(_BLOCK, dim=-1)[..., :seq]
        out = out[:, :, :seq].masked_fill(sees_nothing.unsqueeze(-1), 0.0)
        lse = (lse[:, :, :seq, 0] / -math.sqrt(q.shape[-1])).masked_fill(sees_nothing, -torch.inf)
        return like_query(out, q), lse

    return attention


def _padded(x: Tensor) -> Tensor:
    return pad(x, (0, 0, 0, -x.shape[2] % _BLOCK)).contiguous()


def _sizes(k: Tensor, key_sizes: Tensor | None) -> Tensor:
    """Count the valid tokens of every key block, (nk,) int32."""
    if key_sizes is not None:
        return key_sizes.contiguous()
    starts = torch.arange(0, k.shape[2], _BLOCK, dtype=torch.int32, device=k.device)
    return (k.shape[2] - starts).clamp_max(_BLOCK)


def _without_empty_blocks(index: Tensor, count: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the blocks of no token from the lists; what follows a list's count becomes a block that exists."""
    index = index.clamp(0, sizes.shape[0] - 1)
    listed = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    kept = listed & (sizes[index] > 0)
    order = torch.argsort(~kept, dim=-1, stable=True)
    return index.gather(-1, order), kept.sum(dim=-1, dtype=torch.int32)


def _why_not(call: AttentionCall, capability: Capability) -> list[str]:
    reasons = []
    if capability.sm is not None and capability.sm != 90:
        reasons.append(f"its kernel is for sm90, this is {capability}")
    if call.batch != 1:
        reasons.append(f"batch {call.batch}, its kernel takes 1")
    if call.head_dim not in _HEAD_DIMS:
        reasons.append(f"head_dim {call.head_dim}, not {' or '.join(map(str, _HEAD_DIMS))}")
    blocks = call.param("block_q"), call.param("block_k")
    if blocks not in ((None, None), (_BLOCK, _BLOCK)):
        reasons.append(f"blocks of {blocks[0]} x {blocks[1]}, it has {_BLOCK} x {_BLOCK}")
    if call.scale is not None and not math.isclose(call.scale, default_scale(None, call.head_dim)):
        reasons.append(f"scale {call.scale:g}, it has head_dim ** -0.5 only")
    return reasons


PROVIDER = Provider(
    PACKAGE,
    "VSA's Hopper kernel (ThunderKittens), the package fastvideo-kernel; 64 x 64 blocks",
    load=load,
    support=Support(
        dtypes=(torch.bfloat16,),
        causal=False,
        grad=False,
        devices=("cuda",),
        min_sm=90,
        package=PACKAGE,
        min_version="0.3.2",
    ),
    why_not=_why_not,
    install="pip install fastvideo-kernel",
)
