"""OutputError: how far a model's outputs are from those with dense attention, over all samples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Metric = Literal["relative_l1", "relative_l2", "cosine", "rmse", "mse", "psnr"]
"""Cosine is 1 minus it; PSNR, in dB, is of the range of dense attention's outputs, and more is better."""


def floating_leaves(result: Any) -> list[Tensor]:
    """The floating-point tensors in what a model gives."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def tensors_of(result: Any) -> list[Tensor]:
    """Copies of them on the CPU."""
    return [leaf.detach().to("cpu", copy=True) for leaf in floating_leaves(result)]


def within(error: float, metric: Metric, budget: float) -> bool:
    """Whether an error is no worse than a budget."""
    return error >= budget if metric == "psnr" else error <= budget


def no_error(metric: Metric) -> float:
    """What dense attention has."""
    return math.inf if metric == "psnr" else 0.0


def as_size(error: float, metric: Metric) -> float:
    """A number that is proportional to the size of the differences, whatever the metric; 0 is none."""
    match metric:
        case "psnr":
            return 10 ** (-error / 20)
        case "cosine" | "mse":
            return math.sqrt(max(error, 0.0))
        case _:
            return error


class OutputError:
    """Sums from which the error is read; a NaN or infinity makes it as bad as can be."""

    def __init__(self) -> None:
        self._sums = torch.zeros(7, dtype=torch.float64)
        self._least, self._most = math.inf, -math.inf

    def add(self, ours: list[Tensor], dense: list[Tensor]) -> None:
        """Add one sample's outputs."""
        for a, b in zip(ours, dense, strict=True):
            x, y = a.double(), b.double()
            terms = (x - y).abs(), y.abs(), (x - y).square(), y.square(), x.square(), x * y, torch.ones_like(y)
            self._sums += torch.stack([term.sum() for term in terms])
            if y.numel():
                self._least, self._most = min(self._least, float(y.min())), max(self._most, float(y.max()))

    def in_metric(self, metric: Metric) -> float:
        """The error over all samples that were added."""
        absolute, magnitude, squared, dense, ours, product, entries = self._sums.tolist()
        if not math.isfinite(squared):
            return -math.inf if metric == "psnr" else math.inf
        mean = squared / entries if entries else 0.0
        match metric:
            case "relative_l1":
                return _ratio(absolute, magnitude)
            case "relative_l2":
                return math.sqrt(_ratio(squared, dense))
            case "cosine":
                return 1.0 - product / math.sqrt(ours * dense) if ours * dense > 0 else float(ours != dense)
            case "rmse":
                return math.sqrt(mean)
            case "mse":
                return mean
            case "psnr":
                peak = self._most - self._least
                return math.inf if mean == 0 else 10 * math.log10(peak**2 / mean) if peak else -math.inf


def error_of(results: Iterable[Any], dense: Iterable[list[Tensor]]) -> OutputError:
    """The error of what a model gives, sample by sample, without gradients."""
    error = OutputError()
    with torch.no_grad():
        for result, expected in zip(results, dense, strict=True):
            error.add(tensors_of(result), expected)
    return error


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0
