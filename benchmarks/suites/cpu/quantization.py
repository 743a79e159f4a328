"""What each rounding costs: relative L1 error and cosine similarity to fp64 attention, on two kinds of inputs.

The op's reference provider computes every row, so the figures are those of the definition and the same on every
machine, up to the last digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseattn import ops

from harness.case import Case
from harness.error import distance
from harness.inputs import normal
from harness.record import Row

NAME = "quantization"

INT8: dict[str, Any] = {"bits": 8, "granularity": "per_thread"}
INT4: dict[str, Any] = {"bits": 4, "granularity": "per_thread"}
FP4: dict[str, Any] = {"op": ops.sage_fp4_attention}
SETTINGS: dict[str, dict[str, Any]] = {
    "INT8 per_block": {**INT8, "granularity": "per_block"},
    "INT8 per_warp": {**INT8, "granularity": "per_warp"},
    "INT8 per_thread (the default)": INT8,
    "INT8 per_thread, smooth_q": {**INT8, "smooth_q": True},
    "INT8 per_thread, smooth_k=False": {**INT8, "smooth_k": False},
    "INT8 per_thread, smooth_k=False, asymmetric": {**INT8, "smooth_k": False, "asymmetric": True},
    "INT4 per_block": {**INT4, "granularity": "per_block"},
    "INT4 per_warp": {**INT4, "granularity": "per_warp"},
    "INT4 per_thread": INT4,
    "INT4 per_block, smooth_q": {**INT4, "granularity": "per_block", "smooth_q": True},
    "INT4 per_warp, smooth_q": {**INT4, "granularity": "per_warp", "smooth_q": True},
    "INT4 per_thread, smooth_q": {**INT4, "smooth_q": True},
    "INT4 per_thread, asymmetric": {**INT4, "asymmetric": True},
    "INT4 per_thread, smooth_q, asymmetric": {**INT4, "smooth_q": True, "asymmetric": True},
    'INT8 per_thread, pv="fp8"': {**INT8, "pv": "fp8"},
    'INT8 per_thread, pv="fp8", smooth_v': {**INT8, "pv": "fp8", "smooth_v": True},
    'INT4 per_thread, smooth_q, pv="fp8", smooth_v': {**INT4, "smooth_q": True, "pv": "fp8", "smooth_v": True},
    "FP4 (NVFP4, emulated)": FP4,
    "FP4, smooth_q=False": {**FP4, "smooth_q": False},
    "FP4, two_level=False": {**FP4, "two_level": False},
}


def structured(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with what trained models have.

    Neighbours are alike: a random walk along the tokens, of variance 1, is the same in q and k, so that a token looks
    at those near it; v has one of its own. To it comes noise of the same size. Tokens differ in size: q and k are
    multiplied by exp(0.3 * normal) per token. Channel outliers, a vector per head that all tokens share: +-6 in 4
    channels of q, +-12 in 4 of k, drawn for each. A channel of v has a mean, normal with variance 1.
    """
    place, content = walk(shape), walk(shape)
    q, k = ((place + torch.randn(shape)) * (0.3 * torch.randn(*shape[:3], 1)).exp() for _ in range(2))
    v = content + torch.randn(shape) + torch.randn_like(content[:, :, :1])
    return q + outliers(shape, 6.0), k + outliers(shape, 12.0), v


def walk(shape: tuple[int, ...]) -> Tensor:
    """(B, H, S, D): a random walk along the tokens in every channel, with mean 0 and variance 1."""
    steps = torch.randn(shape).cumsum(dim=-2)
    return (steps - steps.mean(dim=-2, keepdim=True)) / steps.std(dim=-2, keepdim=True)


def outliers(shape: tuple[int, ...], size: float) -> Tensor:
    """(B, H, 1, D): +-size in 4 channels of every head, 0 elsewhere."""
    channels = torch.rand(*shape[:2], 1, shape[3]).argsort(dim=-1) < 4
    return size * channels * torch.randn(*shape[:2], 1, shape[3]).sign()


@dataclass(frozen=True)
class Settings:
    """B, H, S and D."""

    shape: tuple[int, ...] = (1, 4, 1024, 128)


def run(settings: Settings) -> Iterator[Row]:
    """A row for every rounding and kind of inputs."""
    torch.manual_seed(0)
    batch, heads, seq, dim = settings.shape
    shape = batch, heads, seq, dim
    inputs = {"normal": normal(shape, torch.float32), "structured": structured(shape)}
    exact = {
        kind: torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in qkv))
        for kind, qkv in inputs.items()
    }
    sizes = dict(zip(("batch", "heads", "seq", "dim"), shape, strict=True))
    for name, setting in SETTINGS.items():
        options = {option: value for option, value in setting.items() if option != "op"}
        for kind, qkv in inputs.items():
            out = setting.get("op", ops.sage_attention)(*qkv, provider="reference", **options)[0]
            yield Row(NAME, name, {**sizes, "inputs": kind}, error=distance(out, exact[kind], to="fp64"))


CASE = Case(NAME, run, Settings(), Settings((1, 1, 128, 32)))
