"""What quantized methods store, as numbers in FLOAT: integers times scales, FP16, FP8 and NVFP4, and back.

Products of such numbers are those of the integers to FLOAT's rounding, whatever a runtime multiplies them with. Scales
and ties are those of `attn_ops.numerics`.
"""

from __future__ import annotations

from collections.abc import Callable

from ...attn_ops.errors import UnsupportedError
from .attend import blocks_of, spread
from .graph import FLOAT, FLOAT8, FLOAT16, Graph, Value

_INF = float("inf")
_LEAST_AMAX = 1e-30
_FLOAT8_SINCE = 19
_E4M3_MAX, _E2M1_MAX, _NVFP4_GROUP = 448.0, 6.0, 16

Groups = tuple[int, int, int]
"""Tokens n with the same `(n // period) * lanes + n % (lanes * run) // run` share a scale: (period, lanes, run)."""


def round_integers(x: Value, groups: Groups, largest: int, *, asymmetric: bool = False) -> Value:
    """x: (B, H, S, D) rounded half to even to integers -largest ... largest, with a scale for every group of tokens.

    With `asymmetric`, what is rounded is the distance from the middle of the group's range.
    """
    graph = x.graph
    middle = None
    if asymmetric:
        highest, lowest = group_max(x.max(3), groups), group_max(x.min(3) * -1.0, groups) * -1.0
        middle = lowest + (highest - lowest) / 2.0
        x = x - middle
    amax = group_max(graph.op("Abs", x).max(3), groups)
    scale = amax.at_least(_LEAST_AMAX) / float(largest)
    numbers = graph.op("Round", x / scale).at_least(float(-largest)).at_most(float(largest)) * scale
    return numbers if middle is None else numbers + middle


def group_max(x: Value, groups: Groups) -> Value:
    """(B, H, S, 1): every token gets the largest number of its group."""
    period, lanes, run = groups
    if period == 1:
        return x
    batch, heads, seq = x.size(0), x.size(1), x.size(2)
    tail = (x.graph.constant([period]) - seq % period) % period
    padded = x.graph.op("Pad", x, x.graph.concat([0, 0, 0, 0, 0, 0], tail, [0], axis=0), -_INF)
    rows = period // (lanes * run)
    members = padded.reshape(batch, -1, rows, lanes, run)
    largest = members.max(2, 4).expand(1, 1, rows, 1, run)
    return largest.reshape(batch, heads, -1, 1).slice(2, 0, seq)


def round_fp16(x: Value) -> Value:
    """FLOAT rounded to FP16."""
    return x.cast(FLOAT16).cast(FLOAT)


def round_fp8(x: Value) -> Value:
    """FLOAT rounded to e4m3.

    Raises:
        UnsupportedError: where the standard operators have no such type.
    """
    if x.graph.opset < _FLOAT8_SINCE:
        raise UnsupportedError(
            f'ONNX: rounding to FP8 (pv="fp8", sage_fp4) needs opset {_FLOAT8_SINCE} or newer, got {x.graph.opset}. '
            'Export with a newer opset, or use pv="fp16".'
        )
    return x.cast(FLOAT8).cast(FLOAT)


def round_weights(pv: str) -> Callable[[Value], Value]:
    """The rounding of softmax numerators, 0 ... 1."""
    return round_fp16 if pv == "fp16" else lambda weights: round_fp8(weights * _E4M3_MAX) / _E4M3_MAX


def round_values(v: Value, pv: str) -> Value:
    """v: (B, H, S, D) rounded to FP16, or to e4m3 with a scale per channel."""
    if pv == "fp16":
        return round_fp16(v)
    scale = v.graph.op("Abs", v).max(2).at_least(_LEAST_AMAX) / _E4M3_MAX
    return round_fp8(v / scale) * scale


def round_values_causally(v: Value, block: int) -> Value:
    """v: (B, H, S, D) rounded to e4m3; the scale of a channel in a block is that of the blocks up to it."""
    amax = v.graph.op("Abs", blocks_of(v, block)).max(3, keep=False).at_least(_LEAST_AMAX)
    scale = running_max(amax, 2) / _E4M3_MAX  # (B, H, n, D)
    per_token = spread(scale, block, v.size(2))
    return round_fp8(v / per_token) * per_token


def running_max(x: Value, axis: int) -> Value:
    """The largest entry so far along an axis of x, of rank 4: there is no operator for it."""
    graph = x.graph
    body = graph.inner()
    before, entry = body.declare(FLOAT, 3), body.declare(FLOAT, 3)
    now, again = before.at_least(entry), body.op("Identity", before.at_least(entry))
    body.outputs = [now.name, again.name]
    start = x.take(graph.constant(0), axis=axis)
    settings = {"body": body, "num_scan_inputs": 1, "scan_input_axes": [axis], "scan_output_axes": [axis]}
    return graph.ops("Scan", 2, start, x, **settings)[1]


def round_nvfp4(x: Value) -> Value:
    """FLOAT x: (B, H, S, N) rounded to e2m1 times an e4m3 scale for every 16 numbers along N."""
    groups = _in_groups(x)
    scale = _saturated_fp8(x.graph.op("Abs", groups).max(4) / _E2M1_MAX)
    return _out_of_groups(_codes(groups, scale) * scale, x)


def round_nvfp4_weights(weights: Value) -> Value:
    """Softmax numerators in two levels: times 448 * 6 first, so that scales fill what e4m3 holds."""
    peak = _E4M3_MAX * _E2M1_MAX
    groups = _in_groups(weights) * peak
    scale = groups.max(4) / _E2M1_MAX
    return _out_of_groups(_codes(groups, scale) * _saturated_fp8(scale) / peak, weights)


def _codes(groups: Value, scale: Value) -> Value:
    """Numbers / scale rounded to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; 0 where the scale is."""
    graph = groups.graph
    zero = scale <= 0.0
    x = graph.where(zero, 0.0, groups / graph.where(zero, 1.0, scale))
    size = graph.op("Abs", x)
    step = graph.where(size < 2.0, 0.5, graph.where(size < 4.0, 1.0, 2.0))
    return (graph.op("Round", x / step) * step).at_least(-_E2M1_MAX).at_most(_E2M1_MAX)


def _saturated_fp8(x: Value) -> Value:
    return round_fp8(x.at_most(_E4M3_MAX))


def _in_groups(x: Value) -> Value:
    graph: Graph = x.graph
    tail = (graph.constant([_NVFP4_GROUP]) - x.size(3) % _NVFP4_GROUP) % _NVFP4_GROUP
    padded = graph.op("Pad", x, graph.concat([0, 0, 0, 0, 0, 0, 0], tail, axis=0))
    return padded.reshape(x.size(0), x.size(1), x.size(2), -1, _NVFP4_GROUP)


def _out_of_groups(groups: Value, like: Value) -> Value:
    joined = groups.reshape(like.size(0), like.size(1), like.size(2), -1)
    return joined.slice(3, 0, like.size(3))
