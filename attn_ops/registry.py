"""The registry of backends: a dictionary of names, filled from one file per backend and from entry points.

Nothing here names a backend. Built-in ones are the modules of `attn_ops/backends`; a third party's come with the entry
point group `sparseattn.backends` or with `register`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import pkgutil
from types import ModuleType

from .errors import PolicyError, RegistrationError, nearest
from .spec import BackendSpec

ENTRY_POINTS = "sparseattn.backends"

_log = logging.getLogger(__name__)
_backends: dict[str, BackendSpec] = {}
_discovered = False


def register(spec: BackendSpec) -> BackendSpec:
    """Make a backend known by its name; returns it. Registering the same object again changes nothing.

    Raises:
        RegistrationError: if the name belongs to another backend, or the object is not a BackendSpec.
    """
    if not isinstance(spec, BackendSpec):
        raise RegistrationError(f"register: spec must be a BackendSpec, got {type(spec).__name__}.")
    if _backends.setdefault(spec.name, spec) is not spec:
        raise RegistrationError(f"register: a backend named {spec.name!r} exists already. Choose another name.")
    return spec


def backends() -> dict[str, BackendSpec]:
    """Every known backend by name; entry points are read on the first call."""
    _discover()
    return dict(_backends)


def backend(name: str, where: str = "backend") -> BackendSpec:
    """The backend of that name.

    Raises:
        PolicyError: if there is none; the message begins with `where` and names the nearest.
    """
    _discover()
    if name not in _backends:
        raise PolicyError(f"{where}: unknown backend {name!r}. {nearest(name, _backends)}")
    return _backends[name]


def register_package(package: ModuleType) -> None:
    """Register the BACKEND of every module of a package."""
    for module in pkgutil.iter_modules(package.__path__):
        found = importlib.import_module(f"{package.__name__}.{module.name}")
        register(found.BACKEND)


def _discover() -> None:
    """Read the entry points once. One that fails is logged and left out: it must not break the others."""
    global _discovered
    if _discovered:
        return
    _discovered = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        _load(entry)


def _load(entry: importlib.metadata.EntryPoint) -> None:
    try:
        loaded = entry.load()
        if isinstance(loaded, ModuleType):
            register_package(loaded)
        else:
            register(loaded)
    except Exception:
        _log.exception("entry point %r of group %s could not be loaded; left out", entry.value, ENTRY_POINTS)
