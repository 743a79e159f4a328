"""The pages that repeat what the registry knows say the same as the registry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparseattn.attn_ops.registry import backends
from sparseattn.lowering.selection_table import selection_page

DOCS = Path(__file__).parents[1] / "docs"
METHODS = (DOCS / "methods.md").read_text(encoding="utf-8")
TRAPS = [line for line in (DOCS / "traps.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
HEADER = ("| trap | here | test |", "| --- | --- | --- |")
SELECTABLE = sorted(name for name, spec in backends().items() if spec.selectable)


def test_selection_page_is_what_the_registry_says() -> None:
    page = (DOCS / "selection.md").read_text(encoding="utf-8")
    assert page == selection_page(), "run: sparseattn backends --markdown > docs/selection.md"


@pytest.mark.parametrize("name", SELECTABLE)
def test_every_method_has_a_section_with_all_its_parameters(name: str) -> None:
    spec = backends()[name]
    _, _, section = METHODS.partition(f"\n## {name}\n")
    section = section.partition("\n## ")[0]
    assert f"Op `{spec.op}`, {spec.kind}." in section
    assert spec.paper in section
    for param in spec.params:
        rows = [line for line in section.splitlines() if line.startswith(f"| `{param.name}` |")]
        assert len(rows) == 1, param.name
        assert param.doc in rows[0]


def test_the_tables_of_traps_are_read() -> None:
    assert TRAPS.count(HEADER[0]) == TRAPS.count(HEADER[1]) == 8
    assert len(TRAPS) > 100


@pytest.mark.parametrize("row", [line for line in TRAPS if line not in HEADER], ids=lambda row: row[2:40])
def test_every_trap_names_tests_that_exist(row: str) -> None:
    trap, here, tests = row.strip("| ").split(" | ")
    assert trap
    assert here
    for test in tests.split("<br>"):
        named = re.fullmatch(r"`(tests/\w+(?:/\w+)*\.py)::(test_\w+)`", test)
        assert named, test
        file = DOCS.parent / named[1]
        assert file.is_file(), test
        assert f"\ndef {named[2]}(" in file.read_text(encoding="utf-8"), test
