"""The arguments of `sparge_attention` and `sparge_block_map`: their schema, their checks, and what they stand for.

A threshold is a number or a tensor; the tensor, where there is one, overrides the number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..checks import check_choice, check_per_head, check_qkv, default_scale
from ..errors import ArgumentError
from ..resolve import AUTO
from .selection import Selection, Threshold

ATTENTION, BLOCK_MAP = "sparge_attention", "sparge_block_map"
PV = ("fp16", "fp8")
MAX_PV_THRESHOLD = 1e6

SELECTION = (
    "float keep_ratio=0.5, float? mass=None, float similarity=-1.0, bool sink=False, bool smooth_k=True, "
    "int block_q=128, int block_k=64, Tensor? keep_ratios=None, Tensor? masses=None, Tensor? similarities=None, "
    "bool causal=False, float? scale=None"
)
"""What chooses the blocks, in the schemas of both ops."""

_TENSORS = {
    "keep_ratio": "keep_ratios",
    "mass": "masses",
    "similarity": "similarities",
    "pv_threshold": "pv_thresholds",
}
"""A threshold that is a number -> the one that is a tensor."""


class Attention(NamedTuple):
    """The arguments after q, k and v, checked, with their defaults."""

    how: Selection
    pv_threshold: Threshold | None
    pv: str
    scale: float
    provider: str


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep_ratio: float = 0.5,
    mass: float | None = None,
    similarity: float = -1.0,
    sink: bool = False,
    smooth_k: bool = True,
    block_q: int = 128,
    block_k: int = 64,
    keep_ratios: Tensor | None = None,
    masses: Tensor | None = None,
    similarities: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    pv_threshold: float | None = None,
    pv_thresholds: Tensor | None = None,
    pv: str = "fp16",
    provider: str = AUTO,
) -> Attention:
    """What `sparge_attention` computes, by the arguments of the op.

    Raises:
        ArgumentError: on wrong shapes, dtypes, strides or thresholds, or an unknown pv.
    """
    check_qkv(ATTENTION, q, k, v)
    check_choice(ATTENTION, "pv", pv, PV)
    how = _selection(
        *(ATTENTION, q),
        keep_ratio=keep_ratio,
        mass=mass,
        similarity=similarity,
        keep_ratios=keep_ratios,
        masses=masses,
        similarities=similarities,
        sink=sink,
        smooth_k=smooth_k,
        block_q=block_q,
        block_k=block_k,
        causal=causal,
    )
    threshold: Threshold | None = None
    if pv_threshold is not None or pv_thresholds is not None:
        threshold = _threshold(
            ATTENTION, q, "pv_threshold", pv_threshold or 0.0, pv_thresholds, (0.0, MAX_PV_THRESHOLD)
        )
    return Attention(how, threshold, pv, default_scale(scale, q.shape[-1]), provider)


def check_block_map(
    q: Tensor,
    k: Tensor,
    *,
    keep_ratio: float = 0.5,
    mass: float | None = None,
    similarity: float = -1.0,
    sink: bool = False,
    smooth_k: bool = True,
    block_q: int = 128,
    block_k: int = 64,
    keep_ratios: Tensor | None = None,
    masses: Tensor | None = None,
    similarities: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,  # noqa: ARG001  (one signature for the op's kernels)
) -> Selection:
    """What chooses the blocks in `sparge_block_map`, by the arguments of the op.

    Raises:
        ArgumentError: on wrong shapes, dtypes, strides or thresholds.
    """
    check_qkv(BLOCK_MAP, q, k, k)
    return _selection(
        *(BLOCK_MAP, q),
        keep_ratio=keep_ratio,
        mass=mass,
        similarity=similarity,
        keep_ratios=keep_ratios,
        masses=masses,
        similarities=similarities,
        sink=sink,
        smooth_k=smooth_k,
        block_q=block_q,
        block_k=block_k,
        causal=causal,
    )


def _selection(
    op: str,
    q: Tensor,
    *,
    keep_ratio: float,
    mass: float | None,
    similarity: float,
    keep_ratios: Tensor | None,
    masses: Tensor | None,
    similarities: Tensor | None,
    **rest: Any,
) -> Selection:
    """The Selection that the arguments of SELECTION but the scale stand for.

    Raises:
        ArgumentError: on a block below 1, a number out of range, a tensor that is not fp32 () or (Hq,) on q's device.
    """
    for name in ("block_q", "block_k"):
        if rest[name] < 1:
            raise ArgumentError(op, name, "be at least 1", rest[name])
    kept_mass: Threshold | None = None
    if mass is not None or masses is not None:
        kept_mass = _threshold(op, q, "mass", mass or 0.0, masses, (0.0, 1.0))
    return Selection(
        keep_ratio=_threshold(op, q, "keep_ratio", keep_ratio, keep_ratios, (0.0, 1.0)),
        mass=kept_mass,
        similarity=_threshold(op, q, "similarity", similarity, similarities, (-1.0, 1.0)),
        **rest,
    )


def _threshold(
    op: str, q: Tensor, name: str, number: float, tensor: Tensor | None, limits: tuple[float, float]
) -> Threshold:
    """The tensor if there is one, else the number.

    Raises:
        ArgumentError: on a number out of range, or a tensor that is not fp32 () or (Hq,) on q's device.
    """
    if tensor is None:
        if not limits[0] <= number <= limits[1]:
            raise ArgumentError(op, name, f"be in {limits[0]:g} ... {limits[1]:g}", number)
        return number
    check_per_head(op, _TENSORS[name], tensor, q)
    return tensor
