"""The file of a SpargeTuning: JSON, with a version. Numbers are written so that reading gives the same fp32 number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..attn_ops.errors import PolicyError, nearest
from .policy_file import read_table
from .sparge_tuning import SpargeSite, SpargeTuning

VERSION = 1

_KEYS = ("version", *(field.name for field in fields(SpargeTuning)))
_SITE_KEYS = tuple(field.name for field in fields(SpargeSite) if field.name != "module")
_REQUIRED = ("mass", "similarity", "sparse")


def save(tuning: SpargeTuning, path: str | os.PathLike[str]) -> None:
    """See `SpargeTuning.save`."""
    place = _json_path(path)
    sites = {site.module: {name: getattr(site, name) for name in _SITE_KEYS} for site in tuning.sites}
    head = {"l1": tuning.l1, "pv_l1": tuning.pv_l1, "note": tuning.note, "params": dict(tuning.params)}
    text = json.dumps({"version": VERSION, **head, "sites": sites}, indent=1, allow_nan=False)
    part = place.with_name(f"{place.name}.part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, place)


def load(path: str | os.PathLike[str]) -> SpargeTuning:
    """See `SpargeTuning.load`."""
    place = _json_path(path)
    table = read_table(place)
    try:
        return _parse(table)
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None


def _json_path(path: str | os.PathLike[str]) -> Path:
    if Path(path).suffix != ".json":
        raise PolicyError(f"{path}: a sparge tuning is a .json file, got {Path(path).suffix!r}. Rename it.")
    return Path(path)


def _parse(table: object) -> SpargeTuning:
    if isinstance(table, Mapping) and table.get("version") != VERSION:  # first: another version has other keys
        raise PolicyError(
            f"version must be {VERSION}, the only one that this release reads, got {table.get('version')!r}. "
            "Tune again, or use the release that wrote it."
        )
    given = _checked(table, _KEYS, "sparge tuning", ("version", "sites"))
    del given["version"]
    for name in ("l1", "pv_l1"):
        if given.get(name) is not None and type(given[name]) not in (int, float):
            raise PolicyError(f"{name} must be a number or null, got {given[name]!r}.")
    if not isinstance(given.get("note", ""), str):
        raise PolicyError(f"note must be a str, got {given['note']!r}.")
    if not isinstance(given["sites"], Mapping):
        raise PolicyError(f"sites must be a table of modules, got {given['sites']!r}.")
    sites = [
        SpargeSite(module, **_checked(site, _SITE_KEYS, f"site {module}", _REQUIRED))
        for module, site in given.pop("sites").items()
    ]
    return SpargeTuning(sites, **given)


def _checked(table: object, known: Iterable[str], where: str, required: Iterable[str]) -> dict[str, Any]:
    """The table, with known keys and those that must be there."""
    if not isinstance(table, Mapping):
        raise PolicyError(f"{where} must be a table, got {table!r}.")
    for key in table:
        if key not in known:
            raise PolicyError(f"{where}: unknown key {key!r}. {nearest(key, known)}")
    for key in required:
        if key not in table:
            raise PolicyError(f"{where}: {key} is missing.")
    return dict(table)
