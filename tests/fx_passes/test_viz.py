"""The pictures of policies: what is on their axes is what the policy says and what was measured."""

from __future__ import annotations

import builtins
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.attention_model import Blocks, tokens

import sparseattn
from sparseattn import Measured, MeasuredRule, Policy, Rule, Schedule, viz
from sparseattn.attn_ops.errors import MissingPackageError, PolicyError
from sparseattn.fx_passes.report import Report
from sparseattn.fx_passes.site_check import SiteCheck

RATIO = {"keep_ratio": 0.25}


def panels(figure: Figure) -> list[Axes]:
    """The axes that hold a heat map, without the colour bar."""
    return [axes for axes in figure.axes if axes.images]


def heat(axes: Axes) -> Any:
    """The numbers of a heat map, NaN where it has none."""
    return axes.images[0].get_array().filled(math.nan)


def layers(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_a_ratio_for_everything_is_one_cell() -> None:
    (axes,) = panels(viz.density_map(Policy([Rule("block_topk", params=RATIO)])))
    assert_allclose(heat(axes), [[0.25]])
    assert layers(axes) == ["*"]
    assert [text.get_text() for text in axes.texts] == ["0.25"]


def test_tables_of_heads_over_steps_are_shown_by_step_and_by_head() -> None:
    table = Schedule(kind="table", values=((0.5, 0.1), (0.3, 0.2), (0.4, 0.0)))
    rules = [
        Rule("dense", modules="blocks.0"),
        Rule("block_topk", modules="blocks.1", params={"keep_ratio": table}),
        Rule("vsa", modules="blocks.2", params={"sparsity": [0.9, 0.7]}),
    ]
    by_step, by_head = panels(viz.density_map(Policy(rules)))
    assert_allclose(heat(by_step), [[1, 1, 1], [0.3, 0.25, 0.2], [0.2, 0.2, 0.2]])
    assert_allclose(heat(by_head), [[1, 1], [0.4, 0.1], [0.1, 0.3]])
    assert layers(by_step) == ["blocks.0", "blocks.1", "blocks.2"]
    assert (by_step.get_xlabel(), by_head.get_xlabel()) == ("step", "head")


def test_the_first_rule_of_a_step_decides_and_steps_without_one_are_dense() -> None:
    rules = [
        Rule("sage, flash", steps=":1", modules="blocks.*"),
        Rule("block_topk", modules="blocks.0", steps="1:3", params=RATIO),
        Rule("block_topk", modules="blocks.0", steps=":3", params={"keep_ratio": 0.5}),
        Rule("block_topk", modules="blocks.0", mode="never"),
    ]
    (axes,) = panels(viz.density_map(Policy(rules), total_steps=4))
    assert layers(axes) == ["blocks.*", "blocks.0"]
    assert_allclose(heat(axes), [[1, 1, 1, 1], [1, 0.25, 0.25, 1]])


def test_what_a_rule_does_not_say_is_hatched_and_explained() -> None:
    rules = [
        Rule("vmoba", modules="a"),
        Rule("sparge", modules="b", params={"mass": 0.9}),
        Rule("sparge", modules="c", params={"similarity": 0.5}),
        Rule("sta", modules="d"),
        Rule("sparge", modules="e", params={"keep_ratio": 0.3}),
    ]
    figure = viz.density_map(Policy(rules))
    (axes,) = panels(figure)
    assert_allclose(heat(axes), [[math.nan], [math.nan], [math.nan], [math.nan], [0.3]])
    assert axes.patch.get_hatch()
    assert [text.get_text() for text in figure.legends[0].texts] == ["not said by the rule"]
    assert not viz.density_map(Policy(rules[-1:])).legends


def test_windows_are_counted_where_the_layout_is_known() -> None:
    windows = Schedule(kind="table", values=((3, 3, 3, 1, 1, 1), (1, 1, 1, 1, 3, 3)))
    params = {"tile": [2, 4, 4], "window": windows}
    by_step, by_head = panels(viz.density_map(Policy([Rule("sta", layout=[6, 12, 12], params=params)])))
    assert_allclose(heat(by_step), [[(1 + 1 / 27) / 2, (1 / 27 + 9 / 27) / 2]])
    assert_allclose(heat(by_head), [[(1 + 1 / 27) / 2, (1 / 27 + 9 / 27) / 2]])


def test_a_report_gives_the_rows() -> None:
    policy = Policy([Rule("block_topk", min_seq=9999), Rule("block_topk", modules="blocks.1", params=RATIO)])
    report = sparseattn.explain(Blocks(3), tokens(), policy=policy)
    (axes,) = panels(viz.density_map(policy, report=report))
    assert layers(axes) == ["blocks.0", "blocks.1", "blocks.2"]
    assert_allclose(heat(axes), [[1], [0.25], [1]])


@pytest.mark.parametrize(
    ("policy", "steps", "sentence"),
    [
        (Policy([]), None, "the policy has no rules"),
        (Policy([Rule("block_topk", steps="10:")]), None, "Give total_steps"),
        (Policy([Rule("block_topk", steps="0.2:0.8")]), None, "Give total_steps"),
        (Policy([Rule("block_topk", steps=":10")]), 0, "total_steps must be an int of at least 1, got 0"),
        (
            Policy([Rule("block_topk", params={"keep_ratio": Schedule(kind="table", values=(0.5,))})]),
            3,
            "the table ends",
        ),
        ("no-such-preset", None, "Known: auto"),
    ],
)
def test_a_density_that_cannot_be_drawn_says_why(policy: Any, steps: int | None, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        viz.density_map(policy, total_steps=steps)


def test_a_report_without_sites_has_no_density() -> None:
    with pytest.raises(PolicyError, match="the report has no attention sites"):
        viz.density_map("fast", report=Report())


def measured(rules: list[Rule], errors: list[list[list[float]]], ranges: list[str] = []) -> Policy:  # noqa: B006
    entries = [MeasuredRule(number, site_errors=one) for number, one in enumerate(errors, 1)]
    return Policy(rules, measured=Measured(step_ranges=ranges, rules=entries))


def test_errors_by_range_and_by_head() -> None:
    rules = [Rule("block_topk", modules=name) for name in ("blocks.0", "blocks.1")]
    policy = measured(rules, [[[0.1, 0.3], [0.2, 0.6]], [[0.0, 0.1], []]], ["0:5", "5:10"])
    figure = viz.error_map(policy)
    by_step, by_head = panels(figure)
    assert_allclose(heat(by_step), [[0.2, 0.4], [0.05, math.nan]])
    assert_allclose(heat(by_head), [[0.15, 0.45], [math.nan, math.nan]])
    assert [label.get_text() for label in by_step.get_xticklabels()] == ["0:5", "5:10"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["not measured: dense there, or no such head"]


def test_rules_of_one_range_each_are_one_layer() -> None:
    rules = [Rule("block_topk", modules="blocks.0", steps=steps) for steps in (":5", "5:10")]
    (axes,) = panels(viz.error_map(measured(rules, [[[0.1]], [[0.4]]], ["0:5", "5:10"])))
    assert layers(axes) == ["blocks.0"]
    assert_allclose(heat(axes), [[0.1, 0.4]])


def test_layers_of_other_numbers_of_heads_and_kinds() -> None:
    rules = [Rule("block_topk", modules="b", kind="self"), Rule("flash", modules="b", kind="cross")]
    (axes,) = panels(viz.error_map(measured(rules, [[[0.1, 0.2, 0.3]], [[0.5, 0.6]]])))
    assert layers(axes) == ["b (self)", "b (cross)"]
    assert_allclose(heat(axes), [[0.1, 0.2, 0.3], [0.5, 0.6, math.nan]])


def test_a_policy_without_measured_errors_says_how_to_get_them() -> None:
    for policy in ("fast", measured([Rule("flash")], [[]])):
        with pytest.raises(PolicyError, match=r"Make one by sparseattn\.calibrate"):
            viz.error_map(policy)
    with pytest.raises(PolicyError, match="rule 1 has errors for 3 ranges of steps, and 2 were measured"):
        viz.error_map(measured([Rule("flash")], [[[0.1]] * 3], ["0:5", "5:10"]))


def test_a_self_check_is_a_bar_for_each_site() -> None:
    report = sparseattn.explain(Blocks(4), tokens(), policy="exact")
    checks = [
        SiteCheck(0.99, 0.1, limit=0.3),
        SiteCheck(0.8, 0.5, limit=0.3),
        SiteCheck(skipped="it is in a region"),
        SiteCheck(0.9, math.nan, non_finite=7, limit=0.3),
    ]
    report = replace(report, rows=tuple(replace(row, check=c) for row, c in zip(report.rows, checks, strict=True)))
    figure = viz.error_map(report)
    (axes,) = figure.axes
    assert_allclose([bar.get_width() for bar in axes.patches], [0.1, 0.5, 0, 0])
    assert layers(axes) == [f"blocks.{i}" for i in range(4)]
    assert_allclose(axes.collections[0].get_offsets(), [[0.3, 0], [0.3, 1], [0.3, 3]])
    assert [text.get_text() for text in axes.texts] == ["not compared: it is in a region", "7 NaN or infinite"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["passed", "failed", "limit"]


def test_a_report_without_a_self_check_says_how_to_get_one() -> None:
    with pytest.raises(PolicyError, match=r'options=\{"check": "first"\}'):
        viz.error_map(sparseattn.explain(Blocks(), tokens(), policy="exact"))


@pytest.mark.parametrize(("layers", "steps", "heads"), [(1, 1, 1), (40, 50, 24)])
def test_labels_do_not_overlap(layers: int, steps: int, heads: int) -> None:
    values = tuple((0.5,) * heads if heads > 1 else 0.5 for _ in range(steps))
    params = {"keep_ratio": Schedule(kind="table", values=values)}
    names = [f"transformer_blocks.{i}.attn" for i in range(layers)]
    figure = viz.density_map(Policy([Rule("block_topk", modules=names, params=params)]))
    figure.draw_without_rendering()
    axes = panels(figure)[0]
    assert len(axes.get_yticks()) == layers
    for labels, side in ((axes.get_yticklabels(), "y"), (axes.get_xticklabels(), "x")):
        boxes = [label.get_window_extent() for label in labels]
        assert sum(one.overlaps(other) for one in boxes for other in boxes) == len(boxes), side


def test_a_long_title_is_in_the_picture() -> None:
    figures = [
        viz.density_map(Policy([Rule("flash")], name="calibrated for the large model, " * 3)),
        viz.block_map(torch.ones(24, 1, 1, dtype=torch.bool), heads=0, title="transformer_blocks.12.attention.inner"),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        (title,) = (text for text in figure.texts if text.get_text() == figure.get_suptitle())
        assert title.get_window_extent().width < figure.bbox.width


def test_importing_us_imports_no_matplotlib() -> None:
    code = "import sys, sparseattn; print(sparseattn.viz.density_map.__name__, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["density_map", "False"]


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"pip install 'sparseattn\[viz\]'"):
        viz.density_map("fast")
