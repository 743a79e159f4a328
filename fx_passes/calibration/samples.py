"""The samples of a calibration: calls of the model, and where in its loop each is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...attn_ops.errors import PolicyError
from ...attn_ops.step_range import Step
from ...lowering.steps import At, current_step
from .rules import Bucket


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of the model.

    Args:
        args: its positional inputs.
        kwargs: its keyword inputs.
        step: the step of the loop around the model, from 0; None outside a loop.
    """

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None

    @classmethod
    def of(cls, given: object) -> Sample:
        """A sample from a tuple of arguments, a dict of keyword arguments, or a Sample."""
        if isinstance(given, Sample):
            return given
        if isinstance(given, Mapping):
            return cls(kwargs=dict(given))
        if isinstance(given, tuple | list):
            return cls(tuple(given))
        raise PolicyError(
            f"calibrate: a sample is a tuple of arguments, a dict of keyword arguments or a Sample, got {type(given)}."
        )


class Samples:
    """All samples, and the ranges that their steps are shared among.

    Args:
        calls: the samples.
        total: length of the loop; None where no sample names a step.
        buckets: the ranges of steps; None likewise.
    """

    def __init__(self, calls: list[Sample], total: int | None, buckets: list[Bucket] | None) -> None:
        self._calls, self._total, self.buckets = calls, total, buckets

    @classmethod
    def of(cls, samples: Iterable[Any], total: int | None, buckets: int) -> Samples:
        """Check and count what was given.

        Raises:
            PolicyError: without a sample; if some name a step and some do not; if a step is outside the loop; if a
                range of steps has no sample.
        """
        calls = [Sample.of(given) for given in samples]
        if not calls:
            raise PolicyError("calibrate: no samples. Give at least one tuple of the model's inputs.")
        named = [call.step for call in calls if call.step is not None]
        if not named:
            if total is not None or buckets != 1:
                raise PolicyError("calibrate: total_steps and buckets are for samples that name their step.")
            return cls(calls, None, None)
        if len(named) < len(calls) or total is None:
            raise PolicyError(
                "calibrate: where samples name a step, all must, and total_steps says how many there are."
            )
        if not 1 <= buckets <= total:
            raise PolicyError(
                f"calibrate: buckets must be in 1 ... {total}, as there are so many steps, got {buckets}."
            )
        if outside := [step for step in named if not 0 <= step < total]:
            raise PolicyError(f"calibrate: step {outside[0]} is not in 0 ... {total - 1}.")
        ranges = [(total * i // buckets, total * (i + 1) // buckets) for i in range(buckets)]
        if empty := [one for one in ranges if not any(one[0] <= step < one[1] for step in named)]:
            raise PolicyError(f"calibrate: no sample has a step in {empty[0][0]} ... {empty[0][1] - 1}.")
        return cls(calls, total, ranges)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def run(self, model: Callable[..., Any], first: int = 0) -> Iterator[Any]:
        """What the model gives for each sample from number `first` on, at its step."""
        for call in self._calls[first:]:
            with contextlib.nullcontext() if call.step is None else At(Step(call.step, self._total)):
                result = model(*call.args, **call.kwargs)
            yield result

    def bucket(self) -> int:
        """The number of the range that the current step is in; 0 where there are none."""
        step = current_step()
        return self._bucket(None if step is None else step.index)

    def bucket_of_each(self) -> list[int]:
        """The number of every sample's range."""
        return [self._bucket(call.step) for call in self._calls]

    def _bucket(self, step: int | None) -> int:
        if self.buckets is None or step is None:
            return 0
        return next(i for i, (first, end) in enumerate(self.buckets) if first <= step < end)
