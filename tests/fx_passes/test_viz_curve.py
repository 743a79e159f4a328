"""The curve of a calibration: what was tried, the budget and the choice are on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from numpy.testing import assert_allclose

pytest.importorskip("matplotlib")

from sparseattn import Measured, MeasuredPoint, Policy, viz
from sparseattn.attn_ops.errors import PolicyError

POINTS = [
    MeasuredPoint(0.05, density=0.2, predicted_speedup=3.0),
    MeasuredPoint(0.01, density=0.5, predicted_speedup=1.5),
    MeasuredPoint(0.02, density=0.4, predicted_speedup=2.0),
]


def calibrated(**given: Any) -> Policy:
    values = {"budget": 0.03, "error": 0.02, "density": 0.4, "predicted_speedup": 2.0, "metric": "relative_l1"}
    return Policy([], measured=Measured(points=POINTS, **{**values, **given}))


def test_the_curve_holds_what_was_tried_the_budget_and_the_choice() -> None:
    figure = viz.budget_curve(calibrated())
    (axes,) = figure.axes
    tried, budget, chosen = axes.lines
    assert_allclose(tried.get_xydata(), [[1.5, 0.01], [2.0, 0.02], [3.0, 0.05]])
    assert_allclose(budget.get_ydata(), [0.03, 0.03])
    assert_allclose(chosen.get_xydata(), [[2.0, 0.02]])
    assert [text.get_text() for text in axes.texts] == ["budget 0.03"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["tried", "chosen, 2.00 x, error 0.02"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted speed-up, times", "error: relative L1")


def test_without_a_speed_the_curve_is_over_the_density_with_less_work_to_the_right() -> None:
    points = [replace(point, predicted_speedup=None) for point in POINTS]
    slow = replace(calibrated(), measured=replace(calibrated().measured, points=points))
    figure = viz.budget_curve({"a": calibrated(), "b": slow})
    (axes,) = figure.axes
    assert_allclose(axes.lines[0].get_xydata(), [[0.2, 0.05], [0.4, 0.02], [0.5, 0.01]])
    assert_allclose(axes.lines[5].get_xydata(), [[0.4, 0.02]])
    assert axes.xaxis_inverted()
    chosen = [f"{name}: chosen, density 0.40, error 0.02" for name in "ab"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["tried", *chosen]
    assert len({line.get_color() for line in axes.lines}) == 2


def test_a_metric_in_decibels_is_no_error() -> None:
    figure = viz.budget_curve(calibrated(metric="psnr", error=31.0, budget=30.0))
    (axes,) = figure.axes
    assert axes.get_ylabel() == "PSNR, dB"
    assert figure.legends[0].texts[1].get_text() == "chosen, 2.00 x, PSNR 31"


def test_a_curve_that_cannot_be_drawn_says_why() -> None:
    with pytest.raises(PolicyError, match=r"no measured points\. Make one by sparseattn\.calibrate"):
        viz.budget_curve("fast")
    with pytest.raises(PolicyError, match="neither predicted_speedup nor density"):
        viz.budget_curve(Policy([], measured=Measured(points=[MeasuredPoint(0.1)])))
    with pytest.raises(PolicyError, match="different metrics: cosine, relative_l1"):
        viz.budget_curve({"a": calibrated(), "b": calibrated(metric="cosine")})
    with pytest.raises(PolicyError, match="no policies"):
        viz.budget_curve({})
    with pytest.raises(PolicyError, match="at most 6 policies"):
        viz.budget_curve({str(i): calibrated() for i in range(7)})
