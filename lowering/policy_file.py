"""Policies as plain tables, and those as TOML or JSON text.

One closed schema serves Python dictionaries and both formats: `version`, `name` and `rules`, a list of tables whose
keys are the fields of `Rule`. An unknown key is an error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..attn_ops.errors import PolicyError, nearest
from .rule import Rule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIXES = (".toml", ".json")

_KEYS = ("version", "name", "rules")
_RULE_KEYS = tuple(field.name for field in fields(Rule))


def read_table(path: Path) -> object:
    """The content of a .toml or .json file.

    Raises:
        PolicyError: if the file cannot be read, has another suffix, or is not valid TOML or JSON.
    """
    parse = {".toml": tomllib.loads, ".json": json.loads}[_suffix(path)]
    try:
        table: object = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise PolicyError(f"{path}: not valid {_suffix(path)[1:].upper()}: {error}.") from error
    return table


def write_table(table: Mapping[str, Any], path: Path) -> None:
    """Write a policy's table to a .toml or .json file.

    Raises:
        PolicyError: if the file has another suffix.
    """
    write = {".toml": to_toml, ".json": to_json}[_suffix(path)]
    path.write_text(write(table), encoding="utf-8")


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise PolicyError(f"{path}: a policy file ends in .toml or .json, got {path.suffix!r}. Rename it.")
    return path.suffix


def parse_table(table: object, where: str) -> dict[str, Any]:
    """The arguments of `Policy`, from a table.

    Raises:
        PolicyError: on an unknown key, a wrong type or an impossible rule; the message says where, as "p.toml: rule 2".
    """
    given = _checked_keys(table, _KEYS, where)
    if "rules" not in given:
        raise PolicyError(f"{where}: rules is missing. Write a list of tables, each with at least use.")
    rules = given["rules"]
    if not isinstance(rules, list | tuple):
        raise PolicyError(
            f"{where}: rules must be a list of tables, got {rules!r}. In TOML, begin each with [[rules]]."
        )
    return {**given, "rules": [_parse_rule(rule, f"{where}: rule {number}") for number, rule in enumerate(rules, 1)]}


def _parse_rule(table: object, where: str) -> Rule:
    given = _checked_keys(table, _RULE_KEYS, where)
    if "use" not in given:
        raise PolicyError(f'{where}: use is missing. Write for example use = "flash".')
    try:
        return Rule(**given)
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None


def _checked_keys(table: object, known: Iterable[str], where: str) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise PolicyError(f"{where}: must be a table, got {table!r}. Known keys: {', '.join(known)}.")
    for key in table:
        if key not in known:
            raise PolicyError(f"{where}: unknown key {key!r}. {nearest(str(key), known)}")
    return dict(table)


def to_json(table: Mapping[str, Any]) -> str:
    """JSON text of a policy's table, indented."""
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def to_toml(table: Mapping[str, Any]) -> str:
    """TOML text of a policy's table: its head, then one [[rules]] each."""
    head = "\n".join(_line(key, table[key]) for key in ("version", "name"))
    rules = ["\n".join(["[[rules]]", *(_line(key, value) for key, value in rule.items())]) for rule in table["rules"]]
    return "\n\n".join([head, *(rules or ["rules = []"])]) + "\n"


def _line(key: str, value: object) -> str:
    return f"{key} = {_toml(value)}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON strings are TOML strings, but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(_line(_key(key), item) for key, item in value.items())} }}"
    return repr(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)
