"""Verify: the model with a policy as it will be compiled, but for Inductor; its true error and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...lowering.policy import Policy
from ...lowering.precedence import use_policy
from ..explain import traced_afresh
from .clock import wait
from .output_error import OutputError, error_of, floating_leaves
from .samples import Samples
from .trial import Trial


@dataclass(frozen=True)
class Verified:
    """The error of the output over all samples, and the seconds of dense attention and of the policy for them."""

    error: OutputError
    dense_seconds: float
    seconds: float


def verify(
    model: Callable[..., Any], samples: Samples, dense: Sequence[list[Tensor]], trial: Trial, policy: Policy
) -> Verified:
    """Run a policy twice: for the error, and then in turns with dense attention for the time."""
    run = traced_afresh(model, "sparseattn", {"policy": policy, "inner_backend": "eager"})
    with torch.no_grad(), use_policy(policy):  # above what the environment names
        error = error_of(samples.run(run), dense)
        for _ in trial.results({}):
            pass
        both = zip(_seconds(trial.results({})), _seconds(samples.run(run)), strict=True)
        pairs = list(both)
    return Verified(error, sum(a for a, _ in pairs), sum(b for _, b in pairs))


def _seconds(results: Iterator[Any]) -> Iterator[float]:
    """The seconds that each result takes."""
    while True:
        start = time.perf_counter()
        try:
            result = next(results)
        except StopIteration:
            return
        for leaf in floating_leaves(result)[:1]:
            wait(leaf)
        yield time.perf_counter() - start
