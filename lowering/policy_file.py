"""Policies as plain tables, and those as TOML or JSON text.

One closed schema serves Python dictionaries and both formats: `version`, `name`, `rules`, a list of tables whose keys
are the fields of `Rule`, and `measured`, a table of the fields of `Measured`. An unknown key is an error.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..attn_ops.errors import PolicyError, nearest
from .measured import PARTS, Measured, MeasuredPoint, MeasuredRule
from .rule import Rule
from .rule_fields import wrong

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
"""Version of the schema of rules and files."""

SUFFIXES = (".toml", ".json")

_KEYS = ("version", "name", "rules", "measured")
_RULE_KEYS = tuple(field.name for field in fields(Rule))
_MEASURED_KEYS = tuple(field.name for field in fields(Measured))
_PART_KEYS = {name: tuple(field.name for field in fields(part)) for name, part in PARTS.items()}


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


def check_version(version: object) -> None:
    """Raises PolicyError unless this release reads that version of the schema."""
    if type(version) is int and version > VERSION:
        raise PolicyError(
            f"version must be {VERSION}, the newest that this release reads, got {version}. Update sparseattn."
        )
    if type(version) is not int or version != VERSION:
        raise wrong("version", f"be {VERSION}, the only one this release knows", version)


def parse_table(table: object, where: str) -> dict[str, Any]:
    """The arguments of `Policy`, from a table.

    Raises:
        PolicyError: on a newer version, an unknown key, a wrong type or an impossible rule; the message says where, as
            "p.toml: rule 2".
    """
    if isinstance(table, Mapping) and "version" in table:  # first: a newer version may have other keys
        with _at(where):
            check_version(table["version"])
    given = _checked_keys(table, _KEYS, where)
    if "rules" not in given:
        raise PolicyError(f"{where}: rules is missing. Write a list of tables, each with at least use.")
    given["rules"] = [_parse_rule(rule, place) for rule, place in _numbered(given["rules"], where, "rules")]
    if "measured" in given:
        given["measured"] = _parse_measured(given["measured"], f"{where}: measured")
    return given


def _numbered(items: object, where: str, key: str) -> list[tuple[object, str]]:
    """The items of a list of tables, such as the rules, each with its place."""
    name = key.rpartition(".")[2]
    if not isinstance(items, list | tuple):
        raise PolicyError(
            f"{where}: {name} must be a list of tables, got {items!r}. In TOML, begin each with [[{key}]]."
        )
    return [(item, f"{where}: {name.removesuffix('s')} {number}") for number, item in enumerate(items, 1)]


def _parse_rule(table: object, where: str) -> Rule:
    given = _checked_keys(table, _RULE_KEYS, where)
    if "use" not in given:
        raise PolicyError(f'{where}: use is missing. Write for example use = "flash".')
    with _at(where):
        return Rule(**given)


def _parse_measured(table: object, where: str) -> Measured:
    given = _checked_keys(table, _MEASURED_KEYS, where)
    for name in PARTS.keys() & given.keys():
        entries = _numbered(given[name], where, f"measured.{name}")
        given[name] = [_parse_part(name, entry, place) for entry, place in entries]
    with _at(where):
        return Measured(**given)


def _parse_part(name: str, table: object, where: str) -> MeasuredRule | MeasuredPoint:
    given = _checked_keys(table, _PART_KEYS[name], where)
    first, example = {"rules": ("rule", "the number of the rule"), "points": ("error", "what was measured")}[name]
    if first not in given:
        raise PolicyError(f"{where}: {first} is missing. Write {example}, for example {first} = 1.")
    with _at(where):
        return PARTS[name](**given)


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Put the place in front of an error."""
    try:
        yield
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
    """TOML text of a policy's table: its head, then one [[rules]] each, then what was measured."""
    head = "\n".join(_line(key, table[key]) for key in ("version", "name"))
    rules = [_section("[[rules]]", rule) for rule in table["rules"]]
    return "\n\n".join([head, *(rules or ["rules = []"]), *_measured_sections(table)]) + "\n"


def _measured_sections(table: Mapping[str, Any]) -> list[str]:
    if "measured" not in table:
        return []
    whole = {key: value for key, value in table["measured"].items() if key != "rules"}
    by_rule = table["measured"].get("rules", [])
    return [_section("[measured]", whole), *(_section("[[measured.rules]]", rule) for rule in by_rule)]


def _section(heading: str, table: Mapping[str, Any]) -> str:
    return "\n".join([heading, *(_line(key, value) for key, value in table.items())])


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
