"""The device of a suite: whether there is one, its clock, and dense attention on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.clock import Clock, CudaClock, HostClock
from harness.contest import Call, Prepare

_BASELINES = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def why_not() -> str:
    """Why the GPU suites cannot run here."""
    return "" if torch.cuda.is_available() else "needs a CUDA device"


def clock_of(device: str) -> Clock:
    """The clock of a device."""
    return CudaClock() if device == "cuda" else HostClock()


def baselines(device: str, run: Callable[[Callable[..., Tensor]], Call]) -> dict[str, Prepare]:
    """Torch's fused kernels; `run` makes of an attention function the call that is timed."""
    if device != "cuda":
        return {"SDPA": lambda: run(torch.nn.functional.scaled_dot_product_attention)}
    return {name: lambda backend=backend: run(_restricted(backend)) for name, backend in _BASELINES.items()}


def _restricted(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return attend
