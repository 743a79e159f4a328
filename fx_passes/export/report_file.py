"""report_file: the report travels with what was exported: inside the file, and beside it as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...attn_ops.errors import ArgumentError
from ..report import Report

KEY = "sparseattn_report"
"""What the report is called in the metadata of a file."""
MEMBER = f"{KEY}.json"
"""What the file is called that holds the report inside of an exported program."""


def path_of_report(artifact: Path) -> Path:
    """Where the report of a file is: `model.report.json` beside `model.pt2`."""
    return artifact.with_suffix(".report.json")


def write_report(folder: Path, target: Path, report: Report | None) -> None:
    """Write the report of `target` into the folder that its files are collected in."""
    if report is not None:
        (folder / path_of_report(target).name).write_text(report.to_json())


def read_report(path: str | Path) -> dict[str, Any]:
    """The report beside a file that was exported, as `Report.to_dict` gives it.

    Raises:
        ArgumentError: if there is none.
    """
    beside = path_of_report(Path(path))
    if not beside.exists():
        raise ArgumentError("read_report", "path", f"have its report beside it, {beside.name}", repr(str(path)))
    report: dict[str, Any] = json.loads(beside.read_text())
    return report
