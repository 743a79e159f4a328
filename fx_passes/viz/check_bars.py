"""The results of a self-check as bars: one for each site, beside its limit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...attn_ops.errors import PolicyError
from ..report import Report
from ..site_check import SiteCheck
from .figure import CATEGORIES, SMALL, explain_below, name_rows, new_figure, shortened, width_of

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

_WITHIN, _ABOVE, *_ = CATEGORIES


def check_bars(report: Report) -> Figure:
    """A bar for each site that was compared, and a line at its limit; why a site has no bar stands in its place.

    Raises:
        PolicyError: if no site was compared.
    """
    rows = [(row.name, row.check) for row in report.rows if row.check is not None]
    if not rows:
        raise PolicyError(
            'error_map: the report has no self-check. Compile with options={"check": "first"}, run the model, and give '
            "sparseattn.last_report()."
        )
    names, checks = [name for name, _ in rows], [check for _, check in rows]
    height = min(max(0.17 * len(rows), 0.9), 13.0)
    title = f"Self-check by layer, policy {shortened(report.policy)}"
    figure = new_figure(width_of(names) + 4.5, height + 1.4, title)
    axes = figure.subplots()
    places = range(len(rows))
    colours = [_ABOVE if check.failure else _WITHIN for check in checks]
    axes.barh(places, [_shown(check) for check in checks], height=0.72, color=colours)
    limits = [
        (place, check.limit) for place, check in enumerate(checks) if check.limit is not None and not check.skipped
    ]
    axes.scatter([limit for _, limit in limits], [place for place, _ in limits], marker="|", color="0.2", s=60)
    for place, check in enumerate(checks):
        if words := _words(check):
            axes.annotate(
                words, (_shown(check), place), (3, 0), textcoords="offset points", va="center", fontsize=SMALL
            )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.margins(x=0.15)
    axes.set_xlabel("relative L1 error of the site's output", fontsize=SMALL + 1)
    axes.set_ylabel("layer", fontsize=SMALL + 1)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    name_rows(axes, names, height)
    _legend(figure, checks, bool(limits))
    return figure


def _shown(check: SiteCheck) -> float:
    return check.rel_l1 if math.isfinite(check.rel_l1) else 0.0


def _words(check: SiteCheck) -> str:
    if check.skipped:
        return f"not compared: {check.skipped}"
    if check.non_finite:
        return f"{check.non_finite} NaN or infinite"
    return "" if math.isfinite(check.rel_l1) else "no number"


def _legend(figure: Figure, checks: list[SiteCheck], limits: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    compared = [check for check in checks if not check.skipped]
    handles: list[Artist] = []
    if any(not check.failure for check in compared):
        handles.append(Patch(color=_WITHIN, label="passed"))
    if any(check.failure for check in compared):
        handles.append(Patch(color=_ABOVE, label="failed"))
    if limits:
        handles.append(Line2D([], [], marker="|", color="0.2", linestyle="", markersize=8, label="limit"))
    explain_below(figure, handles)
