"""Import an optional package, or say how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType

from harness.contest import MissingError


def needed(module: str, install: str) -> ModuleType:
    """The module.

    Raises:
        MissingError: if it cannot be imported; it says why and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(f"{error}; {install}") from None
