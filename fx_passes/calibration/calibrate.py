"""calibrate: a policy for a model, from a few samples and the error that is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ...attn_ops.capability import Capability
from ...attn_ops.errors import PolicyError
from ...lowering.fingerprint import fingerprint
from ...lowering.policy import Policy, Rule
from ...lowering.precedence import DISABLE, effective_policy
from ..explain import traced_afresh
from .candidates import DEFAULT, Candidate, expand
from .digest import digest
from .influence import Influence
from .ledger import Objective
from .measure import Measurement
from .output_error import Metric, tensors_of, within
from .progress import shown
from .record import Recorder
from .rules import rules_of
from .samples import Sample, Samples
from .search import Search
from .state import State
from .trial import Trial
from .verify import verify

Weigh = Literal["output", "site"]
"""What an error at a site is taken for: what it does to the model's output, or to the site's own."""


def calibrate(
    model: Callable[..., Any],
    samples: Iterable[Sample | Sequence[Any] | Mapping[str, Any]],
    *,
    budget: float,
    candidates: Sequence[str | Rule] = DEFAULT,
    metric: Metric = "relative_l1",
    objective: Objective = "time",
    machine: str | Capability | None = None,
    weigh: Weigh = "output",
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
        metric: of the output to that with dense attention: "relative_l1", "relative_l2", "cosine" (1 minus it), "rmse",
            "mse", or "psnr" in dB, where the budget is the least.
        objective: what is saved: "time", measured here, or "work", the share of scores computed, the same everywhere.
        machine: with "time", a GPU that is not here, as "sm90", whose times are predicted from published throughputs.
        weigh: what the errors of the sites are weighed by: "output", what they do to the model's output, which takes
            four backward passes of each sample; or "site", what they are of the site's own output.
        total_steps: length of the loop around the model, where samples name their step.
        buckets: number of equal ranges of steps that may be served differently.
        state: a file that keeps what was measured: an interrupted run goes on from it, and another budget or metric
            needs no more than the search.
        progress: show a progress bar, where tqdm is installed.

    Returns:
        The policy. Sites that stay dense have no rule.

    Raises:
        PolicyError: if an argument is not valid, there is no sample, or the model has no attention that a candidate
            can serve; or if `state` is of another calibration.
    """
    if type(budget) not in (int, float) or not 0 < budget < math.inf:
        raise PolicyError(f"calibrate: budget must be a positive number, an error in {metric}, got {budget!r}.")
    for name, value, choices in (
        ("metric", metric, Metric),
        ("objective", objective, Objective),
        ("weigh", weigh, Weigh),
    ):
        if value not in get_args(choices):
            raise PolicyError(f"calibrate: {name} must be one of {', '.join(get_args(choices))}, got {value!r}.")
    given, tried = Samples.of(samples, total_steps, buckets), expand(candidates)
    if effective_policy() is None:
        raise PolicyError(f"calibrate: {DISABLE} is set, so that every site stays dense. Unset it.")
    target = Capability.of(machine) if isinstance(machine, str) else machine
    _check_times(objective, target, tried)
    of_model = fingerprint(model) if isinstance(model, torch.nn.Module) else ""
    values = "" if state is None else digest(model, given)
    kept = State.open(
        state, given, tried, model=of_model, values=values, objective=objective, machine=target, weigh=weigh
    )
    _measure(model, given, Measurement(tried, given.bucket, objective, kept.ledger, target), kept, progress)
    kept.ledger.output = math.fsum(float(x.double().square().sum()) for outputs in kept.dense for x in outputs)
    if weigh == "output":
        _follow(model, given, tried, kept, progress)
    trial = Trial(model, given, kept.dense)
    search = Search(trial, given, kept.ledger, tried, objective, metric)
    recorder = Recorder(search, kept.ledger, given, metric, float(budget), of_model, kept.machine, target)
    for found in search.within(float(budget), progress):
        served = rules_of(found.choices, tried, given.buckets)
        policy = Policy([rule for rule, _ in served], name="calibrated")
        verified = verify(model, given, kept.dense, trial, policy)
        if within(verified.error.in_metric(metric), metric, budget):
            break
    return replace(policy, measured=recorder.record(policy, [places for _, places in served], found, verified))


def _check_times(objective: Objective, target: Capability | None, candidates: Sequence[Candidate]) -> None:
    """Raises PolicyError unless what is saved can be told of every candidate."""
    if target is not None and objective != "time":
        raise PolicyError('calibrate: machine is for objective="time"; "work" is the same everywhere. Leave it out.')
    if objective == "time" and target is None:
        return
    if unknown := [one.rule for one in candidates if one.kept is None]:
        raise PolicyError(
            f"calibrate: how many scores {unknown[0]} computes is not known. "
            'Use objective="time", on the machine itself.'
        )


def _measure(
    model: Callable[..., Any],
    samples: Samples,
    measurement: Measurement,
    kept: State,
    progress: bool,
) -> None:
    """Measure what was not measured before."""
    run = traced_afresh(model, measurement.backend)
    with torch.no_grad(), shown(len(samples), "measuring", progress) as advance:
        advance(len(kept.dense))
        for result in samples.run(run, first=len(kept.dense)):
            if not any(kept.ledger):
                break
            kept.dense.append(tensors_of(result))
            kept.machine = None if measurement.machine is None else str(measurement.machine)
            kept.save()
            advance(1)
    if not any(kept.ledger):
        raise PolicyError(f"calibrate: no candidate can serve an attention of this model.{measurement.why_not()}")


def _follow(
    model: Callable[..., Any], samples: Samples, candidates: Sequence[Candidate], kept: State, progress: bool
) -> None:
    """Follow the errors that were not followed before to the model's output."""
    influence = Influence(model, samples, candidates, kept.ledger)
    with shown(len(samples), "weighing", progress) as advance:
        advance(kept.weighed)
        for _ in influence.add(first=kept.weighed):
            kept.weighed += 1
            kept.save()
            advance(1)
