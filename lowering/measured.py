"""Measured: what a policy was measured on, and what came out. A record beside the rules; it decides nothing."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..attn_ops.capability import Capability
from ..attn_ops.errors import PolicyError


@dataclass(frozen=True, slots=True)
class MeasuredRule:
    """What one rule of a policy was measured to do.

    Args:
        rule: its number in the policy, from 1.
        error: what it adds to the error of the output, in the metric of the whole; None if not measured.
        density: fraction of the scores that its sites compute, 0 ... 1; None if not measured.
        site_errors: for every range of steps, by head, the relative L2 error of its sites' own outputs; () if not
            measured.

    Raises:
        PolicyError: if a value has a wrong type or is out of range.
    """

    rule: int
    error: float | None = None
    density: float | None = None
    site_errors: Sequence[Sequence[float]] = ()

    def __post_init__(self) -> None:
        _normalize(self)

    def to_dict(self) -> dict[str, Any]:
        """The values that are set, as a file has them."""
        return _given(self)


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """Something that a calibration tried, between dense attention and the sparsest candidates.

    Args:
        error: error of the model's output, in the metric of the whole.
        density: fraction of the scores that all sites together compute, 0 ... 1; None if not known.
        predicted_speedup: time of the dense model by that with it, as predicted; None if not known.

    Raises:
        PolicyError: if a value has a wrong type or is out of range.
    """

    error: float
    density: float | None = None
    predicted_speedup: float | None = None

    def __post_init__(self) -> None:
        _normalize(self)

    def to_dict(self) -> dict[str, Any]:
        """The values that are set, as a file has them."""
        return _given(self)


@dataclass(frozen=True, slots=True)
class Measured:
    """Where the numbers of a policy come from. Everything may be left out; None is not known.

    Args:
        model: fingerprint of the model, by `sparseattn.fingerprint`.
        policy: `Policy.hash` of the rules that were measured: it tells when they are edited afterwards.
        torch: version of torch.
        sparseattn: version of this package.
        device: the machine, by a name that `Capability.of` knows, "sm90" or "cpu-avx512", or `str(Capability)`.
        date: day of the measurement, as "2026-11-21".
        metric: what `error` and `budget` are, in words: "relative L2 of the output".
        budget: largest error that was allowed.
        error: error of the model's output.
        predicted_speedup: time of the dense model by that with the policy, as predicted from the times of its sites.
        predicted_for: a machine that times were predicted for, by its name; None if they were measured.
        attention_speedup: time of dense attention by that of what the policy puts in its place, all sites together.
        speedup: the same, as measured.
        density: fraction of the scores that all sites together compute, 0 ... 1.
        step_ranges: the ranges of steps that were measured apart, as "0:10".
        points: a MeasuredPoint for each policy that was tried; stored as a tuple.
        rules: a MeasuredRule for each rule that was measured by itself; stored as a tuple.

    Raises:
        PolicyError: if a value has a wrong type or is out of range, or `rules` names a rule twice.
    """

    model: str | None = None
    policy: str | None = None
    torch: str | None = None
    sparseattn: str | None = None
    device: str | None = None
    date: str | None = None
    metric: str | None = None
    budget: float | None = None
    error: float | None = None
    predicted_speedup: float | None = None
    predicted_for: str | None = None
    attention_speedup: float | None = None
    speedup: float | None = None
    density: float | None = None
    step_ranges: Sequence[str] = ()
    points: Sequence[MeasuredPoint] = ()
    rules: Sequence[MeasuredRule] = ()

    def __post_init__(self) -> None:
        _normalize(self)

    def to_dict(self) -> dict[str, Any]:
        """The table [measured] of a policy file: the values that are set."""
        return _given(self)


PARTS: dict[str, type[MeasuredRule | MeasuredPoint]] = {"points": MeasuredPoint, "rules": MeasuredRule}
"""Fields of Measured that are records themselves."""

_Record = Measured | MeasuredRule | MeasuredPoint


def _given(record: _Record) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: _plain(value) for name, value in values.items() if value not in (None, ())}


def _plain(value: Any) -> Any:
    """Records as tables and tuples as lists, as files have them."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.to_dict() if isinstance(value, _Record) else value


