"""budget_curve: the error that a calibration would have made at every speed, its budget, and what it chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...attn_ops.errors import PolicyError
from ...lowering.measured import Measured, MeasuredPoint
from ...lowering.policy import Policy, PolicySource
from .figure import CATEGORIES, SMALL, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXES = {
    "predicted_speedup": "predicted speed-up, times",
    "density": "density: share of the scores computed",
}


_DOT, _LINE, _WORDS = 3.5, 0.8, SMALL + 0.5
"""Size of a point, width of a line and size of letters, in points."""

_METRICS = {
    "relative_l1": "error: relative L1",
    "relative_l2": "error: relative L2",
    "cosine": "error: 1 - cosine",
    "rmse": "error: RMSE",
    "mse": "error: MSE",
    "psnr": "PSNR, dB",
    None: "error of the model's output",
}
"""Those of `calibrate`, as an axis has them."""


def budget_curve(policies: PolicySource | Mapping[str, PolicySource]) -> Figure:
    """Error of the model's output against speed, of everything that a calibration tried; the chosen one is marked.

    Speed is the predicted speed-up where every policy has it, else the density, with less work to the right.

    Args:
        policies: a calibrated policy; or several by their labels, {"budget 0.02": policy, ...}, on one pair of axes.

    Raises:
        PolicyError: if a policy has no measured points, or they have neither speed-up nor density, or two policies
            measure their error in different metrics.
        MissingPackageError: if matplotlib is not installed.
    """
    given = policies if isinstance(policies, Mapping) and "rules" not in policies else {"": policies}
    curves = [_curve(label, Policy.load(source)) for label, source in given.items()]
    if not curves:
        raise PolicyError('budget_curve: no policies. Write for example {"budget 0.02": policy}.')
    if len(curves) > len(CATEGORIES):
        raise PolicyError(f"budget_curve: at most {len(CATEGORIES)} policies can be told apart, got {len(curves)}.")
    if len(metrics := {curve.measured.metric for curve in curves}) > 1:
        told = ", ".join(sorted(map(str, metrics)))
        raise PolicyError(f"budget_curve: the policies measure their error in different metrics: {told}.")
    speed = _speed(curves)
    figure = new_figure(5.2, 3.6 + 0.18 * len(curves))
    axes = figure.subplots()
    for curve, colour in zip(curves, CATEGORIES, strict=False):
        _draw(axes, curve, speed, colour, alone=len(curves) == 1)
    (metric,) = metrics
    axes.set_xlabel(_AXES[speed])
    axes.set_ylabel(_METRICS.get(metric, f"error: {metric}"))
    if metric != "psnr":
        axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    if speed == "density":
        axes.invert_xaxis()
    axes.spines[["top", "right"]].set_visible(False)
    _explain(figure, curves, speed)
    return figure


@dataclass(frozen=True)
class _Curve:
    label: str
    measured: Measured

    def at(self, speed: str) -> list[tuple[float, float]]:
        """(speed, error) of the points that have this speed, in its order."""
        points = [(getattr(point, speed), point.error) for point in self.measured.points]
        return sorted((at, error) for at, error in points if at is not None)

    def chosen(self, speed: str) -> tuple[float, float] | None:
        """That of the policy itself; None if it was not measured."""
        at, error = getattr(self.measured, speed), self.measured.error
        return None if at is None or error is None else (at, error)

    def told(self, speed: str) -> str:
        """The choice in words; "" if it was not measured."""
        if (chosen := self.chosen(speed)) is None:
            return ""
        at = f"{chosen[0]:.2f} x" if speed == "predicted_speedup" else f"density {chosen[0]:.2f}"
        error = "PSNR" if self.measured.metric == "psnr" else "error"
        return f"{self.label}{': ' if self.label else ''}chosen, {at}, {error} {chosen[1]:.3g}"


def _curve(label: str, policy: Policy) -> _Curve:
    if policy.measured is None or not policy.measured.points:
        raise PolicyError(
            f"budget_curve: policy {policy.name} has no measured points. Make one by sparseattn.calibrate, which keeps "
            "what it tried."
        )
    return _Curve(label, policy.measured)


def _speed(curves: list[_Curve]) -> str:
    """The first quantity that every point of every policy has."""
    for name in _AXES:
        points: list[MeasuredPoint] = [point for curve in curves for point in curve.measured.points]
        if all(getattr(point, name) is not None for point in points):
            return name
    raise PolicyError(
        "budget_curve: neither predicted_speedup nor density is known of every point, so there is nothing to draw the "
        "error against."
    )


def _draw(axes: Axes, curve: _Curve, speed: str, colour: str, alone: bool) -> None:
    # Between two points nothing was tried: a line would make that of one policy look worse than that of another.
    line = _LINE if alone else 0.0
    axes.plot(*zip(*curve.at(speed), strict=True), color=colour, marker="o", markersize=_DOT, linewidth=line, alpha=0.6)
    if (budget := curve.measured.budget) is not None:
        axes.axhline(budget, color=colour, linestyle="--", linewidth=1)
        place = axes.get_yaxis_transform()
        axes.text(0.01, budget, f"budget {budget:.3g}", transform=place, va="bottom", color=colour, fontsize=_WORDS)
    if (chosen := curve.chosen(speed)) is not None:
        axes.plot(*chosen, marker="D", markersize=9, markerfacecolor="none", color=colour, markeredgewidth=1.8)


def _explain(figure: Figure, curves: list[_Curve], speed: str) -> None:
    """A legend above the axes: what was tried, and in numbers what each policy chose."""
    from matplotlib.lines import Line2D

    alone = len(curves) == 1
    colour, line = (CATEGORIES[0], _LINE) if alone else ("0.4", 0.0)
    handles = [Line2D([], [], color=colour, marker="o", markersize=_DOT, linewidth=line, label="tried")]
    for curve, colour in zip(curves, CATEGORIES, strict=False):
        if told := curve.told(speed):
            diamond = Line2D([], [], color=colour, marker="D", markerfacecolor="none", linestyle="", label=told)
            handles.append(diamond)
    figure.legend(handles=handles, loc="outside upper center", frameon=False, fontsize=_WORDS)
