"""Find the kernel that a provider's name stands for, at the moment an op runs.

A rewritten graph names its provider; a direct call may say "auto", which takes the first provider of the spec that can
serve the call on this device. The choice depends on shapes and device only and is cached.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .call import AttentionCall, Kind, Params, ParamValue
from .capability import Capability
from .errors import GradientError, UnsupportedError
from .registry import backend
from .spec import BackendSpec, Kernel, Provider
from .video_layout import VideoLayout

AUTO = "auto"


def forward_kernel(
    name: str,
    provider: str,
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    layout: VideoLayout | None = None,
    **params: ParamValue,
) -> Kernel:
    """The forward kernel of a backend for these tensors and parameters.

    Raises:
        ArgumentError: if the backend has no provider of that name.
        UnsupportedError: if the provider, or with "auto" every provider, has a reason not to serve the call.
    """
    shapes = q.device, q.dtype, q.shape, k.shape
    return _choose(name, provider, False, *shapes, causal, window, scale, layout, tuple(params.items()))


def backward_kernel(
    name: str,
    provider: str,
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    layout: VideoLayout | None = None,
    **params: ParamValue,
) -> Kernel:
    """The backward kernel of a backend for these tensors and parameters.

    Raises:
        GradientError: if a provider is named that has no backward kernel.
        UnsupportedError: as for the forward.
    """
    shapes = q.device, q.dtype, q.shape, k.shape
    return _choose(name, provider, True, *shapes, causal, window, None, layout, tuple(params.items()))


def forget_choices() -> None:
    """Drop the cached choices and capabilities, after a package was installed or a test changed the machine."""
    _choose.cache_clear()
    from . import capability

    capability._read.cache_clear()


@functools.lru_cache(maxsize=4096)
def _choose(
    name: str,
    provider: str,
    backward: bool,
    device: torch.device,
    dtype: torch.dtype,
    q_shape: torch.Size,
    k_shape: torch.Size,
    causal: bool,
    window: int | None,
    scale: float | None,
    layout: VideoLayout | None,
    params: Params,
) -> Kernel:
    spec = backend(name)
    kind: Kind = "self" if q_shape[2] == k_shape[2] else "cross"
    call = AttentionCall(
        *(q_shape[0], q_shape[1], k_shape[1], q_shape[2], k_shape[2], q_shape[3], dtype, device.type),
        causal=causal,
        window=window,
        scale=scale,
        needs_grad=backward,
        kind=kind,
        layout=layout,
        params=params,
    )
    capability = Capability.current(device)
    chosen = _automatic(spec, call, capability) if provider == AUTO else _named(spec, provider, call, capability)
    if not backward:
        return chosen.load()
    if chosen.load_backward is None:
        raise GradientError(
            f'{spec.op}: provider "{chosen.name}" has no backward kernel. Use provider="auto" to train.'
        )
    return chosen.load_backward()


def _automatic(spec: BackendSpec, call: AttentionCall, capability: Capability) -> Provider:
    rejected = {}
    for provider in spec.providers:
        named = [provider.only_if_named] if provider.only_if_named else []
        reasons = [*named, *provider.reasons(call, capability)]
        if not reasons:
            return provider
        rejected[provider.name] = reasons
    raise UnsupportedError(_table(spec, call, capability, rejected))


def _named(spec: BackendSpec, name: str, call: AttentionCall, capability: Capability) -> Provider:
    provider = spec.provider(name)
    if call.needs_grad and provider.load_backward is None:
        return provider
    if reasons := provider.reasons(call, capability):
        raise UnsupportedError(_table(spec, call, capability, {name: reasons}))
    return provider


def _table(spec: BackendSpec, call: AttentionCall, capability: Capability, rejected: dict[str, list[str]]) -> str:
    rows = [f"  {name}: {'; '.join(reasons)}" for name, reasons in rejected.items()]
    return "\n".join([f"{spec.op}: no provider can serve {call} on {capability}:", *rows])
