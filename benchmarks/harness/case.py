"""Case: one file of a suite, with the settings of the published figures and those of a smoke test."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .record import Row


@dataclass(frozen=True)
class Case:
    """Something that can be measured.

    Args:
        name: unique; the `case` of its rows.
        run: takes settings and yields rows.
        full: the settings of the published figures, a frozen dataclass.
        quick: settings that take a second or few; the figures mean nothing.
        why_not: why it cannot run here, or nothing.
    """

    name: str
    run: Callable[[Any], Iterator[Row]]
    full: Any
    quick: Any
    why_not: Callable[[], str] = str


def add_flags(parser: argparse.ArgumentParser, settings: Any) -> None:
    """A flag for every field of the settings; a tuple takes several values."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        default = getattr(settings, field.name)
        kind, several = _kind(hints[field.name])
        flag = f"--{field.name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=f"default: {default}")
            continue
        parser.add_argument(
            flag,
            type=kind,
            nargs="+" if several else None,
            help=f"default: {' '.join(map(str, default)) if several else default}",
        )


def with_flags(settings: Any, given: argparse.Namespace) -> Any:
    """The settings, with the flags that were given."""
    names = {field.name for field in dataclasses.fields(settings)}
    changes = {name: value for name, value in vars(given).items() if name in names and value is not None}
    return dataclasses.replace(
        settings, **{name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    )


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of a flag's values, and whether it takes several."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
