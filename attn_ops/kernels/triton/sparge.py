"""SpargeAttention in Triton, for sm_80 and newer: INT8 scores over lists of key blocks, FP16 or FP8 values.

One program computes one tile of queries of one head and walks its list of key blocks, as in `block_sparse`; scores,
weights and values are those of `sage`. The second stage judges whole blocks, so there tile and block must be one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import UnsupportedError
from ...layout import empty_result
from ...numerics.quantize import Groups
from .block_sparse import broadcast_strides, split_list
from .device import LN_2, LOG2_E, finish, load, start, weigh
from .quantize import Rounding, round_operands
from .tiles import on_device, padded_head_dim, sparge_tile, target_arch

_LEAST_FACTOR = tl.constexpr(2.0**-120)
_LEAST_INT8_DIM = 32
_FP8_ARCH = 89
_FP8_PEAK_LOG2 = tl.constexpr(8.807354922057604)  # log2(448), the largest e4m3 number: weights fill its range
_NEVER_SKIPPED = tl.constexpr(2)  # blocks at the end of a list that the second stage leaves alone


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    *,
    block_q: int,
    block_k: int,
    pv: str,
    smooth_k: bool,
    pv_threshold: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Quantized attention of every block of queries to its listed blocks of keys.

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16, D up to 256, unit stride on D.
        k: (B, Hkv, Sk, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        block_index: (B or 1, Hq or 1, nq, max_blocks) int32, ascending within count.
        block_count: (B or 1, Hq or 1, nq) int32.
        block_q: tokens of a block of queries.
        block_k: tokens of a block of keys.
        pv: "fp16": weights and v in FP16; "fp8": in e4m3, v with a scale per channel.
        smooth_k: subtract k's mean before quantization, as `block_rounding` does.
        pv_threshold: () or (Hq,) fp32, in powers of two, or None for no second stage.
        causal: token i sees keys 0 ... i (top-left).
        scale: factor on the scores.

    Returns:
        out: like q; 0 in a row with no key.
        lse: (B, Hq, Sq) fp32, natural logarithm, of the scores with k's mean; -inf in a row with no key.

    Raises:
        UnsupportedError: for pv="fp8" on a GPU older than sm_89, or a pv_threshold with blocks that are not one tile.
    """
    if q.numel() == 0 or k.numel() == 0 or block_index.shape[-1] == 0:
        return empty_result(q)
    if scale < 0:
        q, scale = -q, -scale
    if block_index.stride(-1) != 1:
        block_index = block_index.contiguous()
    batch, heads, seq_q, head_dim = q.shape
    seq_k, dim = k.shape[2], padded_head_dim(head_dim, least=_LEAST_INT8_DIM)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    with on_device(q):
        arch, fp8 = target_arch(), pv == "fp8"
        tile = sparge_tile(arch, dim, block_q, block_k, fp8 and causal)
        if fp8 and arch < _FP8_ARCH:
            needs = f'pv="fp8" needs sm_{_FP8_ARCH} or newer, got sm_{arch}'
            raise UnsupportedError(f'sparge_attention: {needs}. Use pv="fp16".')
        if pv_threshold is not None and (tile.rows, tile.keys) != (block_q, block_k):
            needs = f"pv_threshold needs blocks of one tile, {tile.rows} x {tile.keys}, got {block_q} x {block_k}"
            raise UnsupportedError(f"sparge_attention: {needs}. Use such blocks, or no pv_threshold.")
        x = round_operands(q, k, v, _rounding(block_q, block_k, pv, smooth_k, causal))
        tiles_q = triton.cdiv(seq_q, block_q) * triton.cdiv(block_q, tile.rows)
        _forward[(tiles_q * heads * batch,)](
            *(x.q, x.q.stride()[:3], x.q_scale, x.k, x.k.stride()[:3], x.k_scale, x.v, x.v.stride(), x.v_scale),
            *(q, q.stride()[:3], x.k_mean, out, out.stride()[:3], lse),
            *(block_index, *broadcast_strides(block_index), block_count, *broadcast_strides(block_count)),
            *(pv_threshold, 0 if pv_threshold is None or pv_threshold.dim() == 0 else pv_threshold.stride(0)),
            *(scale * LOG2_E, tiles_q, heads, heads // k.shape[1], seq_q, seq_k),
            CAUSAL=causal,
            SHORT_TAIL=seq_k % block_k != 0,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            ROWS=tile.rows,
            KEYS=tile.keys,
            HEAD_DIM=head_dim,
            DIM=dim,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, lse


def _rounding(block_q: int, block_k: int, pv: str, smooth_k: bool, causal: bool) -> Rounding:
    """What `block_rounding` defines: with `causal`, nothing depends on what a block of queries must not see."""
    return Rounding(
        Groups(block_q),
        Groups(1 if causal else block_k),
        pv,
        smooth_k=smooth_k,
        mean_keys=block_q if causal else None,
        growing_block=block_k if causal and pv == "fp8" else None,
    )


@triton.jit(
    do_not_specialize=[
        *("Lse", "Index", "index_batch", "index_head", "index_row", "Count", "count_batch", "count_head", "count_row"),
        *("Threshold", "threshold_head", "tiles_q", "heads", "group", "seq_q", "seq_k"),
    ]
)
def _forward(
    Q8,
    q8_strides,
    QScale,
    K8,
    k8_strides,
    KScale,
    V,
    v_strides,
    VScale,
    Q,
    q_strides,
    KMean,
    Out,
    out_strides,
    Lse,
    Index,
    index_batch,
    index_head,
    index_row,
    Count,
    count_batch,
    count_head,
    count_row,
    Threshold,
    threshold_head,
    scale_log2,
    tiles_q,
    heads,
    group,
    seq_q,
    seq_k,
    CAUSAL: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    TILES_PER_BLOCK: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS
    # Masks take registers, and half a tile gives them back; but the second stage judges whole blocks.
    EDGE_KEYS: tl.constexpr = KEYS if KEYS <= 32 or Threshold is not None else KEYS // 2
    FP8: tl.constexpr = V.dtype.element_ty == tl.float8e4nv
    PEAK_LOG2: tl.constexpr = _FP8_PEAK_LOG2 if FP8 else 0.0
    tile = tl.program_id(0) % tiles_q
    if CAUSAL:
        tile = tiles_q - 1 - tile  # the longest lists start first
    batch = (tl.program_id(0) // tiles_q // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles_q % heads).to(tl.int64)
    kv_head = head // group
    kv_plane = batch * (heads // group) + kv_head
    lse_plane = (batch * heads + head) * seq_q

    block = tile // TILES_PER_BLOCK
    row_in_block = tile % TILES_PER_BLOCK * ROWS + tl.arange(0, ROWS)
    row = block * BLOCK_Q + row_in_block
    row_exists = (row < seq_q) & (row_in_block < BLOCK_Q)
    dim = tl.arange(0, DIM)
    channel_exists = dim < HEAD_DIM
    element = row_exists[:, None] & channel_exists[None, :]
    wide_row = row[:, None].to(tl.int64)
    first_row = block * BLOCK_Q + tile % TILES_PER_BLOCK * ROWS

    Q8 += batch * q8_strides[0] + head * q8_strides[1]
    K8 += batch * k8_strides[0] + kv_head * k8_strides[1]
    V += batch * v_strides[0] + kv_head * v_strides[1]
    q = tl.load(Q8 + wide_row * q8_strides[2] + dim[None, :], mask=element, other=0)
    factor = tl.load(QScale + lse_plane + row, mask=row_exists, other=0.0) * scale_log2
    factor = tl.where(factor < _LEAST_FACTOR, _LEAST_FACTOR, factor)  # keeps -inf * factor from being NaN

    Index += batch * index_batch + head * index_head + block.to(tl.int64) * index_row
    count = tl.load(Count + batch * count_batch + head * count_head + block * count_row)
    whole, seen = count, count
    if CAUSAL:
        whole, seen = split_list(Index, count, tl.minimum(first_row + 1, seq_k), first_row + ROWS, BLOCK_K)
    elif SHORT_TAIL:
        whole, seen = split_list(Index, count, seq_k, seq_k, BLOCK_K)

    keys = (K8, k8_strides[2], KScale + kv_plane * seq_k, V, v_strides[2], v_strides[3], seq_k)
    queries = (q, factor, row)
    v_scale = tl.full([DIM], 1.0, tl.float32)
    if FP8:
        blocks_k = (seq_k + BLOCK_K - 1) // BLOCK_K if CAUSAL else 1
        VScale += kv_plane * blocks_k * HEAD_DIM
        v_scale = tl.load(VScale + dim, mask=channel_exists, other=0.0)
    second_stage = None
    if Threshold is not None:
        second_stage = (tl.load(Threshold + head * threshold_head), count - _NEVER_SKIPPED, row_exists)
    growing = VScale if FP8 and CAUSAL else None
    state = start(ROWS, DIM)
    state, v_scale = _attend(
        state,
        v_scale,
        queries,
        keys,
        growing,
        second_stage,
        Index,
        0,
        whole,
        False,
        False,
        KEYS,
        BLOCK_K,
        HEAD_DIM,
        PEAK_LOG2,
    )
    if CAUSAL or SHORT_TAIL:
        state, v_scale = _attend(
            state,
            v_scale,
            queries,
            keys,
            growing,
            second_stage,
            Index,
            whole,
            seen,
            CAUSAL,
            SHORT_TAIL,
            EDGE_KEYS,
            BLOCK_K,
            HEAD_DIM,
            PEAK_LOG2,
        )

    out, lse = finish(state[0], state[1], state[2], PEAK_LOG2)
    if FP8:
        out = out * v_scale[None, :]
    if KMean is not None:
        mean = tl.load(KMean + kv_plane * HEAD_DIM + dim, mask=channel_exists, other=0.0)
        Q += batch * q_strides[0] + head * q_strides[1]
        exact_q = tl.load(Q + wide_row * q_strides[2] + dim[None, :], mask=element, other=0.0).to(tl.float32)
        lse += tl.sum(exact_q * mean[None, :], 1) * scale_log2
    Out += batch * out_strides[0] + head * out_strides[1]
    tl.store(Out + wide_row * out_strides[2] + dim[None, :], out.to(Out.dtype.element_ty), mask=element)
    tl.store(Lse + lse_plane + row, lse * LN_2, mask=row_exists)


@triton.jit
def _attend(
    state,
    v_scale,
    queries,
    keys,
    GrowingScale,
    second_stage,
    Index,
    first,
    stop,
    CAUSAL: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PEAK_LOG2: tl.constexpr,
):
    """Bring the listed blocks first ... stop - 1 into the state; acc is in units of v_scale."""
    TILES_PER_BLOCK: tl.constexpr = (BLOCK_K + KEYS - 1) // KEYS
    MASKED: tl.constexpr = SHORT_TAIL or BLOCK_K % KEYS != 0
    acc, total, top = state
    q, factor, row = queries
    DIM: tl.constexpr = q.shape[1]
    K8, k_stride, KScale, V, v_stride, v_channel_stride, seq_k = keys
    token = tl.arange(0, KEYS)
    dim = tl.arange(0, DIM)
    channel_exists = dim < HEAD_DIM
    block = tl.load(Index + first, mask=first < stop, other=0)
    for step in tl.range(first * TILES_PER_BLOCK, stop * TILES_PER_BLOCK):
        # Loaded one step ahead: an address that waits for a load of its own step would halve the pipeline's depth.
        next_block = tl.load(Index + tl.minimum((step + 1) // TILES_PER_BLOCK, stop - 1))
        offset_in_block = step % TILES_PER_BLOCK * KEYS
        begin = block * BLOCK_K + offset_in_block
        key = begin + token
        wide_key = key[:, None].to(tl.int64)
        mask = None
        if MASKED:
            exists = token < tl.minimum(BLOCK_K - offset_in_block, seq_k - begin)
            mask = exists[:, None]
        if HEAD_DIM != DIM:
            mask = channel_exists[None, :] if mask is None else mask & channel_exists[None, :]
        k = load(K8 + wide_key * k_stride + dim[None, :], mask)
        scores = tl.dot(q, k.T).to(tl.float32) * load(KScale + key, exists if MASKED else None)[None, :]
        if MASKED:
            scores = tl.where(exists[None, :], scores, float("-inf"))
        if CAUSAL:
            scores = tl.where(key[None, :] <= row[:, None], scores, float("-inf"))
        used = True
        if second_stage is not None:
            used = (step >= second_stage[1]) | _can_matter(scores, factor, top, second_stage[0], second_stage[2])
        if used:
            weights, total, top, decay = weigh(scores, factor, total, top, PEAK_LOG2)
            v = load(V + wide_key * v_stride + dim[None, :].to(tl.int64) * v_channel_stride, mask)
            acc = acc * decay[:, None]
            if GrowingScale is not None:
                grown = tl.load(GrowingScale + block.to(tl.int64) * HEAD_DIM + dim, mask=channel_exists, other=1.0)
                acc = acc * (v_scale / grown)[None, :]
                v_scale = grown
            acc = tl.dot(weights.to(v.dtype), v, acc)
        block = next_block
    return (acc, total, top), v_scale


@triton.jit
def _can_matter(scores, factor, top, threshold, row_exists):
    """Whether the largest score of some row comes within the threshold of the largest before it, or passes it."""
    highest = tl.max(scores, 1) * factor
    margin = tl.where(row_exists & (highest > float("-inf")), highest - top, float("-inf"))
    return tl.max(margin, 0) + threshold > 0
