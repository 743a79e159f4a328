"""Which share of its scores every layer computes at every step and head, as far as the rules of a policy say it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from ...attn_ops.call import Kind, ParamValue
from ...attn_ops.errors import PolicyError
from ...attn_ops.registry import backend
from ...attn_ops.schedule import Schedule
from ...attn_ops.step_range import Step, StepRange
from ...lowering.policy import Policy, Rule
from ...lowering.rule_checks import DENSE
from ..asked_density import asked_density
from ..report import Report
from .layer_grid import Heads, LayerGrid

_ALL: Heads = (1.0,)


@dataclass(frozen=True)
class _Layer:
    """A row of the picture: its name, and whether a rule speaks about it at a step."""

    name: str
    matches: Callable[[Rule, Step | None], bool]


def densities(policy: Policy, report: Report | None, total_steps: int | None) -> LayerGrid:
    """The densities that a policy asks for.

    Args:
        policy: its first matching rule decides; of several backends the first one counts.
        report: the sites of a model, as rows; None takes the globs of the rules, in their order, their conditions on
            length, head_dim and dtype as met.
        total_steps: length of the loop; None takes what the rules say.

    Raises:
        PolicyError: if there is no rule or no site, or the length of the loop is not known and matters.
    """
    layers = list(_globs(policy) if report is None else _sites(report))
    if not layers:
        what = "policy has no rules" if report is None else "report has no attention sites"
        raise PolicyError(f"density_map: the {what}, so there is no layer to show.")
    total = _total_steps(policy, total_steps)
    steps = [None] if total is None else [Step(index, total) for index in range(total)]
    values = tuple(tuple(_density(policy, layer, step) for step in steps) for layer in layers)
    return LayerGrid(tuple(layer.name for layer in layers), values)


def _globs(policy: Policy) -> Iterator[_Layer]:
    found: dict[tuple[str, Kind], None] = {}
    for rule in policy.rules:
        if rule.mode != "never":
            found.update(((glob, rule.kind or "self"), None) for glob in rule.modules)
    for glob, kind in found:
        name = f"{glob} (cross)" if kind == "cross" else glob
        yield _Layer(name, functools.partial(_speaks_of, glob, kind))


def _speaks_of(glob: str, kind: Kind, rule: Rule, step: Step | None) -> bool:
    """Whether a rule holds for all that a glob matches."""
    named = any(glob == other or fnmatchcase(glob, other) for other in rule.modules)
    return named and rule.kind in (None, kind) and rule.covers(step)


def _sites(report: Report) -> Iterator[_Layer]:
    both = {row.name for row in report.rows if row.call.kind == "cross"}
    both &= {row.name for row in report.rows if row.call.kind == "self"}
    rows = {(row.name, row.call.kind): row for row in report.rows}
    for (name, kind), row in rows.items():
        call, module = row.call, row.module

        def matches(rule: Rule, step: Step | None, call: Any = call, module: str = module) -> bool:
            return rule.mismatch(call, module, step) is None

        yield _Layer(f"{name} ({kind})" if name in both else name, matches)


def _density(policy: Policy, layer: _Layer, step: Step | None) -> Heads:
    """That of each head, or of all; 1 where no rule matches: the site stays dense."""
    deciding = (rule for rule in policy.rules if rule.mode != "never" and layer.matches(rule, step))
    rule = next(deciding, None)
    if rule is None or rule.use[0] == DENSE or backend(rule.use[0]).kind != "sparse":
        return _ALL
    params = {name: _at(value, step, name) for name, value in backend(rule.use[0]).complete(rule.params)}
    return asked_density(params, rule.layout)


def _at(value: ParamValue, step: Step | None, name: str) -> ParamValue:
    return value.at(step, name) if isinstance(value, Schedule) else value


def _total_steps(policy: Policy, given: int | None) -> int | None:
    """The length of the loop; None where nothing follows the steps.

    Raises:
        PolicyError: if it is needed and neither given nor said by the rules.
    """
    if given is not None:
        if type(given) is not int or given < 1:
            raise PolicyError(f"density_map: total_steps must be an int of at least 1, got {given!r}.")
        return given
    ranges = [rule.steps for rule in policy.rules if rule.steps is not None]
    schedules = [v for rule in policy.rules for _, v in rule.params if isinstance(v, Schedule)]
    if not ranges and not schedules:
        return None
    tables = [len(schedule.values) for schedule in schedules if schedule.kind == "table"]
    if tables:
        return max(tables)
    ends = [_end(text) for text in ranges]
    if schedules or None in ends:
        raise PolicyError(
            "density_map: the rules follow the steps and do not say how many there are. Give total_steps."
        )
    return max(end for end in ends if end is not None)


def _end(steps: str) -> int | None:
    """The step after the last of a range; None where that depends on how many there are."""
    parsed = StepRange.parse(steps)
    whole = all(type(bound) is int and bound >= 0 for bound in (parsed.start, parsed.stop))
    return cast(int, parsed.stop) if whole else None
