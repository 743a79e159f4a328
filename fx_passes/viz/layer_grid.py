"""LayerGrid: a number for every layer, step and head, and its picture: heat maps of layers by steps and by heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .figure import (
    SEQUENTIAL,
    SMALL,
    explain_below,
    hatch,
    name_columns,
    name_rows,
    new_figure,
    number_columns,
    width_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_ROOM = (0.4, 0.15)
"""Inches that a cell must be wide and high to hold its number."""

Heads = tuple[float, ...]
"""A number for each head, or one for all of them; NaN is not known."""


@dataclass(frozen=True)
class LayerGrid:
    """Numbers by layer, step and head.

    Args:
        layers: names of the layers.
        values: [layer][step], of each head or all; as many steps for every layer.
        steps: names of the ranges of steps; None where they are numbered.
    """

    layers: tuple[str, ...]
    values: tuple[tuple[Heads, ...], ...]
    steps: tuple[str, ...] | None = None

    @property
    def heads(self) -> int:
        """The largest number of heads of a layer."""
        return max(len(heads) for steps in self.values for heads in steps)

    def by_step(self) -> list[list[float]]:
        """[layer][step], the mean over heads; NaN where that of a head is."""
        return [[_mean(heads) for heads in steps] for steps in self.values]

    def by_head(self) -> list[list[float]]:
        """[layer][head], the mean over steps; NaN where that of a step is, and where a layer has no such head."""
        return [[_mean([_of(heads, head) for heads in steps]) for head in range(self.heads)] for steps in self.values]


@dataclass(frozen=True)
class Scale:
    """What the colours mean.

    Args:
        label: the quantity, with its unit.
        high: the number of the darkest; None is the largest number shown. The lightest is 0.
        power: below 1, small numbers differ more in colour than large ones.
        unknown: why a cell may have no number.
        ticks: numbers beside the colours; None chooses them.
    """

    label: str
    high: float | None
    power: float
    unknown: str
    ticks: tuple[float, ...] | None = None


@dataclass(frozen=True)
class _Panel:
    title: str
    axis: str
    values: list[list[float]]
    names: Sequence[str] | None
    """Names of the columns; None numbers them."""

    @property
    def columns(self) -> int:
        return len(self.values[0])

    @property
    def inches(self) -> float:
        wide = self.names is not None and width_of(self.names) + 0.1
        return min(max((wide or 0.14) * self.columns, 1.3), 5.0)


def draw(grid: LayerGrid, scale: Scale, title: str) -> Figure:
    """A heat map of layers by steps, one of layers by heads, or both; of one column where neither differs."""
    panels = _panels(grid)
    height = min(max(0.17 * len(grid.layers), 1.7), 13.0)
    left, right = width_of(grid.layers) + 0.6, 0.9
    width = left + right + sum(panel.inches + 0.3 for panel in panels)
    figure = new_figure(max(width, 4.2), height + 1.35, title)
    widths = [panel.inches for panel in panels]
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=widths)[0]
    known = [value for panel in panels for row in panel.values for value in row if not math.isnan(value)]
    norm = _norm(scale, known)
    for axes, panel in zip(all_axes, panels, strict=True):
        hatch(axes.patch)  # it shows where there is no number
        image = axes.imshow(panel.values, cmap=SEQUENTIAL, norm=norm, aspect="auto", interpolation="nearest")
        axes.set_xlabel(panel.axis, fontsize=SMALL + 1)
        axes.set_title(panel.title, fontsize=SMALL + 1)
        if panel.names is None:
            number_columns(axes, panel.columns, panel.inches)
        else:
            name_columns(axes, panel.names, panel.inches)
        if panel.inches / panel.columns > _ROOM[0] and height / len(grid.layers) > _ROOM[1]:
            _write_numbers(axes, panel.values, norm)
    name_rows(all_axes[0], grid.layers, height)
    all_axes[0].set_ylabel("layer", fontsize=SMALL + 1)
    bar = figure.colorbar(image, ax=list(all_axes), label=scale.label, ticks=scale.ticks, aspect=height / 0.14)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.yaxis.label.set_fontsize(SMALL + 1)
    if len(known) < sum(len(panel.values) * panel.columns for panel in panels):
        from matplotlib.patches import Patch

        explain_below(figure, [hatch(Patch(label=scale.unknown))])
    return figure


def _panels(grid: LayerGrid) -> list[_Panel]:
    steps, heads = len(grid.values[0]), grid.heads
    panels = []
    if steps > 1 or heads == 1:
        axis = "step" if grid.steps is None else "steps"
        names = [""] if steps == 1 and not grid.steps else grid.steps
        axis = "all steps and heads" if names == [""] else axis
        panels.append(_Panel("mean over heads" if heads > 1 else "", axis, grid.by_step(), names))
    if heads > 1:
        panels.append(_Panel("mean over steps" if steps > 1 else "", "head", grid.by_head(), None))
    return panels


def _norm(scale: Scale, known: list[float]) -> Normalize:
    from matplotlib.colors import PowerNorm

    high = max(known, default=0.0) if scale.high is None else scale.high
    return PowerNorm(scale.power, 0.0, high or 1.0)


def _write_numbers(axes: Axes, values: list[list[float]], norm: Normalize) -> None:
    """Every number in its cell, light on dark."""
    for layer, row in enumerate(values):
        for column, value in enumerate(row):
            if not math.isnan(value):
                colour = "white" if norm(value) > 0.45 else "0.1"
                axes.text(column, layer, f"{value:#.2g}", ha="center", va="center", color=colour, fontsize=SMALL)


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _of(heads: Heads, head: int) -> float:
    if len(heads) == 1:
        return heads[0]
    return heads[head] if head < len(heads) else math.nan
