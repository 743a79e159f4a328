"""Floating-point operations of attention, and torch.mm's rate to compare with.

Counted are the matrix products: two in the forward, five in the backward; softmax, selection and quantization are not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .record import Timing

PRODUCTS = {"forward": 2, "backward": 5, "forward and backward": 7}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATMUL = "torch.mm"
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def dense_flops(batch: int, heads: int, seq: int, dim: int, direction: str = "forward") -> float:
    """Operations of dense attention."""
    return 2.0 * PRODUCTS[direction] * batch * heads * seq**2 * dim


def rates(
    flops: float, density: float, time: Timing, matmul: Timing | None = None, device: str = "cpu"
) -> dict[str, float]:
    """FLOP/s: executed; those that dense attention would have needed for the time; and torch.mm's."""
    per_second = flops / (1e-3 * time.ms)
    found = {"executed": density * per_second, "dense_equivalent": per_second}
    if matmul is not None:
        found[MATMUL] = 2.0 * _MATMUL_SIZE[device] ** 3 / (1e-3 * matmul.ms)
    return found


def matmul(dtype: torch.dtype, device: str = "cpu") -> Callable[[], object]:
    """A product of two square matrices, to take turns with what is measured."""
    size = _MATMUL_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b)