def _normalize(record: _Record) -> None:
    """Give every field that is set its normal form."""
    for field in fields(record):
        value = getattr(record, field.name)
        if value == field.default:
            continue
        read, must, example = _FORMS[field.name]
        try:
            object.__setattr__(record, field.name, read(value))
        except (TypeError, ValueError, OverflowError):
            sentence = f"{field.name} must {must}, got {value!r}. Write for example {field.name} = {example}."
            raise PolicyError(sentence) from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _device(value: object) -> str:
    """A machine's name; the products in brackets, as in `str(Capability)`, are left out."""
    name = _text(value).partition(" (")[0]
    Capability.of(name)
    return name


def _date(value: object) -> str:
    """An ISO date, as text or as the date that TOML has."""
    day = value if type(value) is datetime.date else datetime.date.fromisoformat(_text(value))
    if value not in (day, day.isoformat()):  # Python 3.11 reads other forms too
        raise ValueError
    return day.isoformat()


def _number(low: float, high: float = math.inf) -> Callable[[object], float]:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError
        return float(value)

    return read


def _rule_number(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError
    return value


def _list_of(read: Callable[[object], object]) -> Callable[[object], tuple[object, ...]]:
    def read_all(value: object) -> tuple[object, ...]:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(read(item) for item in value)

    return read_all


def _point(value: object) -> MeasuredPoint:
    if not isinstance(value, MeasuredPoint):
        raise TypeError
    return value


def _step_range(value: object) -> str:
    first, _, end = _text(value).partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError
    return f"{int(first)}:{int(end)}"


def _rules(value: object) -> tuple[MeasuredRule, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, MeasuredRule) for item in value):
        raise TypeError
    if len({item.rule for item in value}) < len(value):
        raise ValueError
    return tuple(value)


_ERROR = (_number(0.0), "be a finite number of at least 0", "0.013")
_SPEEDUP = (_number(math.ulp(0.0)), "be a positive number", "1.8")

_FORMS: dict[str, tuple[Callable[[object], object], str, str]] = {
    "model": (_text, "be the model's fingerprint, a str", '"1f0c6f1b2a3d"'),
    "policy": (_text, "be the hash of a policy, a str", '"23fdf8ec745a"'),
    "torch": (_text, "be a version, a str", '"2.13.0"'),
    "sparseattn": (_text, "be a version, a str", '"0.1.0"'),
    "device": (_device, 'be "cpu", "cpu-avx2", "cpu-avx512" or a GPU such as "sm90"', '"sm90"'),
    "date": (_date, "be a day, YYYY-MM-DD", '"2026-11-21"'),
    "metric": (_text, "be a str", '"relative L2 of the output"'),
    "budget": _ERROR,
    "error": _ERROR,
    "predicted_speedup": _SPEEDUP,
    "predicted_for": (_device, 'be "sm80", "sm90" or another machine', '"sm90"'),
    "attention_speedup": _SPEEDUP,
    "speedup": _SPEEDUP,
    "density": (_number(0.0, 1.0), "be a number from 0 to 1", "0.3"),
    "rule": (_rule_number, "be the number of a rule, from 1", "1"),
    "site_errors": (
        _list_of(_list_of(_number(0.0))),
        "list numbers of at least 0 by range of steps and head",
        "[[0.01, 0.02]]",
    ),
    "step_ranges": (_list_of(_step_range), "list ranges of steps", '["0:10", "10:20"]'),
    "points": (_list_of(_point), "list what was tried", "[{ error = 0.01, density = 0.3 }]"),
    "rules": (_rules, "be a list that names each rule once", "[{ rule = 1, error = 0.004, density = 0.3 }]"),
}
"""Field -> how it is read, what it must be, and an example."""
