"""Markdown of rows: tables, what they were measured on, and figures with as many digits as they deserve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from harness.record import Row, Timing

UNKNOWN = "-"


def table(header: Sequence[str], lines: Iterable[Sequence[str]], rows: Sequence[Row], words: int = 1) -> str:
    """A table with what was measured on what below it."""
    return f"{grid(header, lines, words)}\n\n{circumstances(rows)}"


def grid(header: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first columns are words and whose others are figures."""
    ruler = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *lines))


def circumstances(rows: Sequence[Row]) -> str:
    """Device, versions, commit and date, in small letters."""
    told = dict.fromkeys(_circumstance(row) for row in rows if row.stamp)
    return "<sub>" + "; ".join(told) + "</sub>"


def missing(rows: Sequence[Row]) -> str:
    """Why some of the rows have no figures."""
    return "\n".join(f"- {row.name}: not measured, {row.missing}" for row in rows if row.missing)


def milliseconds(time: Timing | None) -> str:
    """The median, and the quartiles if they are known."""
    if time is None:
        return UNKNOWN
    if time.low is None or time.high is None or time.repeats == 1:
        return short(time.ms)
    return f"{short(time.ms)} ({short(time.low)} to {short(time.high)})"


def short(value: float | None, digits: int = 3) -> str:
    """Three significant digits, but no fewer than those before the point."""
    if value is None:
        return UNKNOWN
    whole = len(str(int(abs(value))))
    return f"{value:.{max(0, digits - whole)}f}"


def fixed(value: float | None, places: int) -> str:
    """So many places."""
    return UNKNOWN if value is None else f"{value:.{places}f}"


def power(value: object) -> str:
    """Two digits and a power of ten."""
    return f"{value:.1e}" if isinstance(value, float | int) else UNKNOWN


def percent(value: float | None, places: int = 0) -> str:
    """So many of a hundred."""
    return UNKNOWN if value is None else f"{100 * value:.{places}f} %"


def rate(flops: float | None) -> str:
    """GFLOP/s."""
    return UNKNOWN if flops is None else short(flops / 1e9)


def span(values: Iterable[float], places: int) -> str:
    """The least to the largest, or one figure if they are the same."""
    found = sorted(values)
    ends = [f"{value:.{places}f}" for value in (found[0], found[-1])]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def count(value: object) -> str:
    """A whole number with its thousands set apart."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _circumstance(row: Row) -> str:
    assert row.stamp is not None
    versions = ", ".join(
        f"{name} {row.stamp.versions[name]}" for name in ("torch", "triton") if name in row.stamp.versions
    )
    return f"{row.stamp.device}; {versions}; commit {row.stamp.commit}, {row.stamp.date[:10]}"
