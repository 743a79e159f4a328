"""Param: one parameter that a rule may set, and the check of what a user wrote for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from .call import ParamValue
from .errors import PolicyError
from .schedule import Schedule


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
        tensor: name of the op's argument that takes it as a tensor, () or (Hq,), in its place; "" if there is none.
            With one, it may be a list with a number for each head, or a Schedule over steps. A list of sizes is
            flattened, and its Schedule is a table.
    """

    name: str
    default: ParamValue
    doc: str
    low: float | None = None
    high: float | None = None
    choices: tuple[ParamValue, ...] = ()
    kind: type | None = None
    repeats: bool = False
    tensor: str = ""

    def check(self, value: object, where: str) -> ParamValue:
        """The value, converted to the parameter's type.

        Raises:
            PolicyError: if it has another type or is out of range; the message says where.
        """
        checked = self._normal(value, where)
        if self.choices and checked not in self.choices:
            raise PolicyError(f"{where}: {self.name} must be one of {self.choices}, got {value!r}.")
        for number in numbers(checked):
            below = self.low is not None and isinstance(number, int | float) and number < self.low
            above = self.high is not None and isinstance(number, int | float) and number > self.high
            if below or above:
                limits = f"in [{self.low}, {self.high}]"
                raise PolicyError(f"{where}: {self.name} must be {limits}, got {value!r}. {self.doc}")
        return checked

    def _normal(self, value: object, where: str) -> ParamValue:
        if isinstance(self.default, tuple):
            follows = self.tensor and isinstance(value, Schedule | Mapping)
            return self._lists(self._schedule(value, where), where) if follows else self._list(value, where)
        if isinstance(value, Schedule | Mapping | list | tuple):
            return self._varying(value, where)
        return self._single(value, where)

    def _varying(self, value: Schedule | Mapping[str, object] | list[Any] | tuple[Any, ...], where: str) -> ParamValue:
        """A Schedule, or a number for each head."""
        if not self.tensor:
            wanted = (self.kind or type(self.default)).__name__
            raise PolicyError(f"{where}: {self.name} must be one {wanted} for all heads and steps, got {value!r}.")
        if isinstance(value, list | tuple):
            if value and all(type(entry) in (int, float) and math.isfinite(entry) for entry in value):
                return tuple(map(float, value))
            raise PolicyError(f"{where}: {self.name} must be a list of numbers, one for each head, got {value!r}.")
        return self._schedule(value, where)

    def _schedule(self, value: Any, where: str) -> Schedule:
        try:
            return value if isinstance(value, Schedule) else Schedule.parse(value)
        except PolicyError as error:
            raise PolicyError(f"{where}: {self.name}: {error}") from None

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

    def _lists(self, schedule: Schedule, where: str) -> Schedule:
        """A table that has such a list for every step."""
        steps = [entry if isinstance(entry, tuple) else (entry,) for entry in schedule.extremes]
        for entry in steps:
            self._list([int(number) if number.is_integer() else number for number in entry], where)
        return schedule


def varies(value: object) -> TypeGuard[Schedule | tuple[float, ...]]:
    """Whether a checked value follows the steps or differs by head; a list of sizes is of int."""
    return isinstance(value, Schedule) or (isinstance(value, tuple) and isinstance(value[0], float))


def numbers(value: ParamValue) -> tuple[Any, ...]:
    """The numbers of a value: itself, those of all heads, or those between which a schedule stays."""
    return tuple(_flattened(value.extremes if isinstance(value, Schedule) else value))


def _flattened(value: object) -> Iterator[Any]:
    """The entries of nested lists, in order; what is no list is one entry."""
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _flattened(entry)
    else:
        yield value
