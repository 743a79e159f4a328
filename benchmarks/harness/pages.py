"""Pages with places for figures: `<!-- bench: NAME -->` ... `<!-- /bench -->`, around a table or within a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable

_PLACE = re.compile(r"(<!-- bench: (?P<name>[\w.]+) -->)(?P<old>.*?)(<!-- /bench -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:bench: [^>]*|/bench) -->")


def fill(page: str, text_of: Callable[[str], str], where: str = "page") -> str:
    """The page with the text of every name: between two lines of markers a block, else words within a sentence.

    Raises:
        ValueError: if a marker has no partner, or stands where Markdown would not take it for part of a sentence.
    """
    if len(_MARKER.findall(page)) != 2 * len(_PLACE.findall(page)):
        raise ValueError(f"{where}: every <!-- bench: NAME --> needs a <!-- /bench --> behind it, and none within.")

    def filled(place: re.Match[str]) -> str:
        text, name = text_of(place["name"]), place["name"]
        if place["old"].startswith("\n"):
            return f"{place[1]}\n{text}\n{place[4]}"
        if "\n" in text:
            raise ValueError(f"{where}: {name} is a table: put its two markers on lines of their own.")
        if page[: place.start()].endswith("\n"):
            raise ValueError(f"{where}: {name} must not begin a line: Markdown would end the paragraph there.")
        return f"{place[1]}{text}{place[4]}"

    return _PLACE.sub(filled, page)


def names(page: str) -> list[str]:
    """What the page asks for, in order."""
    return [place["name"] for place in _PLACE.finditer(page)]
