"""Figures and what all pictures share: sizes, colours and labels. The one file that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...attn_ops.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

SEQUENTIAL = "viridis_r"
"""Darker is more, also to colour-blind eyes and in grey."""
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, told apart by colour-blind eyes."""

SMALL = 7.5
"""Points of a label on an axis."""
_TITLE = 10
_LINE = 0.125
"""Inches from one such label to the next, at least."""
_CHARACTER = 0.072
_LONGEST = 60


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure of that size in inches, wider if its title is, whose parts make room for each other.

    Raises:
        MissingPackageError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("viz: pictures need matplotlib. Run: pip install 'sparseattn[viz]'.") from None
    figure = Figure(figsize=(max(width, _TITLE / 72 * 0.6 * len(title) + 0.2), height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=_TITLE)
    return figure


def hatch(patch: Patch) -> Patch:
    """Make a patch look as a cell without a number does."""
    patch.set(hatch="////", facecolor="0.97", edgecolor="0.7", linewidth=0.0)
    return patch


def explain_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend in one line below everything."""
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=SMALL)


def shortened(name: str) -> str:
    """The name; of a long one the end, which tells the layers apart."""
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"


def width_of(names: Sequence[str]) -> float:
    """Inches that the longest of the names takes on an axis."""
    return _CHARACTER * max(map(len, map(shortened, names)), default=0)


def name_rows(axes: Axes, names: Sequence[str], inches: float) -> None:
    """Write the names beside the rows 0, 1, ... of axes that are so high; every n-th, where they are too many."""
    every = max(1, -int(-len(names) * _LINE // inches))
    shown = range(0, len(names), every)
    axes.set_yticks(list(shown), [shortened(names[row]) for row in shown], fontsize=SMALL)
    axes.tick_params(axis="y", length=2)


def number_columns(axes: Axes, count: int, inches: float) -> None:
    """Write the numbers 0, 1, ... below the columns: as many as there is room for, at even distances."""
    room = max(1, int(inches / 0.3))
    every = next(
        step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if -(-count // step) <= room or step >= count
    )
    axes.set_xticks(range(0, count, every))
    axes.tick_params(axis="x", length=2, labelsize=SMALL)


def name_columns(axes: Axes, names: Sequence[str], inches: float) -> None:
    """Write the names below the columns, upright where they would touch; every n-th, where they still would."""
    upright = width_of(names) + 0.08 > inches / len(names)
    every = max(1, -int(-len(names) * _LINE // inches)) if upright else 1
    shown = range(0, len(names), every)
    axes.set_xticks(list(shown), [names[at] for at in shown], rotation=90 if upright else 0, fontsize=SMALL)
    axes.tick_params(axis="x", length=2)
