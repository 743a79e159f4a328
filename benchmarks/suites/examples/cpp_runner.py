"""`examples/cpp_runner/run.py`: one attention layer run without Python."""

from __future__ import annotations

import runpy
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from harness.case import Case
from harness.record import Row, Timing
from suites.cpu.threads import threads
from suites.examples.from_examples import EXAMPLES

NAME = "cpp_runner"


@dataclass(frozen=True)
class Settings:
    """Tokens and threads."""

    tokens: int = 4096
    threads: int = 1


def run(settings: Settings) -> Iterator[Row]:
    """A row for the files, then one for the program, the package in Python, and the dense model in Python."""
    # Its name is that of the suites' own front door, so it is run by its path.
    main = runpy.run_path(str(EXAMPLES / "cpp_runner" / "run.py"))["main"]
    with tempfile.TemporaryDirectory() as folder, threads(settings.threads):
        told = main(["--out", folder, "--tokens", str(settings.tokens)])
        made = {"package": told.package, "op_library": told.library, "runner": told.runner}
        figures = {f"{name}_seconds": one.seconds for name, one in made.items()}
        figures |= {f"{name}_mb": one.path.stat().st_size / 1e6 for name, one in made.items()}
    setting = {"seq": settings.tokens, "heads": 4, "dim": 64, "dtype": "fp32", "threads": settings.threads}
    yield Row(NAME, "files", setting, figures=figures)
    dense = Timing(told.dense_ms, clock="wall clock")
    yield Row(
        NAME,
        "C++",
        setting,
        time=Timing(told.cpp_ms, clock="wall clock"),
        dense=dense,
        error={"largest": told.difference, "to": "the package in Python"},
    )
    yield Row(NAME, "Python", setting, time=Timing(told.python_ms, clock="wall clock"), dense=dense)
    yield Row(NAME, "dense, Python", setting, time=dense, dense=dense)


def _why_not() -> str:
    return "" if shutil.which("c++") or shutil.which("g++") else "needs a C++ compiler"


CASE = Case(NAME, run, Settings(), Settings(256), _why_not)
