"""Measure: `python benchmarks/run.py cpu | gpu | peers | examples`. Rows go to the screen and to a file of JSON lines.

    python benchmarks/run.py cpu             # the figures of README and docs
    python benchmarks/run.py cpu --only block_sparse --seq 4096 --density 0.1
    python benchmarks/run.py gpu             # on a GPU, under 9 minutes
    python benchmarks/run.py cpu --quick     # does everything run? the figures mean nothing

With --only NAME alone, the settings of that case are flags. `python benchmarks/tables.py` puts the newest figures into
README and docs.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from harness.case import Case, add_flags, with_flags
from harness.clock import Budget
from harness.machine import Stamp, take_stamp
from harness.record import Row, write
from harness.screen import line
from suites import SUITES, cases

RESULTS = Path(__file__).with_name("results")
SUITE_SECONDS = {"gpu": 520.0, "peers": 520.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; 1 if one of them failed."""
    options, chosen = _options(arguments)
    stamp = take_stamp(
        "cuda" if torch.cuda.is_available() and options.suite in ("gpu", "peers") else "cpu", options.commit
    )
    path = options.out or _file(options, chosen, stamp)
    print(
        f"{stamp.device}; {', '.join(map(' '.join, stamp.versions.items()))}; commit {stamp.commit}\n{path}", flush=True
    )
    budget = Budget(SUITE_SECONDS.get(options.suite, float("inf")))
    failed = [case.name for case in chosen if not _measured(case, options, budget, path, stamp)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _measured(case: Case, options: argparse.Namespace, budget: Budget, path: Path, stamp: Stamp) -> bool:
    """Run one case; its rows are written when it is complete, so that a file never holds half a case."""
    start, rows = time.perf_counter(), []
    settings = with_flags(case.quick if options.quick else case.full, options)
    if hasattr(settings, "seconds"):
        settings = dataclasses.replace(settings, seconds=min(settings.seconds, max(0.0, budget.left)))
    print(f"\n{case.name}", flush=True)
    try:
        for row in [Row(case.name, case.name, missing=case.why_not())] if case.why_not() else case.run(settings):
            print(line(row), flush=True)
            rows.append(row)
    except Exception:
        traceback.print_exc()
        return False
    write(path, rows, stamp)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return True


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    """The flags and the chosen cases; the settings of a single one are flags too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into a temporary folder: a smoke test")
    parser.add_argument(
        "--out", type=Path, help="append to it (default: a new file; in results with the settings as they are)"
    )
    parser.add_argument("--commit", help="of the source, where there is no git folder")
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not set(SUITES) & set(given):
        parser.parse_args(given)  # help, or what is wrong
    first, _ = parser.parse_known_args([one for one in given if one not in ("-h", "--help")])
    known = {case.name: case for case in cases(first.suite)}
    if unknown := [name for name in first.only or () if name not in known]:
        parser.error(f"--only: no case {unknown[0]!r} in {first.suite}. There are {', '.join(known)}.")
    chosen = [known[name] for name in first.only or known]
    if first.only and len(chosen) == 1:
        add_flags(parser.add_argument_group(f"settings of {chosen[0].name}"), chosen[0].full)
    options = parser.parse_args(given)
    if options.quick and options.out and RESULTS in options.out.absolute().parents:
        parser.error("--out: quick figures mean nothing and do not belong in results. Write them elsewhere.")
    return options, chosen


def _file(options: argparse.Namespace, chosen: list[Case], stamp: Stamp) -> Path:
    """A new file: date and time, device, suite, and the cases if not all; in results only with published settings."""
    device = re.sub(r"[^a-z0-9]+", "-", stamp.device.split(",")[0].lower()).strip("-")
    name = "-".join([stamp.date[:19].replace(":", ""), device, options.suite, *(options.only or ())])
    published = not options.quick and all(with_flags(case.full, options) == case.full for case in chosen)
    return (RESULTS if published else Path(tempfile.mkdtemp())) / f"{name}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
