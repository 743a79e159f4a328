"""OutputError: how far a model's outputs are from those with dense attention, over all samples."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Metric = Literal["relative_l1", "relative_l2", "cosine"]


def tensors_of(result: Any) -> list[Tensor]:
    """The floating-point tensors in what a model gives, on the CPU."""
    leaves = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return [leaf.detach().to("cpu", copy=True) for leaf in leaves]


class OutputError:
    """Sums from which the error is read; a NaN or infinity makes it infinite."""

    def __init__(self) -> None:
        self._sums = torch.zeros(6, dtype=torch.float64)

    def add(self, ours: list[Tensor], dense: list[Tensor]) -> None:
        """Add one sample's outputs."""
        for a, b in zip(ours, dense, strict=True):
            x, y = a.double(), b.double()
            terms = (x - y).abs(), y.abs(), (x - y).square(), y.square(), x.square(), x * y
            self._sums += torch.stack([term.sum() for term in terms])

    def in_metric(self, metric: Metric) -> float:
        """The error over all samples that were added."""
        absolute, magnitude, squared, dense, ours, product = self._sums.tolist()
        if metric == "relative_l1":
            error = _ratio(absolute, magnitude)
        elif metric == "relative_l2":
            error = math.sqrt(_ratio(squared, dense)) if squared >= 0 else math.inf
        else:
            error = 1.0 - product / math.sqrt(ours * dense) if ours * dense > 0 else float(ours != dense)
        return error if math.isfinite(error) else math.inf


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0
