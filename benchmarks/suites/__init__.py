"""The suites, each a folder with one file per case."""

from __future__ import annotations

import importlib

from harness.case import Case

SUITES = ("cpu", "gpu", "peers", "examples")


def cases(suite: str) -> tuple[Case, ...]:
    """The cases of a suite, in order."""
    found: tuple[Case, ...] = importlib.import_module(f"suites.{suite}").CASES
    return found
