"""SageAttention in Triton, for sm_80 and newer: INT8 scores, then FP16 or (sm_89 and newer) FP8 values.

Rounding is that of `quantize`; a scale per token makes every granularity one kernel, and INT4 is INT8 that uses 15
integers. FP32 sums everywhere. The sum of weights is taken before they are rounded to FP16 or FP8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import UnsupportedError
from ...layout import empty_result
from ...numerics.quantize import GROUPS, LARGEST, SMOOTH_Q_BLOCK
from .device import LN_2, LOG2_E, finish, load, start, weigh
from .quantize import Rounded, Rounding, round_operands, round_values
from .tiles import on_device, padded_head_dim, sage_tile, target_arch

_LEAST_FACTOR = tl.constexpr(2.0**-120)
_LEAST_INT8_DIM = 32
_FP8_ARCH = 89
_SMOOTH_Q_BLOCK = tl.constexpr(SMOOTH_Q_BLOCK)
_FP8_PEAK_LOG2 = tl.constexpr(8.807354922057604)  # log2(448), the largest e4m3 number: weights fill its range


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    pv: str,
    granularity: str,
    smooth_k: bool,
    bits: int = 8,
    smooth_q: bool = False,
    smooth_v: bool = False,
    asymmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantized attention of every query to every key.

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16, D up to 256, unit stride on D.
        k: (B, Hkv, Sk, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        causal: token i sees keys 0 ... i (top-left).
        scale: factor on the scores.
        pv: "fp16": weights and v in FP16; "fp8": in e4m3, v with a scale per channel.
        granularity: rows that share a scale, as in `quantize_qk`.
        smooth_k: round k without its mean over tokens.
        bits: 8 or 4.
        smooth_q: round q without the mean of its block of 128 tokens.
        smooth_v: round v without its mean over tokens, and add the mean to the output.
        asymmetric: must be False.

    Returns:
        out: like q.
        lse: (B, Hq, Sq) fp32, natural logarithm, of the scores with k's mean.

    Raises:
        UnsupportedError: for pv="fp8" on a GPU older than sm_89, and for asymmetric=True.
    """
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q)
    if scale < 0:
        q, scale = -q, -scale
    with on_device(q):
        _refuse(pv, asymmetric)
        how = Rounding(*GROUPS[granularity], pv, LARGEST[bits], smooth_q, smooth_k, smooth_v=smooth_v)
        return _launch(round_operands(q, k, v, how), q, torch.empty_like(q), causal=causal, scale=scale)


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    *,
    causal: bool,
    scale: float,
    pv: str,
    smooth_v: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same of integers q and k: (B, H, S, D) int8, with the scales of their tokens: (B, H, S) fp32.

    Returns out like q in v's dtype and lse (B, Hq, Sq) fp32, of the integers' scores.
    """
    if q.numel() == 0 or k.numel() == 0:
        return empty_result(q, v.dtype)
    if scale < 0:
        q, scale = -q, -scale
    with on_device(q):
        _refuse(pv)
        values = round_values(v, pv=pv, smooth_v=smooth_v)
        rounded = Rounded(q, q_scale.contiguous(), k, k_scale.contiguous(), None, None, *values)
        return _launch(rounded, q, torch.empty_like(q, dtype=v.dtype), causal=causal, scale=scale)


def _launch(x: Rounded, q: Tensor, out: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Fill out; q, as given, is read only where k has a mean. Returns out and lse."""
    batch, heads, seq_q, head_dim = q.shape
    kv_heads, seq_k, dim = *x.k.shape[1:3], padded_head_dim(head_dim, least=_LEAST_INT8_DIM)
    tile, lse = sage_tile(target_arch(), dim), out.new_empty(out.shape[:-1], dtype=torch.float32)
    tiles_q = triton.cdiv(seq_q, tile.rows)
    _forward[(tiles_q * heads * batch,)](
        *(x.q, x.q.stride()[:3], x.q_scale, x.k, x.k.stride()[:3], x.k_scale, x.q_mean_scores),
        *(x.v, x.v.stride(), x.v_scale, x.v_mean, q, q.stride()[:3], x.k_mean, out, out.stride()[:3], lse),
        *(scale * LOG2_E, tiles_q, heads, heads // kv_heads, seq_q, seq_k),
        CAUSAL=causal,
        SHORT_TAIL=seq_k % tile.keys != 0,
        ROWS=tile.rows,
        KEYS=tile.keys,
        HEAD_DIM=head_dim,
        DIM=dim,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, lse


def _refuse(pv: str, asymmetric: bool = False) -> None:
    arch = target_arch()
    if pv == "fp8" and arch < _FP8_ARCH:
        needs = f'pv="fp8" needs sm_{_FP8_ARCH} or newer, got sm_{arch}'
        raise UnsupportedError(f'sage_attention: {needs}. Use pv="fp16".')
    if asymmetric:
        raise UnsupportedError(
            "sage_attention: the Triton kernel has no offsets, got asymmetric=True. Use smooth_k and smooth_q."
        )


@triton.jit(do_not_specialize=["Lse", "tiles_q", "heads", "group", "seq_q", "seq_k"])
def _forward(
    Q8,
    q8_strides,
    QScale,
    K8,
    k8_strides,
    KScale,
    QMeanScores,
    V,
    v_strides,
    VScale,
    VMean,
    Q,
    q_strides,
    KMean,
    Out,
    out_strides,
    Lse,
    scale_log2,
    tiles_q,
    heads,
    group,
    seq_q,
    seq_k,
    CAUSAL: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    EDGE_KEYS: tl.constexpr = KEYS // 2  # masks take registers, and half a tile gives them back
    PEAK_LOG2: tl.constexpr = _FP8_PEAK_LOG2 if V.dtype.element_ty == tl.float8e4nv else 0.0
    tile = tl.program_id(0) % tiles_q
    if CAUSAL:
        tile = tiles_q - 1 - tile  # the rows with the most keys start first
    batch = (tl.program_id(0) // tiles_q // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles_q % heads).to(tl.int64)
    kv_head = head // group
    kv_plane = batch * (heads // group) + kv_head
    lse_plane = (batch * heads + head) * seq_q

    row = tile * ROWS + tl.arange(0, ROWS)
    row_exists = row < seq_q
    dim = tl.arange(0, DIM)
    channel_exists = dim < HEAD_DIM
    element = row_exists[:, None] & channel_exists[None, :]
    wide_row = row[:, None].to(tl.int64)

    Q8 += batch * q8_strides[0] + head * q8_strides[1]
    K8 += batch * k8_strides[0] + kv_head * k8_strides[1]
    V += batch * v_strides[0] + kv_head * v_strides[1]
    q = tl.load(Q8 + wide_row * q8_strides[2] + dim[None, :], mask=element, other=0)
    factor = tl.load(QScale + lse_plane + row, mask=row_exists, other=0.0) * scale_log2
    factor = tl.where(factor < _LEAST_FACTOR, _LEAST_FACTOR, factor)  # keeps -inf * factor from being NaN

    end = seq_k
    whole = seq_k // KEYS * KEYS
    if CAUSAL:
        end = tl.minimum(seq_k, tile * ROWS + ROWS)
        whole = tl.minimum(seq_k, tile * ROWS + 1) // KEYS * KEYS
    if QMeanScores is not None:
        blocks = tl.cdiv(seq_q, _SMOOTH_Q_BLOCK)
        QMeanScores += ((batch * heads + head) * blocks + tile * ROWS // _SMOOTH_Q_BLOCK) * seq_k
    keys = (K8, k8_strides[2], KScale + kv_plane * seq_k, QMeanScores, V, v_strides[2], v_strides[3], seq_k)
    state = start(ROWS, DIM)
    scales = (factor, scale_log2)
    state = _attend(state, q, scales, row, keys, 0, whole, False, False, KEYS, HEAD_DIM, PEAK_LOG2)
    if CAUSAL or SHORT_TAIL:
        state = _attend(state, q, scales, row, keys, whole, end, CAUSAL, SHORT_TAIL, EDGE_KEYS, HEAD_DIM, PEAK_LOG2)

    out, lse = finish(state[0], state[1], state[2], PEAK_LOG2)
    if VScale is not None:
        v_scale = tl.load(VScale + kv_plane * HEAD_DIM + dim, mask=channel_exists, other=0.0)
        out = out * v_scale[None, :]
    if VMean is not None:
        v_mean = tl.load(VMean + kv_plane * HEAD_DIM + dim, mask=channel_exists, other=0.0)
        out = out + v_mean[None, :]
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
    q,
    scales,
    row,
    keys,
    first,
    stop,
    CAUSAL: tl.constexpr,
    SHORT_TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PEAK_LOG2: tl.constexpr,
):
    """Bring the keys first ... stop - 1 into the state."""
    acc, total, top = state
    factor, scale_log2 = scales
    K8, k_stride, KScale, QMeanScores, V, v_stride, v_channel_stride, seq_k = keys
    DIM: tl.constexpr = q.shape[1]
    token = tl.arange(0, KEYS)
    dim = tl.arange(0, DIM)
    for begin in tl.range(first, stop, KEYS):
        key = begin + token
        wide_key = key[:, None].to(tl.int64)
        exists = key < seq_k
        mask = exists[:, None] if SHORT_TAIL else None
        if HEAD_DIM != DIM:
            channel = (dim < HEAD_DIM)[None, :]
            mask = channel if mask is None else mask & channel
        k = load(K8 + wide_key * k_stride + dim[None, :], mask)
        k_scale = load(KScale + key, exists if SHORT_TAIL else None)
        scores = tl.dot(q, k.T).to(tl.float32) * k_scale[None, :]
        if QMeanScores is not None:
            mean_scores = load(QMeanScores + key, exists if SHORT_TAIL else None)
            scores = scores * factor[:, None] + (mean_scores * scale_log2)[None, :]
        if SHORT_TAIL:
            scores = tl.where(exists[None, :], scores, float("-inf"))
        if CAUSAL:
            scores = tl.where(key[None, :] <= row[:, None], scores, float("-inf"))
        rest = factor if QMeanScores is None else tl.full(factor.shape, 1.0, tl.float32)
        weights, total, top, decay = weigh(scores, rest, total, top, PEAK_LOG2)
        v = load(V + wide_key * v_stride + dim[None, :].to(tl.int64) * v_channel_stride, mask)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
    return acc, total, top
