"""Schedule: a number that follows the steps of a loop, as a value of a rule's parameter.

It reaches the op as a tensor, so that one compiled graph serves every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import PolicyError, nearest
from .step_range import Step, StepRange

Number = float | tuple[float, ...]
"""One number for all heads, or one for each."""

_GIVEN = {
    "table": ("values",),
    "linear": ("start", "end", "steps"),
    "cosine": ("start", "end", "steps"),
    "staircase": ("start", "end", "by", "every"),
}
"""Kind -> what it is written with, besides the kind."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A number for every step.

    Args:
        kind: "table", one value for each step;
            "linear" or "cosine", from `start` in the first of `steps` to `end` in the last, level before and after;
            "staircase", from `start` towards `end` `by` so much in every `every` steps, and then level.
        values: of a table: a number for each step, or a list with one for each head; if some steps have lists, all do.
        start: the first value.
        end: the last value.
        steps: where a line or cosine moves, such as "5:" or "0.1:0.5".
        by: height of a stair, above 0.
        every: steps of a stair, at least 1.

    Raises:
        PolicyError: on an unknown kind, a field that the kind has not, lacks, or of a wrong type or value.
    """

    kind: str
    values: tuple[Number, ...] = ()
    start: float | None = None
    end: float | None = None
    steps: str = ":"
    by: float | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _GIVEN:
            raise PolicyError(f"schedule: unknown kind {self.kind!r}. {nearest(str(self.kind), _GIVEN)}")
        object.__setattr__(self, "values", _alike(tuple(map(_number, self.values))))
        for field in fields(self)[1:]:
            value, taken = getattr(self, field.name), field.name in _GIVEN[self.kind]
            if not taken and value != field.default:
                raise PolicyError(f"schedule: a {self.kind} has no {field.name}. It has {_listed(self.kind)}.")
            if taken and value in (None, ()):
                raise PolicyError(f"schedule: a {self.kind} needs {field.name}. It has {_listed(self.kind)}.")
            if field.name in ("start", "end", "by") and value is not None:
                object.__setattr__(self, field.name, _finite(value))
        if self.by is not None and self.by <= 0:
            raise PolicyError(f"schedule: by must be above 0, got {self.by!r}. The sign is that of end - start.")
        if type(self.every) is not int or self.every < 1:
            raise PolicyError(f"schedule: every must be an int of at least 1, got {self.every!r}.")
        StepRange.parse(self.steps)

    @classmethod
    def parse(cls, table: Mapping[str, object]) -> Schedule:
        """The schedule that a table of a policy file writes: kind and its fields.

        Raises:
            PolicyError: on an unknown key, or as the constructor does.
        """
        known = [field.name for field in fields(cls)]
        for key in table:
            if key not in known:
                raise PolicyError(f"schedule: unknown key {key!r}. {nearest(str(key), known)}")
        if "kind" not in table:
            raise PolicyError(f"schedule: kind is missing. Known: {', '.join(_GIVEN)}.")
        given: dict[str, Any] = dict(table)
        if "values" in given and not isinstance(given["values"], list | tuple):
            raise PolicyError(f"schedule: values must be a list, got {given['values']!r}.")
        return cls(**given)

    @property
    def extremes(self) -> tuple[Number, ...]:
        """Values between which all others lie."""
        if self.kind == "table":
            return self.values
        return tuple(value for value in (self.start, self.end) if value is not None)

    def at(self, step: Step | None, name: str) -> Number:
        """The value at a step, for the parameter `name`.

        Raises:
            PolicyError: if there is no step, or it is outside the schedule.
        """
        if step is None:
            raise PolicyError(
                f"{name} follows the steps ({self}), and no step is set. "
                "Call the model inside sparseattn.steps(i, n), or in `for t in sparseattn.steps(timesteps)`."
            )
        if self.kind == "table":
            if step.index >= len(self.values):
                raise PolicyError(f"{name}: the table ends after {len(self.values)} steps, this is {step}.")
            return self.values[step.index]
        assert self.start is not None
        assert self.end is not None
        if self.by is not None:
            risen = min(step.index // self.every * self.by, abs(self.end - self.start))
            return self.start + math.copysign(risen, self.end - self.start)
        progress = self._progress(step)
        if self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    def _progress(self, step: Step) -> float:
        first, end = StepRange.parse(self.steps).within(step.total)
        if end is None:
            raise PolicyError(f"steps: {self} has no last step. Write sparseattn.steps(i, n), or an end in its steps.")
        return min(max((step.index - first) / max(end - 1 - first, 1), 0.0), 1.0)

    def map(self, change: Callable[[float], float]) -> Schedule:
        """The schedule with every value changed by a linear function of slope 1 or -1."""
        given = {name: getattr(self, name) for name in ("kind", *_GIVEN[self.kind])}
        given |= {name: change(given[name]) for name in ("start", "end") if name in given}
        values = [tuple(map(change, v)) if isinstance(v, tuple) else change(v) for v in self.values]
        return Schedule(**{**given, "values": tuple(values)})

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their default, as values that TOML and JSON know."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if self.values:
            given["values"] = [list(value) if isinstance(value, tuple) else value for value in self.values]
        return given

    def __str__(self) -> str:
        if self.kind == "table":
            return f"a table of {len(self.values)} steps"
        how = f"by {self.by:g} every {self.every}" if self.by is not None else f"over {self.steps}"
        return f"{self.kind} {self.start:g} to {self.end:g} {how}"


def _listed(kind: str) -> str:
    return ", ".join(("kind", *_GIVEN[kind]))


def _alike(values: tuple[Number, ...]) -> tuple[Number, ...]:
    """Values of one shape, that of the tensor in the graph: beside lists, a number is that of every head."""
    heads = {len(value) for value in values if isinstance(value, tuple)}
    if len(heads) > 1:
        counts = " and ".join(map(str, sorted(heads)))
        raise PolicyError(f"schedule: values must have as many numbers at every step, got {counts}.")
    return (
        tuple(value if isinstance(value, tuple) else (value,) * next(iter(heads)) for value in values)
        if heads
        else values
    )


def _number(value: object) -> Number:
    if isinstance(value, list | tuple) and value:
        return tuple(map(_finite, value))
    return _finite(value)


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PolicyError(f"schedule: a value must be a finite number, got {value!r}.")
    return float(value)
