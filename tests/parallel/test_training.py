"""Four gloo processes: FSDP2 on a mesh (dp, cp), and the memory of a rank by how many share a sequence."""

from __future__ import annotations

import os
from typing import Any

import pytest

CLOSE, LEAST_MOVE = 1e-5, 1e-3
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")


@pytest.fixture(scope="module")
def four(launched: Any) -> dict[str, list[Any]]:
    """All cases on four ranks."""
    found: dict[str, list[Any]] = launched("support.sharded_by_four", 4)
    return found


@pytest.mark.parametrize("case", ["whole", "regional"])
def test_a_step_with_fsdp_is_that_of_one_process(four: dict[str, list[Any]], case: str) -> None:
    for rank in four[case]:
        assert rank["moved"] >= LEAST_MOVE
        assert rank["far"] <= CLOSE


def test_the_memory_of_a_rank_falls_with_the_number_of_ranks(four: dict[str, list[Any]]) -> None:
    """Not by half: every rank has the whole output."""
    most = {
        shared: max(rank[shared]["training"] for rank in four["memory"] if shared in rank) for shared in ("1", "2", "4")
    }
    assert most["2"] < 0.7 * most["1"]
    assert most["4"] < 0.75 * most["2"]
