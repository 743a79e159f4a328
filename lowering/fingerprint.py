"""A fingerprint of a model's structure, to recognise the model that a policy was measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from torch import nn

from ..nn.attached import Attached

_COMPILED = "_orig_mod"
"""Where the wrapper that torch.compile puts around a module keeps it."""


def fingerprint(model: nn.Module) -> str:
    """Twelve hexadecimal digits of a model's structure: module paths and types, and its parameters' shapes and dtypes.

    Values, buffers and devices do not count. What `torch.compile` wraps around a model or a part of it does not count
    either, nor what `sparseattn.convert` added: a policy that was measured before is recognised after. A model that is
    cast to another dtype is another model: its errors and its speed are others.

    Args:
        model: a module, compiled or not.
    """
    lines = "\n".join(_lines(model))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def _lines(model: nn.Module) -> Iterator[str]:
    added: set[nn.Module] = {module for module in model.modules() if isinstance(module, Attached)}
    for path, module in model.named_modules(memo=added):
        if _COMPILED in module._modules:
            continue
        place = ".".join(part for part in path.split(".") if part != _COMPILED)
        yield f"{place}: {type(module).__name__}"
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{place}.{name}: {tuple(parameter.shape)} {parameter.dtype}"
