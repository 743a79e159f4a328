"""SpargeAttn's saved state as a SpargeTuning.

Upstream's module holds is_sparse, cdfthreshd, simthreshd1 and pvthreshd, each (H,), and simthreshd2, which nothing
reads. Its loader finds keys by substring and casts to the dtype of the model; here a key is a whole path, and numbers
become fp32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..attn_ops.blocks.sparge_arguments import MAX_PV_THRESHOLD
from ..attn_ops.call import dtype_name
from ..attn_ops.errors import PolicyError
from .sparge_tuning import SpargeSite, SpargeTuning

_THRESHOLDS = {"cdfthreshd": "mass", "simthreshd1": "similarity", "pvthreshd": "pv_threshold"}
_LIMITS = {
    "is_sparse": (0.0, 1.0),
    "cdfthreshd": (0.0, 1.0),
    "simthreshd1": (-1.0, 1.0),
    "pvthreshd": (0.0, MAX_PV_THRESHOLD),
}
_NAMES = tuple(_LIMITS)
_UNREAD = "simthreshd2"
_INNER = "inner_attention"
_WRAPPER = "_orig_mod"
"""Where what torch.compile puts around a module keeps it."""

State = dict[str, Tensor]


def read_state(
    state_dict: Mapping[str, Tensor], modules: Mapping[str, str] | None, params: Mapping[str, Any]
) -> SpargeTuning:
    """See `SpargeTuning.from_upstream`."""
    by_module: dict[str, tuple[str, State]] = {}
    for path, state in _by_path(state_dict).items():
        module = _module(path, modules)
        if module in by_module:
            raise PolicyError(f"from_upstream: {path} and {by_module[module][0]} both become {module}.")
        by_module[module] = path, state
    states = {module: state for module, (_, state) in by_module.items()}
    return SpargeTuning([_site(*entry) for entry in states.items()], params, note=_note(list(states.values())))


def _by_path(state_dict: Mapping[str, Tensor]) -> dict[str, State]:
    """The tensors of every inner attention, complete and checked."""
    found: dict[str, State] = {}
    for key, value in state_dict.items():
        path, _, name = key.rpartition(".")
        if not path or name not in (*_NAMES, _UNREAD):
            raise PolicyError(
                f"from_upstream: {key} is not of a tuning, whose names end in {', '.join(_NAMES)}. Remove it."
            )
        found.setdefault(path, {})[name] = value
    if not found:
        raise PolicyError("from_upstream: the state dict is empty. Give what extract_sparse_attention_state_dict gave.")
    for path, state in found.items():
        for name in _NAMES:
            if name not in state:
                raise PolicyError(f"from_upstream: {path}.{name} is missing. Save the state of the whole model again.")
            _check(f"{path}.{name}", state[name], state["is_sparse"], _LIMITS[name])
    return found


def _check(key: str, value: object, like: object, limits: tuple[float, float]) -> None:
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    shape = like.shape if isinstance(like, Tensor) else ()
    if not isinstance(value, Tensor) or value.dim() != 1 or value.shape != shape or not len(value):
        raise PolicyError(
            f"from_upstream: {key} must be a tensor with a number for each head, as is_sparse, got {got}."
        )
    numbers = value.double()
    outside = ~((numbers >= limits[0]) & (numbers <= limits[1]))
    if key.endswith("is_sparse"):
        outside |= numbers != numbers.round()
    if outside.any():
        head = int(outside.nonzero()[0])
        wanted = "0 or 1" if key.endswith("is_sparse") else f"in {limits[0]:g} ... {limits[1]:g}"
        raise PolicyError(f"from_upstream: {key} must be {wanted}, got {numbers[head].item()} for head {head}.")


def _module(path: str, modules: Mapping[str, str] | None) -> str:
    """The path of the module that owns the attention here."""
    path = ".".join(part for part in path.split(".") if part != _WRAPPER)
    if modules is None:
        owner, _, last = path.rpartition(".")
        if not owner or last != _INNER:
            raise PolicyError(
                f'from_upstream: {path} is not a module\'s {_INNER}. Give modules, such as {{"{path}": "attn"}}.'
            )
        return owner
    for theirs, ours in modules.items():
        form = re.fullmatch(re.escape(theirs).replace(re.escape("{}"), "([0-9]+)"), path)
        if form and ours.count("{}") == len(form.groups()):
            return ours.format(*form.groups())
    raise PolicyError(
        f"from_upstream: {path} is not among modules {dict(modules)}. Add it; both sides have {{}} for every number."
    )


def _site(module: str, state: State) -> SpargeSite:
    numbers = {ours: state[theirs].float().tolist() for theirs, ours in _THRESHOLDS.items()}
    sparse = [bool(flag) for flag in state["is_sparse"].tolist()]
    return SpargeSite(module, **numbers, sparse=sparse, why="" if any(sparse) else "not sparse in upstream's tuning")


def _note(states: list[State]) -> str:
    """What is lost where the file has thresholds of half precision: upstream's loader casts them to the model's."""
    lost: dict[str, float] = {}
    halves = set()
    for name in _THRESHOLDS:
        for value in (state[name] for state in states):
            if value.dtype.itemsize < torch.float32.itemsize:
                halves.add(dtype_name(value.dtype))
                lost[name] = max(lost.get(name, 0.0), _half_step(value))
    if not lost:
        return ""
    known = ", ".join(f"{name} to {step:.2g}" for name, step in lost.items())
    return f"read from {' and '.join(sorted(halves))}, which rounded {known}; tune again, or import the file as saved"


def _half_step(value: Tensor) -> float:
    """Half the distance between neighbours of the largest number."""
    largest = float(value.double().abs().max())
    return float(torch.finfo(value.dtype).eps / 2 * 2 ** math.floor(math.log2(largest))) if largest else 0.0
