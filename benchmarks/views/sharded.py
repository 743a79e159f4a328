"""What ranks that share a sequence differ by, and need."""

from __future__ import annotations

from .markdown import count, fixed, power, table
from .registry import Results, view


@view("sharded.differences")
def differences(results: Results) -> str:
    """The largest difference of an entry to one process, by ranks and model."""
    rows = results.rows("sharded_differences")
    names, ranks = (list(dict.fromkeys(of)) for of in ((r.name for r in rows), (r.setting["ranks"] for r in rows)))
    found = {(row.setting["ranks"], row.name): power(row.error["largest"]) for row in rows}
    return table(("ranks", *names), ((count(of), *(found[of, name] for name in names)) for of in ranks), rows)


@view("sharded.memory")
def memory(results: Results) -> str:
    """The most that a rank needs at once, by ranks."""
    rows, phases = results.rows("sharded_memory"), ("inference", "training")
    found = {(row.setting["ranks"], row.name): f"{fixed(row.figures['mb'], 1)} MB" for row in rows}
    ranks = dict.fromkeys(row.setting["ranks"] for row in rows)
    return table(("ranks", *phases), ((count(of), *(found[of, phase] for phase in phases)) for of in ranks), rows)


@view("sharded.wire")
def wire(results: Results) -> str:
    """Relative L1 (L2) errors with and without INT8 between the ranks."""
    rows = results.rows("sharded_wire")
    columns = list(dict.fromkeys(str(row.setting["compared"]) for row in rows))
    found = {
        (
            row.name,
            row.setting["compared"],
        ): f"{fixed(row.error['relative_l1'], 4)} ({fixed(row.error['relative_l2'], 4)})"
        for row in rows
    }
    lines = ((name, *(found[name, one] for one in columns)) for name in dict.fromkeys(row.name for row in rows))
    return table(("", *columns), lines, rows)
