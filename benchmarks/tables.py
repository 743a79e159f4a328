"""Put the newest figures of benchmarks/results into README and docs.

    python benchmarks/tables.py            # write them
    python benchmarks/tables.py --check    # 1 if a page says something else than the raw files

A page has places, `<!-- bench: NAME -->` ... `<!-- /bench -->`; benchmarks/views says what goes where.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from harness.pages import fill, names
from harness.record import newest
from harness.source_tree import ROOT
from views import PICTURES, VIEWS, NotMeasuredError, Results

RESULTS = Path(__file__).with_name("results")
NOT_MEASURED = "(not measured yet)"


def generated(results: Path = RESULTS, root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Every page and picture with what the raw files say.

    Raises:
        ValueError: if a page asks for a name that no view has, or a marker has no partner.
    """
    rows = Results(newest(results))

    def text_of(name: str) -> str:
        try:
            return VIEWS[name](rows)
        except NotMeasuredError:
            return NOT_MEASURED

    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if unknown := [name for name in names(text) if name not in VIEWS]:
            raise ValueError(f"{page.name}: there is no view {unknown[0]!r} in benchmarks/views.")
        yield page, fill(text, text_of, page.name)
    for path, draw in PICTURES.items():
        with suppress(NotMeasuredError):
            yield root / path, draw(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    stale = [
        (path, text) for path, text in generated() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        print(f"{'differs' if options.check else 'written'}: {path.relative_to(ROOT)}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
