"""Processes on gloo: attention over shards is attention over the whole, in every method, model and number of ranks."""

from __future__ import annotations

import os
from typing import Any

import pytest
from support.sharded_cases import MODELS, OPS
from support.sharded_rings import HYBRIDS, RINGS

CLOSE = 1e-5
"""Largest difference of an entry to the model on one rank, fp32."""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")


def _far(found: dict[str, list[Any]]) -> dict[str, Any]:
    """The cases with a rank whose numbers are not close."""
    return {case: ranks for case, ranks in found.items() if any(not _close(rank) for rank in ranks)}


def _close(rank: dict[str, float]) -> bool:
    return all(distance <= CLOSE for distance in rank.values())


@pytest.mark.parametrize("case", [*OPS, *RINGS, *(pytest.param(name, marks=pytest.mark.models) for name in MODELS)])
def test_it_gives_what_it_gives_on_one_rank(launched: Any, case: str) -> None:
    found = launched("support.sharded_by_three", 3)[case]
    assert len(found) == 3
    assert not _far({case: found})


@pytest.mark.parametrize("launch", [("cases", 1, "FEW"), ("runs", 2, "RUNS"), ("by_four", 4)])
def test_other_numbers_of_ranks(launched: Any, launch: tuple[Any, ...]) -> None:
    module, ranks, *cases = launch
    found = launched(f"support.sharded_{module}", ranks, *cases)["a few"]
    assert len(found) == ranks
    assert not _far({"a few": found})


@pytest.mark.parametrize("case", HYBRIDS)
def test_a_ring_of_groups_gives_what_one_rank_gives(launched: Any, case: str) -> None:
    found = launched("support.sharded_by_four", 4)[case]
    assert len(found) == 4
    assert not _far({case: found})


@pytest.mark.models
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_model_on_so_many_ranks(launched: Any, ranks: int, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--all-sharded-models"):
        pytest.skip("minutes of two cores: pass --all-sharded-models")
    found = launched("support.sharded_cases", ranks, "EVERY_MODEL")
    assert set(found) == {"cogvideox", "hunyuan_video", "llama", "ltx", "wan"}
    assert all(len(of) == ranks for of in found.values())
    assert not _far(found)


@pytest.fixture(scope="module")
def two(launched: Any) -> dict[str, list[Any]]:
    """The other cases, on two ranks."""
    found: dict[str, list[Any]] = launched("support.sharded_runs", 2, "RUNS")
    return found


@pytest.mark.parametrize("case", ["causal", "inductor", "regions", "ring_inductor"])
def test_shards_in_other_circumstances(two: dict[str, list[Any]], case: str) -> None:
    assert len(two[case]) == 2
    assert not _far({case: two[case]})


def test_a_model_that_is_given_shards(two: dict[str, list[Any]]) -> None:
    assert max(two["given_shards"]) <= CLOSE


def test_one_graph_for_five_steps_with_two_collectives_a_site(two: dict[str, list[Any]]) -> None:
    forward_and_backward = 2
    assert two["steps"] == [{"graphs": forward_and_backward, "forward": 2 * 2, "backward": 2 * 2}] * 2


@pytest.mark.parametrize("case", ["counted", "int8_counted"])
def test_the_report_has_the_bytes_that_are_sent(two: dict[str, list[Any]], case: str) -> None:
    for rank in two[case]:
        assert rank["reported"] == rank["sent"] > 0
        assert rank["collectives"] == rank["calls"] == 2 * 2


def test_queries_and_keys_that_travel_as_int8_cost_little(two: dict[str, list[Any]]) -> None:
    """A rounding more: sqrt(2) of the error, unless k were rounded with what all its tokens have in common."""
    for rank in two["int8"]:
        assert rank["one rank"]["L1"] < rank["int8"]["L1"] < 1.5 * rank["one rank"]["L1"]
        assert rank["int8, k with its mean"]["L1"] > 5 * rank["one rank"]["L1"]


def test_a_ring_passes_on_as_often_as_there_are_other_ranks(two: dict[str, list[Any]]) -> None:
    for rank in two["ring_counted"]:
        assert rank["reported"] == rank["sent"] > 0
        assert rank["collectives"] == rank["calls"] == 2 * 1


def test_a_ring_of_blocks_gathers_their_sums_too(two: dict[str, list[Any]]) -> None:
    for rank in two["blocks_counted"]:
        assert rank["gathered"] > 0
        assert rank["reported"] == rank["sent"] + rank["gathered"]
        assert rank["collectives"] == rank["calls"] + 2 * 1 == 2 * 2


def test_other_shapes_are_told_to_all_ranks(two: dict[str, list[Any]]) -> None:
    for error, other in zip(two["other_shapes"], (1, 0), strict=True):
        assert "ParallelError: parallel: every rank must exchange the same" in error
        assert f"where rank {other} has" in error


def test_fewer_heads_than_ranks_are_told_to_all(two: dict[str, list[Any]]) -> None:
    for error in two["too_many_ranks"]:
        assert "must be at most the query heads, got 2 ranks and 1 heads" in error


@pytest.mark.parametrize("case", ["late", "lost"])
def test_no_rank_waits_for_ever(launched: Any, case: str) -> None:
    """The time-out of the group is 6 seconds; the rank that is missed says nothing, the other says what it missed."""
    errors = launched("support.sharded_runs", 2, "MISSED")[case]
    seconds, kind, *_ = errors[0].split(": ")
    assert int(seconds.removesuffix(" s")) <= 12
    assert kind in ("RuntimeError", "DistBackendError")
