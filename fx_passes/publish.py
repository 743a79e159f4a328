"""Where a report goes: one INFO line per compiled graph, DEBUG per site, torch's trace, last_report()."""

from __future__ import annotations

import logging

from torch._logging._internal import trace_structured

from .report import Report

_log = logging.getLogger("sparseattn")
_last: Report | None = None


def publish(report: Report) -> None:
    """Log a report and remember it. A graph without attention does not replace one that had some."""
    if report.rows or _last is None:
        remember(report)
    _log.info("%s", report.summary())
    for row in report.rows:
        _log.debug("%s: %s", row.module or row.source, row.decision)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "sparseattn_report", "encoding": "json"},
        payload_fn=report.to_json,
    )


def remember(report: Report) -> None:
    """Have last_report() give this one."""
    global _last
    _last = report


def last_report() -> Report | None:
    """The report of the last graph that `backend="sparseattn"` compiled, or checked, and had attention; or None."""
    return _last
