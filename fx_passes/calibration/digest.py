"""A digest of what a calibration is of: its samples and the model's weights. It tells others apart; it is no seal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .samples import Sample


def digest(model: Callable[..., Any], samples: Iterable[Sample]) -> str:
    """Of the values of every input, the steps, and the parameters and buffers of a module."""
    weights = model.state_dict() if isinstance(model, torch.nn.Module) else {}
    hashed = hashlib.sha256()
    for value in (weights, *((sample.args, dict(sample.kwargs), sample.step) for sample in samples)):
        leaves, structure = tree_flatten(value)
        hashed.update(repr((str(structure), [_leaf(leaf) for leaf in leaves])).encode())
    return hashed.hexdigest()[:16]


def _leaf(value: object) -> object:
    if not isinstance(value, Tensor):
        return value if isinstance(value, bool | int | float | str | None) else type(value).__qualname__
    numbers = (torch.view_as_real(value) if value.is_complex() else value).detach().double()
    return value.dtype, tuple(value.shape), int(torch.hash_tensor(numbers).view(torch.int64)), float(numbers.sum())
