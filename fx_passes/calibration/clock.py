"""Clocks: what one run of attention costs, in seconds: measured here, predicted for another machine, or not at all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attn_ops.call import AttentionCall
from ...attn_ops.capability import Capability
from ...lowering.cost_model import predicted_seconds
from .candidates import Candidate
from .ledger import DENSE

Run = Callable[[], Tensor]
Clock = Callable[[int, Run], tuple[Tensor, float]]
"""Runs a candidate, by its number or DENSE; gives what came out and the seconds."""

_REPEATS = 3


def timed(_number: int, run: Run) -> tuple[Tensor, float]:
    """The least of a few times; the first run, which may compile a kernel, is not one."""
    out = run()
    times = []
    for _ in range(_REPEATS):
        wait(out)
        start = time.perf_counter()
        run()
        wait(out)
        times.append(time.perf_counter() - start)
    return out, min(times)


def untimed(_number: int, run: Run) -> tuple[Tensor, float]:
    """No time at all."""
    return run(), math.inf


@dataclass(frozen=True)
class Predicted:
    """The times of a site on a machine that is not here.

    Args:
        call: the site.
        candidates: by their numbers; how much they keep is known.
        machine: the machine.
    """

    call: AttentionCall
    candidates: Sequence[Candidate]
    machine: Capability

    def __call__(self, number: int, run: Run) -> tuple[Tensor, float]:
        """Run it here, and predict its time there."""
        served, kept = (None, 1.0) if number == DENSE else _served(self.candidates[number])
        return run(), predicted_seconds(self.call, served, kept, self.machine)


def _served(candidate: Candidate) -> tuple[str, float]:
    assert candidate.kept is not None
    return candidate.rule.use[0], candidate.kept


def wait(like: Tensor) -> None:
    """Wait until the device has computed it."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
