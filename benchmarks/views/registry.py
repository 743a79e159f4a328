"""The names that pages may ask for, and the rows that answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.record import Row, Scalar

View = Callable[["Results"], str]
VIEWS: dict[str, View] = {}
"""By the name between the markers of a page: Markdown of several lines for a table, else text within a sentence."""
PICTURES: dict[str, View] = {}
"""By path in the repository: SVG."""


class NotMeasuredError(Exception):
    """There are no such rows."""


@dataclass(frozen=True)
class Results:
    """The newest rows of every case."""

    cases: dict[str, list[Row]]

    def rows(self, case: str, name: str | None = None, **setting: Scalar) -> list[Row]:
        """The rows of a case with this name and these settings.

        Raises:
            NotMeasuredError: if there is none.
        """
        found = [
            row
            for row in self.cases.get(case, ())
            if name in (None, row.name) and all(row.setting.get(key) == value for key, value in setting.items())
        ]
        if not found:
            raise NotMeasuredError(case)
        return found

    def row(self, case: str, name: str | None = None, **setting: Scalar) -> Row:
        """The only such row.

        Raises:
            NotMeasuredError: if there is none.
            ValueError: if there are several.
        """
        (row,) = self.rows(case, name, **setting)
        return row


def view(name: str) -> Callable[[View], View]:
    """Offer a function to the pages under a name."""

    def offered(function: View) -> View:
        if VIEWS.setdefault(name, function) is not function:
            raise ValueError(f"two views are named {name}.")
        return function

    return offered


def picture(path: str) -> Callable[[View], View]:
    """Offer a function as a file."""

    def offered(function: View) -> View:
        PICTURES[path] = function
        return function

    return offered
