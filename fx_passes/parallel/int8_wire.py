"""q and k as INT8 on the way to the heads, for attention that rounds them anyway; v and the output travel as they are.

Every token has its scale: D + 4 bytes instead of D elements, in the one all-to-all of `ulysses`. k is rounded without
the mean over this rank's tokens, which travels as one token more and is added again: what all keys have in common would
cost accuracy, and no rank knows the mean over all of them before the exchange. There is no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...attn_ops.numerics.quantize import Groups, quantize_int8, without_mean
from .ulysses import Piece, Ulysses, payload

_EACH_TOKEN = Groups(1)
_TOKENS = 2  # dimension of the tokens in (B, H, S, D)
_SCALE = 4  # bytes of an fp32


def to_heads(ulysses: Ulysses, q: Tensor, k: Tensor, *others: Tensor) -> list[Tensor]:
    """`Ulysses.to_heads` with q and k rounded.

    Args:
        ulysses: the exchange.
        q: (B, Hq, local, D).
        k: (B, Hkv, local, D), q's dtype.
        others: v and what else is sent, each (B, Hq or Hkv, local, D) of q's dtype; D may differ.

    Returns:
        Each as (B, own heads, tokens, D) of q's dtype.
    """
    k_mean = rounded(without_mean(k)[1])  # as it arrives: then k misses nothing but its own rounding
    rows = encoded(q), encoded(k.float() - k_mean), *(other.contiguous().view(torch.uint8) for other in others)
    first = encoded(k_mean)
    sent = [torch.cat([first if row is rows[1] else row[:, :, :1], row], dim=_TOKENS) for row in rows]
    bytes_q, bytes_k, *more = _with_one_more(ulysses).to_heads(*sent)
    k_means, k_rows = decoded(bytes_k).tensor_split([ulysses.ranks], dim=_TOKENS)
    q_rows, *others_rows = (row[:, :, ulysses.ranks :] for row in (bytes_q, *more))
    k_rows = k_rows + _of_each_token(ulysses, k_means)
    return [decoded(q_rows).to(q.dtype), k_rows.to(q.dtype), *(_as(row, q.dtype) for row in others_rows)]


def bytes_to_heads(ulysses: Ulysses, head_dims: Sequence[tuple[int, int]], batch: int, element_size: int) -> int:
    """Bytes that leave this rank on the way to the heads.

    Args:
        ulysses: the exchange.
        head_dims: (own heads, D) of q, of k, and of each of the others.
        batch: B.
        element_size: bytes of an element of the others.
    """
    rounded_dims = [(own, dim + _SCALE) for own, dim in head_dims[:2]]
    other_dims = [(own, dim * element_size) for own, dim in head_dims[2:]]
    more = _with_one_more(ulysses)
    return payload(more, [*rounded_dims, *other_dims], batch, 0)


def rounded(x: Tensor) -> Tensor:
    """x: (B, H, S, D) as it arrives, in fp32."""
    return decoded(encoded(x))


def encoded(x: Tensor) -> Tensor:
    """x: (B, H, S, D) as bytes, (B, H, S, D + 4): INT8, and the scale of the token."""
    integers, scale = quantize_int8(x, _EACH_TOKEN)
    return torch.cat([integers.view(torch.uint8), scale.unsqueeze(-1).view(torch.uint8)], dim=-1)


def decoded(row: Tensor) -> Tensor:
    """(B, H, S, D + 4) bytes as (B, H, S, D) fp32."""
    integers, scale = row.tensor_split([-_SCALE], dim=-1)
    return integers.view(torch.int8) * _as(scale, torch.float32)


def _as(row: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; from a copy, because numbers do not begin at every byte."""
    return row.clone(memory_format=torch.contiguous_format).view(dtype)


def _with_one_more(ulysses: Ulysses) -> Ulysses:
    """The exchange of one token of every rank, and then those there are."""
    return replace(ulysses, pieces=(Piece(1, ulysses.ranks, sharded=True), *ulysses.pieces))


def _of_each_token(ulysses: Ulysses, k_means: Tensor) -> Tensor:
    """What every rank took from its tokens, (B, own kv, ranks, D), for each token: (B, own kv, tokens, D)."""
    parts = []
    for piece in ulysses.pieces:
        if piece.sharded:
            parts.append(k_means.repeat_interleave(piece.local, dim=_TOKENS).narrow(_TOKENS, 0, piece.whole))
        else:
            parts.append(k_means.narrow(_TOKENS, ulysses.rank, 1).expand(-1, -1, piece.whole, -1))
    return torch.cat(parts, dim=_TOKENS)
