"""Param: one parameter that a rule may set, and the check of what a user wrote for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from .call import ParamValue
from .errors import PolicyError


@dataclass(frozen=True)
class Param:
    """One typed parameter of a backend, with its range. Its name and default are those of the op's schema.

    Args:
        name: its name.
        default: its default; a tuple of int means a list of that many, nested lists being flattened.
        doc: one sentence.
        low: least value, of every entry in a list.
        high: largest value, likewise.
        choices: the values it may have; empty means any.
        kind: its type where the default is None.
        repeats: a list may be given once for all heads, or once per head.
    """

    name: str
    default: ParamValue
    doc: str
    low: float | None = None
    high: float | None = None
    choices: tuple[ParamValue, ...] = ()
    kind: type | None = None
    repeats: bool = False

    def check(self, value: object, where: str) -> ParamValue:
        """The value, converted to the parameter's type.

        Raises:
            PolicyError: if it has another type or is out of range; the message says where.
        """
        checked = self._list(value, where) if isinstance(self.default, tuple) else self._single(value, where)
        if self.choices and checked not in self.choices:
            raise PolicyError(f"{where}: {self.name} must be one of {self.choices}, got {value!r}.")
        for number in checked if isinstance(checked, tuple) else (checked,):
            below = self.low is not None and isinstance(number, int | float) and number < self.low
            above = self.high is not None and isinstance(number, int | float) and number > self.high
            if below or above:
                limits = f"in [{self.low}, {self.high}]"
                raise PolicyError(f"{where}: {self.name} must be {limits}, got {value!r}. {self.doc}")
        return checked

    def _single(self, value: object, where: str) -> ParamValue:
        expected = self.kind or type(self.default)
        if expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected:
            raise PolicyError(f"{where}: {self.name} must be {expected.__name__}, got {value!r}. {self.doc}")
        return cast(ParamValue, value)

    def _list(self, value: object, where: str) -> tuple[int, ...]:
        entries = tuple(_flattened(value))
        wanted = len(self.default) if isinstance(self.default, tuple) else 0
        fits = entries and (len(entries) % wanted == 0 if self.repeats else len(entries) == wanted)
        if not fits or not all(type(entry) is int for entry in entries):
            more = f"{wanted} int, or {wanted} for every head" if self.repeats else f"{wanted} int"
            raise PolicyError(f"{where}: {self.name} must be a list of {more}, got {value!r}. {self.doc}")
        return entries


def _flattened(value: object) -> Iterator[Any]:
    """The entries of nested lists, in order; what is no list is one entry."""
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _flattened(entry)
    else:
        yield value
