"""steps: where a denoising or training loop is. Rules refer to it, and parameters follow it.

It is a value of the thread or task: nothing is recompiled when it moves within one set of rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Generic, TypeVar

from ..attn_ops.errors import PolicyError
from ..attn_ops.step_range import Step

T = TypeVar("T")

_current: ContextVar[Step | None] = ContextVar("sparseattn_step", default=None)


def current_step() -> Step | None:
    """The step that is set, or None."""
    return _current.get()


def steps(loop: int | Iterable[T], total: int | None = None) -> At | Loop[T]:
    """Say where a loop is, to the compiled models that are called inside it.

        for t in sparseattn.steps(timesteps):       # as many steps as there are timesteps
            latents = step(model(latents, t))

        with sparseattn.steps(i, 50):               # step i of 50, counted from 0
            noise = model(latents, t)

    Call it around a compiled model, not inside one. Blocks nest; the inner one counts.

    Args:
        loop: what to iterate over, or the number of the step, from 0.
        total: number of steps; with an iterable, where it has no length. Without it a rule cannot count from the end.

    Raises:
        PolicyError: if the number of the step is negative, or not below the total.
    """
    if isinstance(loop, bool) or not isinstance(loop, int | Iterable):
        raise PolicyError(f"steps: give the number of a step, or something to iterate over, got {loop!r}.")
    if total is not None and (type(total) is not int or total < 1):
        raise PolicyError(f"steps: total must be an int of at least 1, got {total!r}.")
    if isinstance(loop, int):
        return At(_step(loop, total))
    length = len(loop) if isinstance(loop, Sized) else None
    return Loop(loop, length if total is None else total)


def _step(index: int, total: int | None) -> Step:
    if index < 0 or (total is not None and index >= total):
        within = "at least 0" if total is None else f"0 ... {total - 1}, as there are {total}"
        raise PolicyError(f"steps: the number of a step must be {within}, got {index}.")
    return Step(index, total)


class At:
    """`with` this, the step is set."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._before: list[Step | None] = []

    def __enter__(self) -> Step:
        self._before.append(_current.get())
        _current.set(self._step)
        return self._step

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.set(self._before.pop())


class Loop(Generic[T]):
    """Iterating over this, the step is set in the body of the loop."""

    def __init__(self, items: Iterable[T], total: int | None) -> None:
        self._items, self._total = items, total

    def __iter__(self) -> Iterator[T]:
        before = _current.get()
        try:
            for index, item in enumerate(self._items):
                _current.set(_step(index, self._total))
                yield item
        finally:
            _current.set(before)

    def __len__(self) -> int:
        if self._total is None:
            raise TypeError("steps: the loop has no length.")
        return self._total


def step_callback(total: int) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """The `callback_on_step_end` of a diffusers pipeline that runs `total` denoising steps.

        pipe(prompt, num_inference_steps=50, callback_on_step_end=sparseattn.step_callback(50))

    Making it sets step 0, each call of it the next step, and the last call ends the loop; make one for every call of
    the pipeline.

    Raises:
        PolicyError: if total is not an int of at least 1, or the pipeline takes more steps.
    """
    if type(total) is not int or total < 1:
        raise PolicyError(f"step_callback: total must be an int of at least 1, got {total!r}.")
    before = _current.get()
    _current.set(Step(0, total))

    def on_step_end(_pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        _current.set(before if index == total - 1 else _step(index + 1, total))
        return tensors

    return on_step_end
