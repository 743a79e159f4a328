"""Argument checks shared by the ops: real and fake tensors alike, one sentence per mistake."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import FLOAT_DTYPES, dtype_name
from .errors import ArgumentError

_FLOATS = " or ".join(map(dtype_name, FLOAT_DTYPES))


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check q: (B, Hq, Sq, D) against k and v: (B, Hkv, Sk, D).

    Raises:
        ArgumentError: on wrong rank, dtype, device, shapes, or a last dimension that is not contiguous.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in FLOAT_DTYPES or tensor.dtype != q.dtype:
            raise ArgumentError(op, name, f"be {_FLOATS}, the same for q, k and v", dtype_name(tensor.dtype))
    _check_layout(op, q, k, v)


def check_quantized_qk(op: str, q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor) -> None:
    """Check int8 q: (B, Hq, Sq, D) and k: (B, Hkv, Sk, D), their scales and a float v: (B, Hkv, Sk, D).

    Raises:
        ArgumentError: as `check_qkv`, and unless the scales are fp32, one for each token, without a gradient.
    """
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dtype is not torch.int8:
            raise ArgumentError(op, name, "be int8", dtype_name(tensor.dtype))
    if v.dtype not in FLOAT_DTYPES:
        raise ArgumentError(op, "v", f"be {_FLOATS}", dtype_name(v.dtype))
    _check_layout(op, q, k, v)
    for name, scale, of in (("q_scale", q_scale, q), ("k_scale", k_scale, k)):
        if scale.dtype is not torch.float32:
            raise ArgumentError(op, name, "be float32, whatever v is", dtype_name(scale.dtype))
        if scale.shape != of.shape[:-1]:
            raise ArgumentError(op, name, f"have shape {tuple(of.shape[:-1])}, one per token", tuple(scale.shape))
        if scale.device != q.device:
            raise ArgumentError(op, name, f"be on q's device {q.device}", scale.device)
        _check_no_gradient(op, name, scale)


def _check_layout(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ArgumentError(op, name, "be 4-D, (batch, heads, tokens, head_dim)", tuple(tensor.shape))
        if tensor.device != q.device:
            raise ArgumentError(op, name, f"be on q's device {q.device}", tensor.device)
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ArgumentError(op, name, "have unit stride on head_dim", tensor.stride(), "Call .contiguous() first.")
    if k.shape != v.shape:
        raise ArgumentError(op, "v", f"have k's shape {tuple(k.shape)}", tuple(v.shape))
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ArgumentError(op, "k", f"have q's batch and head_dim {q.shape[0], q.shape[3]}", tuple(k.shape))
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ArgumentError(op, "k", f"have a number of heads that divides q's {q.shape[1]}", k.shape[1])


def check_choice(op: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ArgumentError unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(op, argument, f"be one of {', '.join(choices)}", repr(value))


def check_integers(op: str, argument: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ArgumentError unless `tensor` is int32 on `device`."""
    if tensor.dtype != torch.int32:
        raise ArgumentError(op, argument, "be int32", dtype_name(tensor.dtype), "Convert it with .to(torch.int32).")
    if tensor.device != device:
        raise ArgumentError(op, argument, f"be on q's device {device}", tensor.device)


def check_per_head(op: str, argument: str, tensor: Tensor, q: Tensor) -> None:
    """Raises ArgumentError unless `tensor` is fp32 of shape () or (Hq,) on the device of q: (B, Hq, Sq, D)."""
    if tensor.dtype is not torch.float32:
        raise ArgumentError(op, argument, "be float32, whatever q is", dtype_name(tensor.dtype))
    if tensor.shape not in ((), (q.shape[1],)):
        raise ArgumentError(op, argument, f"have shape () or ({q.shape[1]},), one per head of q", tuple(tensor.shape))
    if tensor.device != q.device:
        raise ArgumentError(op, argument, f"be on q's device {q.device}", tensor.device)
    _check_no_gradient(op, argument, tensor)


def _check_no_gradient(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(op, argument, "not require a gradient, it has none", "one that does", "Pass its .detach().")


def default_scale(scale: float | None, head_dim: int) -> float:
    """`scale`, or head_dim ** -0.5 if it is None."""
    return head_dim**-0.5 if scale is None else scale
