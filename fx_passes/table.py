"""A table as aligned text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the first of them the heading, as lines with aligned columns; empty columns are left out."""
    used = [column for column in range(len(lines[0])) if any(line[column] for line in lines[1:])]
    widths = {column: max(len(line[column]) for line in lines) for column in used}
    return ["  ".join(line[column].ljust(widths[column]) for column in used).rstrip() for line in lines]
