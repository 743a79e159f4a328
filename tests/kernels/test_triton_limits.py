"""The committed table of what the Triton kernels need: nothing grows unseen, and what shrinks is written down."""

from __future__ import annotations

import pytest
import triton
from support.triton_limits import CASES, CHECKED, committed, differences, needs

RELEASE, LIMITS = committed()


@pytest.mark.skipif(triton.__version__ != RELEASE, reason=f"the table is of Triton {RELEASE}")
@pytest.mark.parametrize("name", CHECKED)
def test_needs_what_the_table_says(name: str) -> None:
    """After a change on purpose: python tests/support/triton_limits.py --write."""
    assert differences(name, needs(name), LIMITS[name]) == []


def test_the_table_has_every_case_and_no_spill() -> None:
    assert sorted(LIMITS) == sorted(CASES)
    spills = [(name, kernel) for name, of in LIMITS.items() for kernel, needed in of.items() if needed["spilled"]]
    assert spills == []


def test_a_difference_is_told_with_both_numbers() -> None:
    limit = {"kernel": {"registers": 100, "programs_per_sm": 2, "matrix": {"HGMMA": 4}}}
    got = {"kernel": {"registers": 90, "programs_per_sm": 1, "matrix": {}}}
    assert differences("case", got, limit) == [
        "case: kernel has registers 90, better (tighten the table) than 100",
        "case: kernel has programs_per_sm 1, worse than 2",
        "case: kernel has matrix {}, other than {'HGMMA': 4}",
    ]
    assert differences("case", {}, limit) == ["case: compiles [], the table has ['kernel']"]
