"""What the suites `gpu` and `peers` measured."""

from __future__ import annotations

from .markdown import count, fixed, milliseconds, missing, percent, power, short, table
from .registry import NotMeasuredError, Results, view

NOTHING = "Nothing has been measured on a GPU yet."


def _times(results: Results, cases: tuple[str, ...]) -> str:
    rows = [row for case in cases for row in results.cases.get(case, ())]
    timed = [row for row in rows if row.time]
    if not timed:
        return NOTHING
    header = (
        "workload",
        "by",
        "direction",
        "tokens",
        "density",
        "ms (quartiles)",
        "SDPA ms",
        "TFLOP/s",
        "of torch.mm",
        "rel. L2",
    )
    lines = (
        (
            row.case,
            row.name,
            str(row.setting.get("direction", "forward")),
            count(row.setting["seq"]),
            fixed(row.density, 3),
            milliseconds(row.time),
            short(row.dense.ms if row.dense else None),
            short(row.rates["executed"] / 1e12) if row.rates else "",
            percent(row.of_matmul),
            power(row.error.get("relative_l2")),
        )
        for row in timed
    )
    told = missing(rows)
    return table(header, lines, timed, words=3) + (f"\n\n{told}" if told else "")


@view("gpu")
def gpu(results: Results) -> str:
    """Our kernels."""
    return _times(results, ("gpu.block_sparse", "gpu.sla", "gpu.sage", "gpu.sweep"))


@view("peers")
def peers(results: Results) -> str:
    """Other people's."""
    return _times(results, ("peers.block_sparse", "peers.sla", "peers.sage", "peers.sta"))


@view("gpu.status")
def status(results: Results) -> str:
    """Whether a GPU has been measured, in a sentence."""
    try:
        row = results.rows("gpu.block_sparse")[0]
    except NotMeasuredError:
        return NOTHING
    assert row.stamp is not None
    return f"Measured on {row.stamp.device}, {row.stamp.date[:10]}."
