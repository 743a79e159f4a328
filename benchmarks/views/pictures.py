"""Pictures of what was measured."""

from __future__ import annotations

from .registry import Results, picture
from harness.bars import Group, bars


@picture("docs/pictures/methods_cpu.svg")
def methods(results: Results) -> str:
    """How many times as fast as dense every method is, at each density."""
    rows = results.rows("methods", dtype="fp32")
    setting = rows[0].setting
    sparse = [row for row in rows if row.name != "dense"]
    densities = list(dict.fromkeys(row.setting["density"] for row in sparse))
    speeds = {(row.name, row.setting["density"]): row.speed for row in sparse}
    names = dict.fromkeys(row.name for row in sparse)
    groups = [Group(name, [speeds.get((name, density)) for density in densities]) for name in names]
    series = [f"{100 * float(density):.0f} % of the keys" for density in densities]
    what = f"{setting['seq']:,} tokens, {setting['dtype']}, {setting['threads']} CPU threads"
    return bars(f"times as fast as dense attention, {what}", series, groups, line_at=1.0)
