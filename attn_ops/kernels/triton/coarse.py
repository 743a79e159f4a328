"""VSA's coarse branch in Triton, for sm_80 and newer: scores between means of tiles, and attention to them.

One launch. Scores are written for the selection of tiles; the softmax over them runs beside, and its weights never
reach memory. All is fp32 and products are IEEE, so that no setting of the matrix units changes which tiles are chosen.
Attention of the means is dense, and its gradients are those of block-sparse attention with every block listed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_sparse_backward import attention_backward
from .device import LN_2, LOG2_E, finish, start, weigh
from .tiles import on_device, padded_head_dim

_BLOCK = 64  # of means, in the lists of the gradients
_ROWS, _WARPS, _STAGES = 32, 8, 2
_FACTOR = tl.constexpr(LOG2_E)


def attend(q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of means of tiles and, if v is given, softmax attention to all of them.

    Args:
        q: (B, Hq, nq, D) fp32, contiguous, D up to 256.
        k: (B, Hkv, nk, D) fp32, contiguous; query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, nk, D) fp32, contiguous, or None for the scores alone.
        scale: factor on the scores.

    Returns:
        scores: (B, Hq, nq, nk) fp32.
        out: (B, Hq, nq, D) fp32; empty without v.
        lse: (B, Hq, nq) fp32, natural logarithm; empty without v.
    """
    (batch, heads, tiles_q, head_dim), (kv_heads, tiles_k) = q.shape, k.shape[1:3]
    scores = q.new_empty((batch, heads, tiles_q, tiles_k))
    out, lse = (q.new_empty(0 if v is None else shape) for shape in (q.shape, q.shape[:-1]))
    if q.numel() == 0:
        return scores, out, lse
    dim = padded_head_dim(head_dim)
    programs = triton.cdiv(tiles_q, _ROWS)
    with on_device(q):
        _attend[(programs * heads * batch,)](
            *(q, k, v, scores, out, lse, scale, programs, heads // kv_heads, tiles_q, tiles_k),
            ROWS=_ROWS,
            KEYS=32 if dim <= 128 else 16,
            HEAD_DIM=head_dim,
            DIM=dim,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
    return scores, out, lse


def attend_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` through out for q, k and v; grad_out: (B, Hq, nq, D) fp32."""
    blocks_q, blocks_k = (triton.cdiv(x.shape[2], _BLOCK) for x in (q, k))
    index = torch.arange(blocks_k, dtype=torch.int32, device=q.device).expand(1, 1, blocks_q, -1)
    count = torch.full((1, 1, blocks_q), blocks_k, dtype=torch.int32, device=q.device)
    return attention_backward(
        *(grad_out, None, out, lse, q, k, v, index, count),
        block_q=_BLOCK,
        block_k=_BLOCK,
        causal=False,
        scale=scale,
    )


@triton.jit(do_not_specialize=["Scores", "Out", "Lse", "scale", "programs", "group", "tiles_q", "tiles_k"])
def _attend(
    Q,
    K,
    V,
    Scores,
    Out,
    Lse,
    scale,
    programs,
    group,
    tiles_q,
    tiles_k,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Scores and result of ROWS means of one head."""
    plane = (tl.program_id(0) // programs).to(tl.int64)
    row = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    row_exists = row < tiles_q
    dim = tl.arange(0, DIM)
    channel_exists = (dim < HEAD_DIM)[None, :]
    of_row = (plane * tiles_q + row)[:, None]
    of_keys = plane // group * tiles_k * HEAD_DIM + dim[None, :]
    q = tl.load(Q + of_row * HEAD_DIM + dim[None, :], mask=row_exists[:, None] & channel_exists, other=0.0)
    factors = tl.full([ROWS], _FACTOR, tl.float32)
    acc, total, top = start(ROWS, DIM)
    for begin in tl.range(0, tiles_k, KEYS):
        key = begin + tl.arange(0, KEYS)
        exists = key < tiles_k
        of_tile = of_keys + key[:, None] * HEAD_DIM
        element = exists[:, None] & channel_exists
        k = tl.load(K + of_tile, mask=element, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        tl.store(Scores + of_row * tiles_k + key[None, :], scores, mask=row_exists[:, None] & exists[None, :])
        if V is not None:
            shown = tl.where(exists[None, :], scores, float("-inf"))
            weights, total, top, decay = weigh(shown, factors, total, top, 0.0)
            v = tl.load(V + of_tile, mask=element, other=0.0)
            acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
    if V is not None:
        out, lse = finish(acc, total, top, 0.0)
        tl.store(Out + of_row * HEAD_DIM + dim[None, :], out, mask=row_exists[:, None] & channel_exists)
        tl.store(Lse + plane * tiles_q + row, lse * LN_2, mask=row_exists)
