"""error_map: how far every layer's attention is from dense attention, as a heat map or, of a self-check, as bars."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...attn_ops.call import Kind
from ...attn_ops.errors import PolicyError
from ...attn_ops.step_range import StepRange
from ...lowering.measured import Measured, MeasuredRule
from ...lowering.policy import Policy, PolicySource, Rule
from ..report import Report
from .check_bars import check_bars
from .figure import shortened
from .layer_grid import Heads, LayerGrid, Scale, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCALE = Scale("relative L2 of the output", None, 1.0, "not measured: dense there, or no such head")


def error_map(source: PolicySource | Report) -> Figure:
    """The error of every layer's own attention output against dense attention.

    Args:
        source: a policy that was calibrated: a heat map of layers by ranges of steps, one of layers by heads, or both.
            Or a Report with results of a self-check, from a model compiled with the option `check`: a bar for each
            site, its relative L1 error, and the limit.

    Raises:
        PolicyError: if the policy has no measured errors of its sites, or the report no self-check.
        MissingPackageError: if matplotlib is not installed.
    """
    if isinstance(source, Report):
        return check_bars(source)
    policy = Policy.load(source)
    return draw(site_errors(policy), _SCALE, f"Error by layer, policy {shortened(policy.name)}")


def site_errors(policy: Policy) -> LayerGrid:
    """The measured errors of a policy: rules for the same modules are one layer.

    Raises:
        PolicyError: if there are none, or a rule has them for other ranges of steps than were measured.
    """
    measured = policy.measured or Measured()
    rules = [entry for entry in measured.rules if entry.site_errors]
    if not rules:
        raise PolicyError(
            f"error_map: policy {policy.name} has no measured errors of its sites. Make one by sparseattn.calibrate, "
            'or give the report of a model that ran with options={"check": "first"}.'
        )
    ranges = measured.step_ranges or ("",) * len(rules[0].site_errors)
    layers: dict[tuple[tuple[str, ...], Kind | None], list[Heads]] = {}
    for entry in rules:
        rule = policy.rules[entry.rule - 1]
        row = layers.setdefault((rule.modules, rule.kind), [(math.nan,)] * len(ranges))
        for at, heads in _placed(entry, rule, measured).items():
            row[at] = heads
    several = len({kind for _, kind in layers}) > 1
    names = [", ".join(modules) + (f" ({kind})" if several and kind else "") for modules, kind in layers]
    return LayerGrid(tuple(names), tuple(map(tuple, layers.values())), tuple(ranges) if any(ranges) else None)


def _placed(entry: MeasuredRule, rule: Rule, measured: Measured) -> dict[int, Heads]:
    """Number of the range of steps -> the errors of the heads. A rule of one range may have its own only."""
    errors = [tuple(heads) for heads in entry.site_errors]
    ranges = [StepRange.parse(steps) for steps in measured.step_ranges]
    if len(errors) != max(len(ranges), 1):
        own = None if rule.steps is None else StepRange.parse(rule.steps)
        if len(errors) > 1 or own not in ranges:
            raise PolicyError(
                f"error_map: rule {entry.rule} has errors for {len(errors)} ranges of steps, and {len(ranges)} were "
                "measured. Correct site_errors or step_ranges."
            )
        return {ranges.index(own): errors[0]}
    return {at: heads for at, heads in enumerate(errors) if heads}
