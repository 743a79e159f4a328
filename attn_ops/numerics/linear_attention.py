"""The linear branch of SLA: attention with phi(q) . phi(k) for exp(q . k), whose sums over keys fit in a D x D state.

A block of queries reads the sum of the states of its key blocks. Only numbers of one sign are added to the denominator
and nothing is subtracted from a total: where few key blocks are left no digit is lost, where none is left the result
is exactly 0. All arithmetic is fp32; `torch.set_float32_matmul_precision` decides what a CUDA product rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

FEATURE_MAPS = ("softmax", "elu", "relu")

EPSILON = 1e-5
"""Added to the denominator over all tokens, as in the published code; trained projections know it."""

_LEAST = 1e-20  # floor of a denominator, far below any that a float32 feature map makes of ordinary numbers
_EXTRA = 8  # channels after those of v, the first of them 1: one product gives numerator and denominator
_CHUNK_BYTES = 128 << 20


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, *, feature_map: str, block_q: int, block_k: int
) -> Tensor:
    """phi(q) H / (phi(q) . z) with H = sum phi(k) v.T and z = sum phi(k) over the tokens of the given key blocks.

    Args:
        q: (B, Hq, S, D).
        k: (B, Hkv, S, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, S, D).
        blocks: (B, Hq, nq, nk) bool, the key blocks of every block of queries; None means all tokens, with 1e-5 added
            to the denominator.
        feature_map: phi: "softmax" over channels, "elu" (plus 1) or "relu".
        block_q: tokens per block of queries.
        block_k: tokens per block of keys.

    Returns:
        out: (B, Hq, S, D) fp32. A row whose denominator is 0 is 0.
    """
    out = q.new_empty(q.shape, dtype=torch.float32)
    for part in _parts(q, k, v, blocks, feature_map, block_q, block_k):
        values = part.q @ part.states()
        part.of(out).copy_(_tokens(values[..., : q.shape[3]] / part.total(values), q.shape[2]))
    return out


def linear_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    *,
    feature_map: str,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear_attention` for q, k and v, fp32, from its result and the gradient of that, both fp32."""
    seq, dim = q.shape[2:]
    grad_q, grad_k, grad_v = (x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v))
    for part in _parts(q, k, v, blocks, feature_map, block_q, block_k):
        states = part.states()
        delta = (part.of(grad_out) * part.of(out)).sum(dim=-1, keepdim=True)
        grad_values = pad(torch.cat([part.of(grad_out), -delta], dim=-1), (0, _EXTRA - 1))
        grad_values = _blocks(grad_values, part.q.shape[3]) / part.total(part.q @ states)
        grad_states = part.states_backward(part.q.mT @ grad_values)
        for grad, features, phi in (
            (part.of(grad_q), grad_values @ states.mT, part.q),
            (part.of(grad_k), part.v @ grad_states.mT, part.k),
        ):
            grad.copy_(_phi_backward(_tokens(features, seq), _tokens(phi, seq), feature_map))
        part.of(grad_v).copy_(_tokens(part.k @ grad_states[..., :dim], seq))
    return grad_q, grad_k, grad_v


class _Part(NamedTuple):
    """Some kv heads of one batch element, P of them with G query heads each, cut into blocks; fp32.

    Args:
        q: (P, G, nq, block_q, D), features.
        k: (P, 1, nk, block_k, D), features.
        v: (P, 1, nk, block_k, D + 8): v, then 1, then 0.
        blocks: (P, G * nq, nk), 1 where a block of queries reads a block of keys, else 0.
        epsilon: added to the denominator.
        batch: the batch element.
        heads: its kv heads.
        kv_heads: how many there are in all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor
    epsilon: float
    batch: int
    heads: slice
    kv_heads: int

    def of(self, x: Tensor) -> Tensor:
        """What belongs to the part of x: (B, Hq or Hkv, S, D), as a view (P, G or 1, S, D)."""
        return _grouped(x[self.batch], self.kv_heads)[self.heads]

    def states(self) -> Tensor:
        """What every block of queries reads: sum of phi(k) (v, 1, 0).T, (P, G, nq, D, D + 8)."""
        own = (self.k.mT @ self.v).squeeze(1)
        read = self.blocks @ own.flatten(2)
        return read.reshape(*self.q.shape[:3], *own.shape[2:])

    def states_backward(self, grad: Tensor) -> Tensor:
        """The gradient of the states of the key blocks, (P, 1, nk, D, D + 8), from that of `states`."""
        own = self.blocks.mT @ grad.flatten(3).flatten(1, 2)
        return own.reshape(*self.k.shape[:3], *grad.shape[3:])

    def total(self, values: Tensor) -> Tensor:
        """The denominator, (P, G, nq, block_q, 1), of values: (P, G, nq, block_q, D + 8)."""
        dim = self.q.shape[-1]
        return (values[..., dim : dim + 1] + self.epsilon).clamp_min(_LEAST)


def _parts(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, feature_map: str, block_q: int, block_k: int
) -> Iterator[_Part]:
    """Parts of about `_CHUNK_BYTES`: a state for every block of queries is much larger than q."""
    if q.numel() == 0:
        return
    (batch, heads, seq, dim), kv_heads = q.shape, k.shape[1]
    group, epsilon = heads // kv_heads, 0.0
    if blocks is None:
        block_q, block_k, epsilon = seq, seq, EPSILON
        blocks = q.new_ones(1, 1, 1, 1, dtype=torch.bool).expand(batch, heads, 1, 1)
    states = (group * blocks.shape[2] + blocks.shape[3]) * dim * (dim + _EXTRA)
    step = max(1, _CHUNK_BYTES // (4 * (states + (2 * group + 3) * seq * dim)))
    for b in range(batch):
        for first in range(0, kv_heads, step):
            take = slice(first, first + step)
            q_part, k_part, v_part, read = (_grouped(x[b], kv_heads)[take].float() for x in (q, k, v, blocks))
            v_part = pad(v_part, (0, _EXTRA))
            v_part[..., dim] = 1
            yield _Part(
                _blocks(_phi(q_part, feature_map), block_q),
                _blocks(_phi(k_part, feature_map), block_k),
                *(_blocks(v_part, block_k), read.flatten(1, 2), epsilon, b, take, kv_heads),
            )


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(Hq, ...) as (Hkv, Hq / Hkv, ...)."""
    return x.view(kv_heads, -1, *x.shape[1:])


def _phi(x: Tensor, feature_map: str) -> Tensor:
    """A positive function of the channels of a token."""
    if feature_map == "softmax":
        return x.softmax(dim=-1)
    # exp(x) below 0 and x + 1 above, with all digits of a small exp(x).
    return x.relu() + x.clamp(max=0).exp() if feature_map == "elu" else x.relu()


def _phi_backward(grad: Tensor, phi: Tensor, feature_map: str) -> Tensor:
    """The gradient of x from that of phi(x); phi tells what x was as far as it is needed."""
    if feature_map == "softmax":
        return phi * (grad - (grad * phi).sum(dim=-1, keepdim=True))
    return grad * (phi.clamp(max=1) if feature_map == "elu" else phi > 0)


def _blocks(x: Tensor, block: int) -> Tensor:
    """(P, G, S, D) as (P, G, n, block, D), the last block padded with zeros."""
    if tail := -x.shape[2] % block:
        x = pad(x, (0, 0, 0, tail))
    return x.reshape(*x.shape[:2], -1, block, x.shape[3])


def _tokens(x: Tensor, seq: int) -> Tensor:
    """The inverse of `_blocks`."""
    return x.flatten(2, 3)[:, :, :seq]
