"""calibrate: a policy for a model, from a few samples and the error that is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch

from ...attn_ops.errors import PolicyError
from ...lowering.fingerprint import fingerprint
from ...lowering.measured import Measured
from ...lowering.policy import Policy, Rule
from ..explain import traced_afresh
from .candidates import DEFAULT, expand
from .ledger import Objective
from .measure import Measurement
from .output_error import Metric, tensors_of
from .progress import shown
from .samples import Sample, Samples
from .search import Search
from .state import State


def calibrate(
    model: Callable[..., Any],
    samples: Iterable[Sample | Sequence[Any] | Mapping[str, Any]],
    *,
    budget: float,
    candidates: Sequence[str | Rule] = DEFAULT,
    metric: Metric = "relative_l1",
    objective: Objective = "time",
    total_steps: int | None = None,
    buckets: int = 1,
    state: str | Path | None = None,
    progress: bool = True,
) -> Policy:
    """The policy that saves most while the model's output stays within an error of dense attention's.

        policy = sparseattn.calibrate(model, [(latents, t, text)], budget=0.02)
        model = torch.compile(model, backend="sparseattn", options={"policy": policy})

    Every candidate runs on the q, k and v of every self- or cross-attention of the samples, and is compared with dense
    attention head by head. What saves most for the error it makes is chosen first; then the whole model runs with the
    choice, and its true error decides how much more may be spent.

    Args:
        model: a module or function; it is not changed.
        samples: its inputs: tuples of arguments, dicts of keyword arguments, or `Sample`, which may name a step.
        budget: largest error of the output over all samples, in the metric.
        candidates: backends by name, each tried with a ladder of ratios, or rules with one backend.
        metric: "relative_l1", "relative_l2" or "cosine" (1 minus it) of the output to that with dense attention.
        objective: what is saved: "time", measured here, or "work", the share of scores computed, the same everywhere.
        total_steps: length of the loop around the model, where samples name their step.
        buckets: number of equal ranges of steps that may be served differently.
        state: a file to go on from where a run was interrupted; it is made, and removed at the end.
        progress: show a progress bar, where tqdm is installed.

    Returns:
        The policy. Sites that stay dense have no rule.

    Raises:
        PolicyError: if an argument is not valid, there is no sample, or the model has no attention that a candidate
            can serve; or if `state` is of another calibration.
    """
    if type(budget) not in (int, float) or not 0 < budget < math.inf:
        raise PolicyError(f"calibrate: budget must be a positive number, an error in {metric}, got {budget!r}.")
    for name, value, choices in (("metric", metric, Metric), ("objective", objective, Objective)):
        if value not in get_args(choices):
            raise PolicyError(f"calibrate: {name} must be one of {', '.join(get_args(choices))}, got {value!r}.")
    given, tried = Samples.of(samples, total_steps, buckets), expand(candidates)
    if objective == "work" and (unknown := [one.rule for one in tried if one.kept is None]):
        raise PolicyError(f'calibrate: how many scores {unknown[0]} computes is not known. Use objective="time".')
    of_model = fingerprint(model) if isinstance(model, torch.nn.Module) else ""
    kept = State.open(state, given, tried, of_model, objective)
    measurement = Measurement(tried, given.bucket, objective, kept.ledger)
    run = traced_afresh(model, measurement.backend)
    with torch.no_grad(), shown(len(given), "measuring", progress) as advance:
        advance(len(kept.dense))
        for result in given.run(run, first=len(kept.dense)):
            kept.dense.append(tensors_of(result))
            kept.machine = None if measurement.machine is None else str(measurement.machine)
            kept.save()
            advance(1)
    if not any(kept.ledger):
        raise PolicyError(f"calibrate: no candidate can serve an attention of this model.{measurement.why_not()}")
    found = Search(model, given, measurement, kept.dense, metric).within(float(budget), progress)
    policy = Policy(found.rules, name="calibrated")
    told = Measured(
        model=of_model or None,
        policy=policy.hash,
        torch=torch.__version__,
        sparseattn=version("sparseattn"),
        device=kept.machine,
        metric=metric,
        budget=float(budget),
        error=found.error,
        density=found.density,
    )
    kept.remove()
    return replace(policy, measured=told)
