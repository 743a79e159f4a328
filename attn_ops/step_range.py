"""Step and StepRange: where a denoising or training loop is, and a part of such a loop."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from .errors import PolicyError

_FORM = re.compile(r"(?P<start>[^:]*)(?P<colon>:?)(?P<stop>[^:]*)")
_EXAMPLE = 'Write for example steps = "10:", "3:-3", "0.2:0.8" or "-1".'


@dataclass(frozen=True, slots=True)
class Step:
    """Step `index`, counted from 0, of `total`; a total of None is not known."""

    index: int
    total: int | None = None

    def __str__(self) -> str:
        return f"step {self.index}" if self.total is None else f"step {self.index} of {self.total}"


@dataclass(frozen=True, slots=True)
class StepRange:
    """The steps from `start` up to, not including, `stop`, as a Python slice has them.

    An int counts steps, a negative one from the end; a float is a fraction of all steps, rounded half up. `stop=None`
    is the end.
    """

    start: int | float
    stop: int | float | None

    @classmethod
    def parse(cls, text: object) -> StepRange:
        """The range that "10:", ":10", "3:-3", "0.2:0.8" or "7" writes; "7" is one step.

        Raises:
            PolicyError: if it is none of these, or holds no step whatever their number.
        """
        if not isinstance(text, str):
            raise PolicyError(f"steps must be a str, got {text!r}. {_EXAMPLE}")
        return _parse(text)

    def __contains__(self, step: Step) -> bool:
        """Whether the step is in the range.

        Raises:
            PolicyError: if the range counts from the end, or in fractions, and the total is not known.
        """
        first, end = self.within(step.total)
        return first <= step.index and (end is None or step.index < end)

    def within(self, total: int | None) -> tuple[int, int | None]:
        """First step, and the one after the last or None for an open end, of a loop of `total` steps.

        Raises:
            PolicyError: if the range counts from the end, or in fractions, and the total is not known.
        """
        first = _place(self.start, total)
        end = total if self.stop is None else _place(self.stop, total)
        return first, end

    def __str__(self) -> str:
        return f"{self.start or ''}:{'' if self.stop is None else self.stop}"


@functools.cache
def _parse(text: str) -> StepRange:
    form = _FORM.fullmatch(text.replace(" ", ""))
    if form is None or not (form["start"] or form["colon"]):
        raise PolicyError(f"steps must be one range, got {text!r}. {_EXAMPLE}")
    start = _bound(form["start"], text) if form["start"] else 0
    if form["colon"]:
        stop = _bound(form["stop"], text) if form["stop"] else None
    elif isinstance(start, float):
        raise PolicyError(f"steps: one step is an int, got {text!r}. {_EXAMPLE}")
    else:
        stop = None if start == -1 else start + 1
    if stop is not None and type(start) is type(stop) and (start < 0) == (stop < 0) and start >= stop:
        raise PolicyError(f"steps: {text!r} holds no step. {_EXAMPLE}")
    return StepRange(start, stop)


def _bound(word: str, text: str) -> int | float:
    try:
        value = float(word) if "." in word else int(word)
    except ValueError:
        raise PolicyError(f"steps: {word!r} in {text!r} is no number. {_EXAMPLE}") from None
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise PolicyError(f"steps: a fraction must be in 0 ... 1, got {word!r} in {text!r}. {_EXAMPLE}")
    return value


def _place(bound: int | float, total: int | None) -> int:
    if isinstance(bound, int) and bound >= 0:
        return bound
    if total is None:
        what = "a fraction of the steps" if isinstance(bound, float) else "counted from the last step"
        raise PolicyError(f"steps: {bound} is {what}, and their number is not set. Write sparseattn.steps(i, n).")
    return int(bound * total + 0.5) if isinstance(bound, float) else max(total + bound, 0)
